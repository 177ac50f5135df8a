"""Rewards in RL: what a user's function is handed, what is logged, and runs with all of them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_math import fake_math
from judge_server import fails, judges, serve
from trainer_cases import (
    COMMON,
    CUT,
    REWARDS,
    SCRIPT,
    Recorded,
    SampleOnly,
    make_trainer,
    put_sampler,
    questions,
    write_images,
)

from internvl.data import Row
from internvl.errors import UserError
from internvl.sampler import Completion
from rewards import Outcome, Verdict, VerifierPool
from rewards.functions import RewardTerm, accuracy_reward, format_reward
from rewards.judging import Verifier
from rewards.loading import load_reward
from rl.config import RLConfig
from rl.rewarding import Rewarder, check_judge, make_verifier
from training.metrics import Metrics

OWN = """
seen = []

def remember(prompts, completions, **columns):
    seen.append((prompts, completions, columns))
    return [None, 0.5, 0.25]

def spoil(prompts, completions, completion_ids, verdicts, **columns):
    for ids in completion_ids:
        ids.clear()
    completions.clear()
    verdicts.clear()
    return [0.0] * 3

def short(prompts, completions, *, completion_ids, trainer_state, answer, **columns):
    assert len(answer) == len(prompts) and trainer_state.global_step >= 0
    return [None if len(ids) % 2 else -len(ids) / 100 for ids in completion_ids]

def wrong_length(prompts, completions, **columns):
    return []

def asks(prompts, completions, hardness, **columns):
    return hardness
"""
KINDS = ["mixed", "other", "unjudged", "equal"]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "steps_per_generation": 1,
    "max_steps": 2,
    "max_completion_length": 64,
    "log_completions": True,
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a user's module in the working directory."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, len(KINDS))
    return questions(folder, KINDS)


class ByRote(SampleOnly):
    """Says SCRIPT's completions; its log-probabilities mean nothing."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def sample(self, requests: Any, config: Any, progress: bool = False) -> list[list[Completion]]:
        out = []
        for request in requests:
            texts = SCRIPT[request.question.split()[-1]]
            ids = [tuple(self.tokenizer(text)["input_ids"]) for text in texts]
            scores = [(-1.0,) * len(one) for one in ids]
            out.append(
                [
                    Completion(*done, "length" if index == CUT else "stop")
                    for index, done in enumerate(zip(texts, ids, scores, strict=True))
                ]
            )
        return out


def roll_out(model: Path, output: Path, rows: list[Row], **options: Any) -> tuple[Any, Any]:
    """One rollout batch: its records by kind, and what is logged of it."""
    trainer = make_trainer("rl", model, output, rows, Recorded(), **{**OPTIONS, **options})
    put_sampler(trainer, ByRote(trainer.processing_class.tokenizer))
    trainer.next_step()
    lines = (output / "rollouts" / "rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    by_kind = {KINDS[int(record["question"])]: record for record in records}
    assert len(by_kind) == len(records) == 4
    return by_kind, trainer._metrics.values()


def verdicts(asked: Any) -> list[Verdict]:
    return [Verdict(Outcome.CORRECT, "9", "number", 1.0, True) for _ in asked]


def test_what_a_function_is_handed(own: str) -> None:
    """TRL's lists for conversations, every column of every question, and our findings."""
    file = Path("rows.jsonl")
    records: list[dict[str, Any]] = [
        {"id": "a", "question": "<image>\nHow many?", "answer": "9", "image": "0.png"},
        {"id": "b", "question": "And?", "answer": "9", "system": "Be brief.", "hard": 2},
    ]
    rows = [Row(record, file, 1, file.parent) for record in records]
    done = [
        Completion("Nine.", (5, 6), (-0.1, -0.2), "stop"),
        Completion("Final answer: 9", (7, 8, 9), (-0.1,) * 3, "length"),
        Completion("", (4,), (-0.1,), "stop"),
    ]
    terms = [
        RewardTerm("spoil", load_reward(f"{own}:spoil")),
        RewardTerm("format", format_reward, 0.1),
        RewardTerm("remember", load_reward(f"{own}:remember"), 2.0),
    ]
    state = object()
    rewarded = Rewarder(rows, terms, verdicts).reward(
        [(records[0], done[0]), (records[0], done[1]), (records[1], done[2])], state
    )
    ((prompts, completions, columns),) = sys.modules[own].__dict__["seen"]
    asked = [{"role": "user", "content": "<image>\nHow many?"}]
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}]
    assert prompts == [asked, asked, other]
    assert completions == [[{"role": "assistant", "content": d.text}] for d in done]
    assert columns.pop("verdicts") == rewarded.verdicts == verdicts(done)
    assert columns == {
        "completion_ids": [[5, 6], [7, 8, 9], [4]],
        "clipped": [False, True, False],
        "trainer_state": state,
        "id": ["a", "a", "b"],
        "question": ["<image>\nHow many?", "<image>\nHow many?", "And?"],
        "answer": ["9", "9", "9"],
        "image": ["0.png", "0.png", None],
        "system": [None, None, "Be brief."],
        "hard": [None, None, 2],
    }
    assert rewarded.formats == [True, False, True]
    assert rewarded.terms["remember"] == [None, 0.5, 0.25]
    assert rewarded.rewards == [0.1, 1.0, 0.6]


