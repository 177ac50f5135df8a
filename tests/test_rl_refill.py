"""Places of a rollout batch that cannot be used: dynamic sampling, broken images."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_cases import (
    REWARDS,
    Recorded,
    SampleOnly,
    make_trainer,
    questions,
    write_images,
)

from internvl.data import Row
from internvl.errors import DataError, UserError
from internvl.sampler import Completion
from rewards import Outcome, Verdict
from rewards.functions import RewardTerm, accuracy_reward
from rl.refill import Filled, fill, scale_by_batch
from rl.rewarding import Rewarder
from rl.rollouts import RolloutMaker, RolloutSettings, questions_at

NUMBER = 40


class Fake(SampleOnly):
    """Says two completions; those of a question whose number divides by 3 are alike."""

    def __init__(self, broken: tuple[int, ...] = ()):
        self.broken = broken
        self.asked: list[tuple[str, int]] = []
        self.gone = False

    def sample(self, requests: Any, config: Any, progress: bool = False) -> list[list[Completion]]:
        if self.gone:
            raise UserError("the sampler is gone")
        for request in requests:
            list(request.images)
        out = []
        for request in requests:
            self.asked.append((request.question, request.seed))
            flat = int(request.question) % 3 == 0
            texts = ["right", "right" if flat else "wrong"]
            out.append([Completion(text, (1, 2), (-0.5, -0.5), "stop") for text in texts])
        return out


class Broken(Row):
    def load_images(self) -> Any:
        raise DataError(f"{self.data['id']}.png: not an image")


def rows_of(broken: tuple[int, ...]) -> list[Row]:
    file = Path("rows.jsonl")
    return [
        (Broken if n in broken else Row)(
            {"id": str(n), "question": str(n), "answer": "right"}, file, n, file.parent
        )
        for n in range(NUMBER)
    ]


def verdicts(asked: Any) -> list[Verdict]:
    return [
        Verdict(Outcome.CORRECT if text == "right" else Outcome.WRONG, None, "exact", 1.0, True)
        for _, text in asked
    ]


def filled(
    world: int,
    monkeypatch: pytest.MonkeyPatch,
    broken: Any = (),
    rounds: int = 2,
    failing: int | None = None,
) -> Any:
    """Every rank's Filled of batch 0, in one process: the ranks go round by round together.

    failing: a rank whose sampler has gone when a place is to be filled.
    """
    rows, made, ranks = rows_of(broken), [], []
    for rank in range(world):
        settings = RolloutSettings(None, 8 // world, 2, 7, rank, world, "group")  # type: ignore[arg-type]
        rewarder = Rewarder(rows, [RewardTerm("accuracy", accuracy_reward)], verdicts)
        ranks.append(RolloutMaker(rows, Fake(), settings, rewarder))  # type: ignore[arg-type]
        made.append(ranks[-1].make(0, 5))
        ranks[-1].sampler.gone = rank == failing  # type: ignore[attr-defined]
    if world == 1:
        return [fill(ranks[0], made[0], 0, 0, 5, rounds=rounds)]
    from threading import Barrier, Thread, local

    barrier, slots, own, out = Barrier(world), [None] * world, local(), [None] * world

    def gather(mine: Any) -> Any:
        slots[own.rank] = mine
        barrier.wait()
        every = list(slots)
        barrier.wait()
        return every

    for module in ("ranks", "refill"):
        monkeypatch.setattr(f"rl.{module}.gather", gather)

    def run(rank: int) -> None:
        own.rank = rank
        try:
            out[rank] = fill(ranks[rank], made[rank], 0, 0, 5, rounds=rounds)  # type: ignore[call-overload]
        except UserError as error:
            out[rank] = error  # type: ignore[call-overload]

    threads = [Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def flat(question: int) -> bool:
    return question % 3 == 0


def test_groups_without_spread_give_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next questions of the stream take it, one a place; the rest stay as they were."""
    (one,) = filled(1, monkeypatch, rounds=9)
    stream = questions_at(NUMBER, 0, one.taken, 7)
    expected, following = stream[:16], iter(stream[16:])
    while any(map(flat, expected)):
        expected = [next(following) if flat(question) else question for question in expected]
    assert [group.question for group in one.groups] == expected
    assert next(following, None) is None  # all that was taken was asked
    assert len(one.discarded) == one.taken - 16 > 2
    assert all(group.spread for group in one.groups)
    assert all(flat(group.question) and not group.spread for group in one.discarded)
    assert not one.bad


def test_the_budget_leaves_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (none,) = filled(1, monkeypatch, rounds=0)
    assert none.taken == 16 and not none.discarded
    assert sum(not group.spread for group in none.groups) > 2
    (one,) = filled(1, monkeypatch, rounds=1)
    assert one.taken == 16 + sum(not group.spread for group in none.groups)
    assert any(not group.spread for group in one.groups)  # such were drawn again, and stay
    assert len(one.groups) == 16


@pytest.mark.parametrize("broken", [(), (4, 11, 12, 30, 31)])
def test_the_number_of_ranks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...]
) -> None:
    (one,) = filled(1, monkeypatch, broken)
    two: list[Filled] = filled(2, monkeypatch, broken)
    assert {part.taken for part in two} == {one.taken}
    # step by step: 8 of one process, 4 of each of two
    for step in range(2):
        first, second = (part.groups[4 * step : 4 * step + 4] for part in two)
        assert first + second == one.groups[8 * step : 8 * step + 8]
    both = [bad.reason for part in two for bad in part.bad]
    assert sorted(both) == sorted(bad.reason for bad in one.bad)


