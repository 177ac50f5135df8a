"""SFT's stream: every sample exactly once, whatever kills the run, with workers, packed or not."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_runs import AtFileOperation, InSave, Kill, StageRun, _die
from stream_cases import KINDS, MAX_TILES, record, told, write_pictures, write_rows

from internvl.data import DataError
from sft.accounts import Accounts
from sft.measuring import Measure, PackLimits
from sft.packing import Packer
from sft.streaming import Planner, StepPlan
from training import checkpoints
from training.metrics import Metrics
from training.orders import Shuffled

KILLED = -signal.SIGKILL
LIMITS = PackLimits(tokens=30, tiles=6, longest=30)

# ---------------------------------------------------------------- the plan of the packs


def planner(
    sizes: Any, *, packs: int = 2, rank: int = 0, world: int = 1, **options: Any
) -> Planner:
    """A plan over rows of these sizes (tokens, tiles)."""
    measure = Measure([], None, LIMITS, None, np.array(sizes, np.int32))  # type: ignore[arg-type]
    packer = Packer(LIMITS.tokens, LIMITS.tiles, 3)
    order = Shuffled(len(sizes), seed=1)
    return Planner(order, measure, packer, packs, rank=rank, world_size=world, **options)


def until_the_end(plan: Planner) -> list[StepPlan]:
    steps = []
    while not plan.is_over:
        steps.append(plan.next_step())
    return steps


def places(steps: Sequence[StepPlan]) -> list[int]:
    return [place for step in steps for picks in step.packs for place, _ in picks]


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=40)


@settings(max_examples=60)
@given(SIZES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 30))
def test_every_sample_is_in_one_pack(
    sizes: list[tuple[int, int]], packs: int, world: int, cut: int
) -> None:
    """Over all ranks each place once, within the limits; from the state of any step the rest."""
    stop = 2 * len(sizes)  # two epochs
    seen: Counter[int] = Counter()
    for rank in range(world):
        options = {"packs": packs, "rank": rank, "world": world, "stop": stop}
        steps = until_the_end(planner(sizes, **options))
        seen.update(places(steps))
        assert sum(step.rows for step in steps) == len(range(rank, stop, world))
        assert all(len(step.packs) == packs for step in steps[:-2])
        order = Shuffled(len(sizes), seed=1)
        for picks in chain.from_iterable(step.packs for step in steps):
            tokens, tiles = map(sum, zip(*(sizes[order[place]] for place, _ in picks), strict=True))
            assert tokens <= LIMITS.tokens and tiles <= LIMITS.tiles
        again = planner(sizes, **options)
        again.restore(json.loads(json.dumps(steps[cut % len(steps)].state)))
        assert until_the_end(again) == steps[cut % len(steps) + 1 :]
        assert again.next_step().packs == []  # another rank may have more
        if rank == 0:  # which logs it
            assert again.passes(steps[-1].state) == 2.0
        count = planner(sizes, **options).count_steps()
        assert count == sum(bool(step.packs) for step in steps)
    assert seen == dict.fromkeys(range(stop), 1)


def test_a_stream_without_an_end() -> None:
    """max_steps stops it: epochs run on into each other, and what waits is never given up."""
    sizes = [(7, 0), (11, 2), (30, 0), (3, 1)]
    plan = planner(sizes)
    steps = [plan.next_step() for _ in range(40)]
    assert all(len(step.packs) == 2 for step in steps)
    found = places(steps)
    assert len(found) == len(set(found))
    assert set(range(max(found) + 1)) - set(found) <= set(range(max(found) - 40, max(found)))
    assert plan.passes(steps[-1].state) == sum(step.rows for step in steps) / 4


def test_a_row_that_fits_no_pack() -> None:
    """Checked before, it is an error; where rows are checked when used, it leaves its place."""

    class Told(Measure):
        def pieces(self, number: int) -> list[tuple[int, int]]:
            if number == 1:
                raise DataError("too many tiles")
            return super().pieces(number)

    def told_planner(late: bool) -> Planner:
        plan = planner([(20, 0)] * 3, stop=3, late=late)
        rows: Any = [type("R", (), {"file": Path("a.jsonl"), "line": n + 1}) for n in range(3)]
        plan.measure = Told(rows, None, LIMITS, None, plan.measure.known)  # type: ignore[arg-type]
        return plan

    steps = until_the_end(told_planner(late=True))
    assert [bad.reason for step in steps for bad in step.bad] == ["too many tiles"]
    assert len(places(steps)) == 2 and sum(step.rows for step in steps) == 3
    with pytest.raises(DataError, match=r"a.jsonl:2: too many tiles"):
        until_the_end(told_planner(late=False))


def test_a_stream_of_bad_rows_hands_out_steps() -> None:
    """Without an end it would be looked through for good, and nobody told of it."""

    class Bad(Measure):
        def pieces(self, number: int) -> list[tuple[int, int]]:
            raise DataError("gone")

    plan = planner([(20, 0)] * 3, late=True)
    plan.measure = Bad([None] * 3, None, LIMITS, None)  # type: ignore[list-item,arg-type]
    steps = [plan.next_step() for _ in range(2)]
    assert [(step.packs, step.rows, len(step.bad)) for step in steps] == [([], 1000, 1000)] * 2


def test_the_account_goes_on_where_a_checkpoint_was() -> None:
    counts = {"text/samples": 3.0, "text/tokens": 120.0, "images/samples": 1.0}
    counts |= {"images/tokens": 30.0, "tiles": 4.0, "packs": 2.0, "pieces": 0.0, "split": 0.0}
    counts["dropped"] = 7.0
    limits, metrics = PackLimits(tokens=100, tiles=8, longest=100), Metrics()
    first, again = Accounts([], limits), Accounts([], limits)
    first.note(counts, metrics)
    found = metrics.values()
    assert found["packing/token_fill"] == 0.75 and found["packing/tile_fill"] == 0.25
    again.go_on(json.loads(json.dumps(first.totals)))
    again.note(counts, Metrics())
    assert list(again.describe()) == [
        "drawn: 8 samples, 300 tokens; without images 75.0% of the samples, 80.0% of the tokens",
        "packs: 4 of 2.0 samples; filled 75.0% of their tokens, 25.0% of their tiles",
        "cut: 14 tokens of questions longer than a pack",
    ]


# ---------------------------------------------------------------- kills


@dataclass(frozen=True)
class Watch:
    """Writes down the samples of each step and each row that is encoded, and then kills.

    log: two files, .steps and .encoded. step: dies within it. also: another way to die.
    """

    log: Path
    step: int | None = None
    also: Kill | None = None

    def __call__(self, output_dir: Path) -> None:
        from sft.trainer import SFTTrainer
        from training.trainer import PackedTrainer

        step, encode = PackedTrainer.training_step, SFTTrainer.encode

        def training_step(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
            loss = step(trainer, model, inputs, *args)
            number = trainer.state.global_step + 1
            numbers = told(inputs["step"].microbatches, trainer.processing_class.tokenizer)
            with self.log.with_suffix(".steps").open("a") as out:
                out.write(json.dumps([number, numbers]) + "\n")
            if number == self.step:
                _die()
            return loss

        def watched_encode(trainer: Any, row: Any) -> Any:
            with self.log.with_suffix(".encoded").open("a") as out:
                out.write(row.data["id"] + "\n")
            return encode(trainer, row)

        PackedTrainer.training_step = training_step  # type: ignore[method-assign]
        SFTTrainer.encode = watched_encode  # type: ignore[method-assign]
        if self.also is not None:
            self.also(output_dir)


@dataclass
class Streamed:
    """A run whose samples are written down."""

    run: StageRun
    log: Path

    def start(self, step: int | None = None, also: Kill | None = None, **kwargs: Any) -> Any:
        self.log.with_suffix(".encoded").unlink(missing_ok=True)
        return self.run.start(Watch(self.log, step, also), **kwargs)

    def finish(self) -> None:
        ended = self.start()
        assert ended.code == 0, ended.text

    def steps(self) -> dict[int, list[int]]:
        """The samples of each step that was not undone: the last that was written of it."""
        lines = self.log.with_suffix(".steps").read_text().splitlines()
        return {step: sorted(numbers) for step, numbers in map(json.loads, lines)}

    def encoded(self) -> list[int]:
        """What the last start has encoded."""
        return sorted(map(int, self.log.with_suffix(".encoded").read_text().split()))


ROWS = 32
EPOCHS = 2
CASES: dict[str, dict[str, Any]] = {
    "packed": {
        "packing": True,
        "per_device_train_batch_size": 1,
        "max_tokens_per_microbatch": 500,
        "max_tiles_per_microbatch": 16,
        "packing_buffer_size": 4,
    },
    "plain": {"per_device_train_batch_size": 7, "max_tokens_per_microbatch": 300},
    "mixed": {"per_device_train_batch_size": 7, "mixture": "weights"},
}


@pytest.fixture(scope="session")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Streamed]:
    """A run of a case in a folder of its own."""
    folder = tmp_path_factory.mktemp("rows")
    write_pictures(folder)
    kinds = [place % KINDS if place % 3 else 0 for place in range(ROWS)]
    write_rows(folder / "rows.jsonl", kinds, words=8)
    for name, numbers in (("even", range(0, ROWS, 2)), ("odd", range(1, ROWS, 2))):
        lines = [json.dumps(record(n, kinds[n])) + "\n" for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    entries = {n: {"annotation": f"{n}.jsonl", "weight": 1} for n in ("even", "odd")}
    (folder / "meta.json").write_text(json.dumps(entries))

    def run(case: str, **changes: Any) -> Streamed:
        out = tmp_path_factory.mktemp(case)
        options = {
            "model_name_or_path": str(tiny_model),
            "train_file": str(folder / ("meta.json" if case == "mixed" else "rows.jsonl")),
            "num_train_epochs": EPOCHS,
            "dataloader_num_workers": 2,
            "max_tiles": MAX_TILES,
            "learning_rate": 1.0e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            **CASES[case],
            **changes,
            "output_dir": str(out / "run"),
        }
        return Streamed(StageRun("sft", options), out / "log")

    return run


@pytest.fixture(scope="session")
def uninterrupted(make: Callable[..., Streamed]) -> Callable[..., Streamed]:
    """The run of a case that nothing kills, made once; it sees every sample once an epoch."""
    made: dict[str, Streamed] = {}

    def get(case: str, **changes: Any) -> Streamed:
        name = json.dumps([case, changes])
        if name not in made:
            made[name] = make(case, **changes)
            made[name].finish()
            seen = Counter(chain.from_iterable(made[name].steps().values()))
            if "max_steps" not in changes:
                assert seen == dict.fromkeys(range(ROWS), EPOCHS)
        return made[name]

    return get


def check(run: Streamed, reference: Streamed) -> None:
    """Go on to the end: the same samples in every step, the same weights and logs, nothing read
    again that was trained on before.
    """
    newest = checkpoints.newest_complete(run.run.folder)
    run.finish()
    assert run.steps() == reference.steps()
    assert run.run.weights() == reference.run.weights()
    assert run.run.logged() == reference.run.logged()
    done = 0 if newest is None else checkpoints.step_of(newest)
    left = [n for step, numbers in run.steps().items() if step > done for n in numbers]
    if not run.run.options.get("max_steps"):
        assert run.encoded() == sorted(left)


@pytest.mark.slow
def test_packs_killed_in_the_middle_of_an_epoch(
    make: Callable[..., Streamed], uninterrupted: Callable[..., Streamed]
) -> None:
    reference = uninterrupted("packed")
    assert len(reference.steps()) >= 8
    run = make("packed")
    assert run.start(step=5).code == KILLED
    check(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("seed", range(2))
def test_killed_twice_at_drawn_steps(
    case: str, seed: int, make: Callable[..., Streamed], uninterrupted: Callable[..., Streamed]
) -> None:
    reference = uninterrupted(case)
    draw, last = random.Random(seed), max(reference.steps())
    first = draw.randint(1, last - 1)
    run = make(case)
    assert run.start(step=first).code == KILLED
    assert run.start(step=draw.randint(first, last)).code == KILLED
    check(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kill", [InSave(4), InSave(4, "optimizer"), AtFileOperation(40)])
def test_killed_while_it_saves(
    case: str, kill: Kill, make: Callable[..., Streamed], uninterrupted: Callable[..., Streamed]
) -> None:
    run = make(case)
    assert run.start(also=kill).code == KILLED
    check(run, uninterrupted(case))


@pytest.mark.slow
def test_killed_while_rows_are_checked_as_they_are_used(
    make: Callable[..., Streamed], uninterrupted: Callable[..., Streamed]
) -> None:
    """Without lengths known beforehand, without an end of the stream, with other workers."""
    late = {"check_rows": "when_used", "max_steps": 9}
    reference = uninterrupted("packed", **late)
    run = make("packed", **late)
    assert run.start(step=3).code == KILLED
    run.run.options["dataloader_num_workers"] = 1
    assert run.start(step=7).code == KILLED
    run.run.options["dataloader_num_workers"] = 0
    check(run, reference)


@pytest.mark.slow
def test_workers_change_nothing(
    make: Callable[..., Streamed], uninterrupted: Callable[..., Streamed]
) -> None:
    for case in CASES:
        alone = make(case, dataloader_num_workers=0)
        alone.finish()
        reference = uninterrupted(case)
        assert alone.steps() == reference.steps()
        assert alone.run.weights() == reference.run.weights()


@pytest.mark.slow
def test_another_pack_size_is_another_run(make: Callable[..., Streamed]) -> None:
    run = make("packed")
    assert run.start(step=3).code == KILLED
    run.run.options["max_tokens_per_microbatch"] = 600
    ended = run.start()
    assert ended.code == 2 and "max_tokens_per_microbatch" in ended.text