def test_all_completions_are_judged_in_one_call(rows: list[Row]) -> None:
    calls = []

    def verify(asked: Any) -> list[Verdict]:
        calls.append(len(asked))
        return verdicts(asked)

    rewarder = Rewarder(rows, [RewardTerm("accuracy", accuracy_reward)], verify)
    answered = [(row.data, Completion("x", (1,), (-0.5,), "stop")) for row in rows * 3]
    assert rewarder.reward(answered).rewards == [1.0] * 12
    assert calls == [12]


def test_the_default_rewards_and_what_is_logged(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """1 for correct and 0.1 for the format, to the bit; TRL's keys, and the outcomes apart."""
    records, first = roll_out(tiny_model, tmp_path, rows)
    for kind, record in records.items():
        by_hand = [
            None if outcome == "cannot_judge" else float(outcome == "correct") + 0.1 * float(ok)
            for outcome, ok in zip(record["outcomes"], record["formats"], strict=True)
        ]
        assert record["rewards"] == by_hand == REWARDS[kind]
    accuracy = [v for r in records.values() for v in r["terms"]["accuracy"] if v is not None]
    formats = [v for r in records.values() for v in r["terms"]["format"]]
    assert (len(accuracy), len(formats)) == (12, 16)
    for name, values in (("accuracy", accuracy), ("format", formats)):
        assert first[f"rewards/{name}/mean"] == pytest.approx(statistics.mean(values))
        assert first[f"rewards/{name}/std"] == pytest.approx(statistics.stdev(values))
    shares = {str(kind): first[f"outcomes/{kind}"] for kind in Outcome}
    assert shares == {
        "correct": 3 / 16, "wrong": 3 / 16, "no_answer": 6 / 16, "cannot_judge": 4 / 16,
        "timeout": 0.0,
    }  # fmt: skip
    assert first["rewards/not_judged"] == 4 / 16


def test_ones_own_beside_all_others(
    tiny_model: Path, rows: list[Row], tmp_path: Path, own: str
) -> None:
    """The sum is that of the terms, and each is logged by its name."""
    names = ["accuracy", "format", "overlong", "repetition", f"{own}:short"]
    weights = [1.0, 0.1, 0.5, 1.0, 2.0]
    given = {"reward_funcs": names, "soft_punish_cache": 60, "reward_weights": weights}
    records, first = roll_out(tiny_model, tmp_path / "out", rows, **given)
    for record in records.values():
        terms = record["terms"]
        assert list(terms) == ["accuracy", "format", "overlong", "repetition", "short"]
        for index, ids in enumerate(record["completions"]):
            n = len(ids)
            assert terms["overlong"][index] == (0.0 if n <= 4 else (4 - n) / 60)
            assert terms["short"][index] == (None if n % 2 else -n / 100)
            values = [terms[name][index] for name in terms]
            total = sum(w * v for w, v in zip(weights, values, strict=True) if v is not None)
            expected = None if values[0] is None else pytest.approx(total)
            assert record["rewards"][index] == expected
    applied = [v for record in records.values() for v in record["terms"]["short"] if v is not None]
    assert 1 < len(applied) < 16
    assert first["rewards/short/mean"] == pytest.approx(statistics.mean(applied))
    assert first["rewards/short/std"] == pytest.approx(statistics.stdev(applied))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("asks", "reward_funcs: reward 'asks' asks for 'hardness', which no question has"),
        ("wrong_length", "reward_funcs: reward 'wrong_length' gave 0 values for 16 completions"),
        ("nothing", "reward_funcs: reward 'own_rewards:nothing': .* has no 'nothing'"),
    ],
)
def test_a_function_that_cannot_be_used(
    tiny_model: Path, rows: list[Row], tmp_path: Path, own: str, function: str, message: str
) -> None:
    """At the start where that can be known."""
    given = {**OPTIONS, "reward_funcs": ["accuracy", f"{own}:{function}"]}
    with pytest.raises(UserError, match=message):
        made = make_trainer("rl", tiny_model, tmp_path / "out", rows, Recorded(), **given)
        assert function == "wrong_length"
        made.sampler = made.maker.sampler = ByRote(made.processing_class.tokenizer)
        made.next_step()