def test_a_rank_that_must_stop_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """None waits for it: they stop at the same place, and can save a checkpoint together."""
    first, second = filled(2, monkeypatch, failing=1)
    assert [type(rank) for rank in (first, second)] == [UserError, UserError]
    assert str(first) == str(second) == "the sampler is gone"


def test_a_question_that_comes_again_is_asked_with_another_seed() -> None:
    rows = rows_of(tuple(range(5, NUMBER)))
    fake = Fake()
    settings = RolloutSettings(None, 8, 2, 7, 0, 1, "group")  # type: ignore[arg-type]
    rewarder = Rewarder(rows, [RewardTerm("accuracy", accuracy_reward)], verdicts)
    maker = RolloutMaker(rows, fake, settings, rewarder)  # type: ignore[arg-type]
    filled = fill(maker, maker.make(0, 5), 0, 0, 5, rounds=2)
    assert len(filled.groups) == 16
    answered = [asked for asked in fake.asked if int(asked[0]) < 5]
    assert len(answered) > 16
    assert len(set(answered)) == len(answered)


def test_the_batchs_deviation_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks' rewards 1 0 | 3 1: deviation sqrt(19/12), means 1/2 and 2."""
    (one,) = filled(1, monkeypatch, rounds=9)
    group = replace(one.groups[0], rewards=[1.0, 0.0])
    monkeypatch.setattr("rl.refill.gather", lambda mine: [mine, [3.0, 1.0]])
    scale_by_batch([group], "grpo")
    assert group.advantages[0] == pytest.approx(0.5 / (math.sqrt(19 / 12) + 1e-4), rel=1e-12)
    assert group.advantages[1] == -group.advantages[0]


def test_a_broken_image_is_put_aside_and_its_place_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = questions_at(NUMBER, 0, 20, 7)
    broken = (stream[2], stream[9], stream[16])  # the last one would have taken a place
    (one,) = filled(1, monkeypatch, broken, rounds=0)
    assert one.taken == 19
    assert [bad.row.data["id"] for bad in one.bad] == [str(question) for question in broken]
    assert one.bad[0].reason == f"{stream[2]}.png: not an image"
    expected = [*stream[:2], stream[18], *stream[3:9], stream[17], *stream[10:16]]
    assert [group.question for group in one.groups] == expected
    with pytest.raises(UserError, match="all of them are broken"):
        filled(1, monkeypatch, tuple(range(NUMBER)))


# ---------------------------------------------------------------- in a trainer

KINDS = ["mixed", "equal", "other", "unjudged", "other", "mixed", "equal", "mixed"]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "num_generations": 4,
    "steps_per_generation": 2,
    "max_steps": 3,
    "max_completion_length": 64,
    "log_completions": True,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, len(KINDS))
    return questions(folder, KINDS)


def test_a_trainer_goes_on_behind_the_refill(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """The cursor moves past what was taken; what was discarded is written down, too."""
    options = {**OPTIONS, "dynamic_sample": True, "scale_rewards": "batch"}
    trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **options)
    steps = [trainer.next_step() for _ in range(2)]
    assert [step.counts["examples"] for step in steps] == [2.0, 2.0]
    asked = questions_at(len(KINDS), 0, trainer._next_place, trainer.args.seed)
    trainer.next_step()
    lines = (tmp_path / "rollouts" / "rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    first = [record for record in records if record["batch"] == 0]
    used = [record for record in first if record["used"]]
    assert sorted(int(record["question"]) for record in first) == sorted(asked)
    assert [record["weight_version"] for record in first] == [0] * len(asked)
    assert len(used) == 4 and all(any(record["advantages"]) for record in used)
    every = [r for record in used for r in REWARDS[KINDS[int(record["question"])]]]
    std = np.std(np.array(every, dtype=float), ddof=1) + 1e-4
    for record in used:
        rewards = np.array(record["rewards"])
        expected = ((rewards - rewards.mean()) / std).tolist()
        assert record["advantages"] == pytest.approx(expected, rel=1e-9)
    taken = len(records) - sum(record["batch"] == 0 for record in records)
    following = questions_at(len(KINDS), len(asked), taken, trainer.args.seed)
    second = [int(r["question"]) for r in records if r["batch"] == 1]
    assert sorted(second) == sorted(following)


def test_a_question_whose_image_broke_is_in_the_quarantine(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    write_images(folder, len(KINDS))
    rows = questions(folder, KINDS)
    output = tmp_path / "out"
    trainer = make_trainer("rl", tiny_model, output, rows, Recorded(), **OPTIONS)
    victim = questions_at(len(KINDS), 0, 4, trainer.args.seed)
    broken = next(q for q in victim if rows[q].data["image"])
    (folder / rows[broken].data["image"][0]).write_bytes(b"no image")
    trainer.train()
    (line,) = (output / "quarantine.used.jsonl").read_text().splitlines()[:1]
    record = json.loads(line)
    assert record["row"]["id"] == str(broken) and f"{broken}-0.png" in record["reason"]
    logged = (output / "rollouts" / "rank0.jsonl").read_text().splitlines()
    assert str(broken) not in [json.loads(line)["question"] for line in logged]
    assert len(logged) == 8
