"""What watches over an online run: evaluation, collapse, masks, kept features, faults."""

from __future__ import annotations

import json
import math
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import (
    CUT,
    LARGE,
    SMALL,
    Recorded,
    make_trainer,
    pictures_of,
    questions,
    train,
    write_images,
)
from transformers.integrations import WandbCallback

from internvl.data import Row
from internvl.errors import UserError
from rewards.estimates import pass_at_k
from rl.guards import CollapseError, CollapseGuard, StepTotals
from rl.rollout_log import RolloutLog
from rl.tracker_table import COLUMNS

KINDS = ["mixed", "equal", "other", "unjudged"]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "canary_questions": 0,
    "max_tokens_per_microbatch": LARGE,
    "num_generations": 4,
    "steps_per_generation": 2,
    "max_steps": 2,
    "max_completion_length": 64,
    "epsilon": 0.05,
    "epsilon_high": 0.08,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, len(KINDS))
    return questions(folder, KINDS)


# ---------------------------------------------------------------- pass@k and collapse, alone


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n: int, correct: int) -> None:
    for k in range(1, n + 1):
        draws = list(combinations(range(n), k))
        holds = sum(any(place < correct for place in draw) for draw in draws)
        assert pass_at_k(n, correct, k) == pytest.approx(holds / len(draws), abs=1e-15)


def bounds(**given: Any) -> Any:
    from rl.guard_options import GuardOptions

    return GuardOptions(collapse_steps=3, **given)


@pytest.mark.parametrize(
    ("given", "bad", "good"),
    [
        ({"collapse_min_entropy": 0.5}, {"entropy": 4.0}, {"entropy": 5.0}),
        ({"collapse_min_length": 7.0}, {"length": 27.0}, {"length": 28.0}),
        ({"collapse_max_length": 7.0}, {"length": 29.0}, {"length": 28.0}),
        ({"collapse_no_spread": True}, {"with_spread": 0.0}, {"with_spread": 1.0}),
    ],
)
def test_a_bound_passed_three_times_in_a_row_is_a_collapse(
    given: dict[str, Any], bad: dict[str, float], good: dict[str, float]
) -> None:
    base = {"entropy": 9.0, "tokens": 10.0, "length": 28.0, "completions": 4.0}
    base |= {"with_spread": 2.0, "groups": 3.0}
    steps = [bad, bad, good, bad, bad]
    guard = CollapseGuard(bounds(**given))
    assert [guard.look(StepTotals(**{**base, **step})) for step in steps] == [None] * 5
    resumed = CollapseGuard(bounds(**given), dict(guard.streaks))
    told = resumed.look(StepTotals(**{**base, **bad}))
    assert told is not None and next(iter(given)) in told and "3 steps" in told
    assert CollapseGuard(bounds()).look(StepTotals(**{**base, **bad})) is None


def test_a_step_that_scored_nothing_says_nothing_of_the_entropy() -> None:
    guard = CollapseGuard(bounds(collapse_min_entropy=0.5))
    for _ in range(9):
        assert guard.look(StepTotals(groups=4.0)) is None
    assert guard.streaks == {}


# ---------------------------------------------------------------- runs