def test_mathematics_that_hangs_has_no_reward(rows: list[Row], tmp_path: Path) -> None:
    """It costs its limit; neither right nor wrong, however well the format was followed."""
    record = {"id": "a", "question": "How much?", "answer": "9", "matcher": "math"}
    texts = [rf"\boxed{{{text}}}" for text in ("x = 9", "hang", "x = 8", "hang 2")]
    answered = [(record, Completion(text, (1,), (-0.5,), "stop")) for text in texts]
    terms = [RewardTerm("accuracy", accuracy_reward, 1.0, decisive=True)]
    terms.append(RewardTerm("format", format_reward, 0.1))
    with fake_math(tmp_path), VerifierPool(2, limit=0.3) as pool:
        rewarded = Rewarder(rows, terms, Verifier(pool).verdicts).reward(answered)
    assert rewarded.rewards == [1.1, None, 0.1, None]
    outcomes = [verdict.outcome for verdict in rewarded.verdicts]
    assert outcomes == ["correct", "timeout", "wrong", "timeout"]


# ---------------------------------------------------------------- with a judge


def test_a_run_with_a_judge(
    tiny_model: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no rule can check is judged by the endpoint; where it fails there is no reward."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serve() as server:
        server.answers = [judges(lambda data: data["prediction"] == "6")]
        given: dict[str, Any] = {"judge_base_url": server.url, "judge_model": "m"}
        given |= {"judge_max_retries": 0, "judge_when": "cannot_judge"}
        by_kind, first = roll_out(tiny_model, tmp_path / "well", rows, **given)
        assert by_kind["unjudged"]["rewards"] == [0.1, 1.1, 0.0, 1.1]  # the third was cut
        assert by_kind["mixed"]["rewards"] == REWARDS["mixed"]
        assert first["rewards/not_judged"] == 0.0
        assert len(server.requests) == 2  # of four completions with two answers

        server.answers = [fails(400)]
        _, first = roll_out(tiny_model, tmp_path / "ill", rows, **given)
        assert first["outcomes/cannot_judge"] == 4 / 16
        args = RLConfig(**COMMON, output_dir=str(tmp_path), max_steps=1, **given)
        judge = make_verifier(args, VerifierPool()).judge
        assert judge is not None
        with pytest.raises(UserError, match=r"judge_base_url http://127\..*, model m: judge: HTTP"):
            check_judge(judge)
        judge.close()


def test_a_table_of_ones_own_is_the_one_of_mmpr_verify(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("- {match: bills, matcher: list, why: three fields}\n")

    def verifier(file: str) -> Verifier:
        args = RLConfig(**COMMON, output_dir=str(tmp_path), max_steps=1, datasets=file)
        return make_verifier(args, VerifierPool())

    asked = {"dataset": "bills", "answer": "a, b"}, "Final answer: b, a"
    (verdict,) = verifier(str(tmp_path / "mine.yaml")).verdicts([asked])
    assert (verdict.outcome, verdict.matcher) == ("correct", "list")
    with pytest.raises(UserError, match=r"other\.yaml: No such file"):
        verifier(str(tmp_path / "other.yaml"))


def test_deviations_are_exact_over_parts() -> None:
    values = [0.1, 0.5, -2.0, 3.25, 0.1]
    whole, parts = Metrics(), Metrics()
    whole.deviation("x", torch.tensor(values, dtype=torch.float64))
    for part in (values[:2], [], values[2:]):
        one = Metrics()
        one.deviation("x", torch.tensor(part, dtype=torch.float64))
        parts.merge(one)
    for metrics in (whole, parts):
        assert metrics.values() == {"x": pytest.approx(statistics.stdev(values))}
    single = Metrics()
    single.deviation("x", torch.tensor([4.0]))
    assert single.values() == {}
    single.deviation("x", torch.tensor([4.0, 4.0]))
    assert single.values() == {"x": 0.0}