def without_times(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    slow = ("_runtime", "_per_second")
    return [
        {k: v for k, v in log.items() if not (k.endswith(slow) or k.startswith("time/"))}
        for log in logs
    ]


@pytest.fixture(scope="module")
def evaluated(tiny_model: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a held-out evaluation after each step, and with every guard watching."""
    folder = tmp_path_factory.mktemp("evaluated")
    recorded = Recorded()
    given = {**OPTIONS, "eval_strategy": "steps", "eval_steps": 1, "eval_file": "rows.jsonl"}
    given |= {"num_generations_eval": 4, "eval_pass_k": [1, 2, 4], "collapse_min_entropy": 1e-6}
    given |= {"collapse_max_length": 64, "log_completions": True}
    trainer = make_trainer("rl", tiny_model, folder, rows, recorded, **given, eval_rows=rows)
    trainer.train()
    return SimpleNamespace(trainer=trainer, recorded=recorded, folder=folder)


def test_evaluation_by_hand(evaluated: Any) -> None:
    """SCRIPT's completions: mixed has 1 of 4 right, other 2, equal none; unjudged is not right."""
    right = {"mixed": 1, "other": 2, "equal": 0, "unjudged": 0}
    logs = [log for log in evaluated.trainer.state.log_history if "eval_pass@1" in log]
    assert [log["step"] for log in logs] == [1, 2]
    for log in logs:
        for k in (1, 2, 4):
            rates = [pass_at_k(4, right[kind], k) for kind in KINDS]
            mean = sum(rates) / len(rates)
            assert log[f"eval_pass@{k}"] == pytest.approx(mean)
            squares = sum((rate - mean) ** 2 for rate in rates)
            error = math.sqrt(squares / (len(rates) - 1) / len(rates))
            assert log[f"eval_pass@{k}_se"] == pytest.approx(error)
        assert log["eval_rewards/not_judged"] == pytest.approx(1 / 4)
        assert log["eval_completions/clipped_ratio"] == 1 / 4
        assert log["eval_questions"] == 4
    lines = (evaluated.folder / "evaluation" / "step-2.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == [str(n) for n in range(4)]
    assert [record["outcomes"].count("correct") for record in records] == [
        right[kind] for kind in KINDS
    ]
    # the weights of that very step
    versions = evaluated.trainer.sampler.versions
    assert len(versions) == 3  # of the rollout batch, and of the two evaluations
    for version, weights in zip(versions[:2], evaluated.recorded.weights, strict=True):
        assert all(torch.equal(version[name], weights[name]) for name in weights)


def test_evaluation_moves_nothing(
    evaluated: Any, tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    plain = train("rl", tiny_model, tmp_path, rows, **OPTIONS)
    for mine, theirs in zip(plain.weights, evaluated.recorded.weights, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    seen = [log for log in evaluated.trainer.state.log_history if "loss" in log]
    assert without_times(plain.logs) == without_times(seen)


def test_a_collapse_ends_the_run_with_a_checkpoint(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    given = {**OPTIONS, "max_steps": 5, "collapse_min_length": 1000.0, "collapse_steps": 2}
    trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **given)
    with pytest.raises(CollapseError, match="step 2: collapse: completions have") as ended:
        trainer.run()
    assert ended.value.exit_code == 3
    record = json.loads((tmp_path / "checkpoint-2" / "complete.json").read_text())
    assert record["finished"] is False
    assert record["stage"]["collapse_streaks"] == {"collapse_min_length": 2}


# ---------------------------------------------------------------- masks, KL, kept features


class Towers:
    """How many tiles a model's vision tower has seen."""

    def __init__(self, trainer: Any):
        self.tiles = 0
        trainer.model.model.vision_tower.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        self.tiles += len(output.last_hidden_state)


def steps_of(trainer: Any, number: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of `number` steps, without an optimizer."""
    out = []
    for _ in range(number):
        step = trainer.next_step()
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, {"step": step})
        named = trainer.model.named_parameters()
        out.append((float(loss), {n: p.grad.clone() for n, p in named if p.grad is not None}))
    return out


FULL = {"beta": 0.05, "entropy_coef": 0.01, "loss_type": "dapo"}
FULL |= {"importance_sampling_level": "token", "mask_truncated_completions": True}


def same(mine: list[Any], theirs: list[Any], tolerance: float) -> None:
    for (loss, grads), (other, others) in zip(mine, theirs, strict=True):
        assert loss == pytest.approx(other, abs=1e-6)
        assert grads.keys() == others.keys()
        for name, grad in grads.items():
            largest = max(float(o.abs().max()) for o in others.values())
            assert float((grad - others[name]).abs().max()) < tolerance * largest


def test_a_frozen_tower_sees_an_image_once_a_rollout_batch(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """In all passes and mini-steps together; loss and gradients are those of running it again."""
    given = {**OPTIONS, **FULL, "freeze_vit": True, "max_tokens_per_microbatch": SMALL}
    runs, seen = [], []
    for reuse in (True, False):
        trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **given)
        if not reuse:
            trainer._frozen = trainer.groups.vision = None
        towers = Towers(trainer)
        runs.append(steps_of(trainer, 2))
        seen.append(towers.tiles)
    tiles = sum(1 if width == height else 3 for n in range(4) for width, height in pictures_of(n))
    assert seen[0] == tiles < seen[1]
    same(runs[0], runs[1], 1e-5)
    assert any("multi_modal_projector" in name for name in runs[0][0][1])  # it still learns


def test_any_packing_gives_the_same_with_everything_on(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    runs, counts = [], []
    for budget in (SMALL, LARGE):
        given = {**OPTIONS, **FULL, "max_tokens_per_microbatch": budget}
        trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **given)
        step = trainer.next_step()
        # cut completions are in no row and in no token count, but in the number of completions
        groups = trainer._latest[:2]
        kept = [len(ids) for g in groups for i, ids in enumerate(g.completions) if i != CUT]
        assert (step.counts["sequences"], step.counts["tokens"]) == (8, sum(kept))
        assert sum(batch.num_completions for batch in step.microbatches) == len(kept)
        trainer._pending.insert(0, groups)
        runs.append(steps_of(trainer, 2))
        counts.append(trainer._metrics.values())
    same(*runs, 1e-5)
    assert counts[0]["kl"] == pytest.approx(0.0, abs=1e-9)  # the weights are those of the start
    assert counts[0]["entropy"] == pytest.approx(counts[1]["entropy"], rel=1e-5)


def test_the_reference_is_the_start(tiny_model: Path, rows: list[Row], tmp_path: Path) -> None:
    """Also once the policy has moved; and the policy is the same after the pass as before."""
    given = {**OPTIONS, "beta": 0.1, "steps_per_generation": 1, "max_steps": 9}
    trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **given)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    moved = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.next_step()
    assert all(torch.equal(p, moved[name]) for name, p in trainer.model.named_parameters())
    groups = trainer._latest
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(before[name])
    trainer._add_logprobs(groups, "old_logprobs")
    for group in groups:  # those without spread, too: the KL term moves them
        assert group.ref_logprobs == group.old_logprobs and group.ref_logprobs


# ---------------------------------------------------------------- trackers and rewards


class FakeWandb:
    """What is used of the package wandb."""

    def __init__(self) -> None:
        self.run = object()
        self.logged: list[Any] = []
        self.Image = lambda picture: picture
        self.Table = lambda columns, data: (columns, data)

    def log(self, values: Any, commit: bool = True) -> None:
        self.logged.append(values)


def test_a_table_with_pictures_for_wandb(tiny_model: Path, rows: list[Row], tmp_path: Path) -> None:
    given = {**OPTIONS, "log_completions": True, "max_steps": 1}
    trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **given)
    callback = WandbCallback.__new__(WandbCallback)
    callback._wandb = FakeWandb()  # type: ignore[assignment]
    callback._initialized = True
    trainer.callback_handler.callbacks.append(callback)
    trainer.next_step()
    trainer.log({"loss": 0.5})
    (logged,) = [values for values in callback._wandb.logged if "completions" in values]
    columns, data = logged["completions"]
    assert columns == [*COLUMNS, "image"]
    groups = trainer._latest[:4]
    assert [entry[1] for entry in data] == [
        rows[g.question].data["id"] for g in groups for _ in range(2)
    ]
    for entry in data:
        number = int(entry[1])
        assert (entry[-1] is None) == (not pictures_of(number))
    assert max(entry[4] for entry in data if entry[4] is not None) == 1.1


OWN = """
import time

def raises(completions, **columns):
    raise KeyError("colour")

def hangs(completions, **columns):
    time.sleep(60)

def nonsense(completions, **columns):
    return ["good"] * len(completions)
"""


def test_a_reward_function_that_fails_stops_the_run(
    tiny_model: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it raises comes through with its name; a hang and nonsense are one line each."""
    (tmp_path / "failing_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = [f"failing_rewards:{name}" for name in ("nonsense", "hangs", "raises")]
    given = {**OPTIONS, "reward_timeout": 0.3, "reward_funcs": ["accuracy", *names]}
    trainer = make_trainer("rl", tiny_model, tmp_path / "out", rows, Recorded(), **given)
    rewarder = trainer.maker.rewarder
    accuracy, *failing = rewarder.terms
    told = []
    for term in failing:
        rewarder.terms = [accuracy, term]
        with pytest.raises((UserError, KeyError)) as raised:
            trainer.next_step()
        told.append(str(raised.value))
    assert told[0].startswith("reward_funcs: reward 'nonsense', value 0: 'good' is a str")
    late = "reward_funcs: reward 'hangs' did not come back within reward_timeout, 0.3 seconds"
    assert told[1] == late
    assert told[2] == "'colour'"
    assert raised.value.__notes__ == ["raised by the reward function 'raises'"]
    sys.modules.pop("failing_rewards", None)


def test_the_log_of_rollouts_is_cut_back_to_the_checkpoint(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """What a killed run wrote after it is taken away, and what an earlier run left, too."""
    trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **OPTIONS)
    trainer.next_step()
    groups = trainer._latest
    log = RolloutLog(tmp_path / "log", 0, rows)
    log.write(0, 0, groups[:2])
    at_checkpoint, size = log.path.read_bytes(), log.size
    log.write(2, 1, groups, groups[:1])
    whole = log.path.read_bytes()
    assert whole.startswith(at_checkpoint) and whole != at_checkpoint
    log.path.write_bytes(whole + b'{"step": 4, "ba')  # killed in the middle of a line
    resumed = RolloutLog(tmp_path / "log", 0, rows)
    resumed.go_on(size)
    resumed.write(2, 1, groups, groups[:1])
    assert log.path.read_bytes() == whole
    RolloutLog(tmp_path / "log", 0, rows).write(0, 0, groups[:2])  # a run from the start
    assert log.path.read_bytes() == at_checkpoint
    used = [json.loads(line)["used"] for line in whole.splitlines()]
    assert used == [True] * 2 + [True] * len(groups) + [False]


def test_a_step_without_spread_is_a_step(tiny_model: Path, tmp_path: Path) -> None:
    """It is counted and logged; the weights stay, and nothing is divided by nothing."""
    rows = questions(tmp_path, ["equal"] * 4)
    write_images(tmp_path, 4)
    recorded = train("rl", tiny_model, tmp_path / "out", rows, **OPTIONS)
    assert recorded.losses == [0.0, 0.0] and recorded.norms == [0.0, 0.0]
    assert recorded.trainer.state.global_step == 2
    assert recorded.logs[0]["frac_reward_zero_std"] == 1.0
    first, second = recorded.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
