"""The stream of packs of one rank: planned by sizes, encoded when a pack is complete.

    place in the order --> tokens, tiles --> Packer --> packs of a step --worker--> StepBatch
    (of this rank)         (measuring.py)    (packing.py)               encode


What is planned holds numbers alone, so it is small, needs no second reading after a restart, and
says of any step how the stream goes on behind it. Loader workers are handed whole packs; how many
of them there are changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from internvl.data import Row
from internvl.errors import DataError
from internvl.packing import Example, pack
from sft.measuring import Measure, PackLimits, split_example
from sft.packing import Item, Pack, Packer
from training.batches import STEP_BATCH, BadRow, StepBatch, StepCollator
from training.late_checks import FEWEST_ROWS
from training.orders import Order

Pick = tuple[int, int]  # a place in the order, and which piece of the sample that stands there


@dataclass(frozen=True)
class StepPlan:
    """The packs of one step, what was found while they were planned, and the state behind them.

    rows: how many were looked at. bad: those of them that cannot be used.
    """

    packs: list[list[Pick]]
    rows: int
    bad: list[BadRow]
    state: dict[str, Any]


class Planner:
    """Plans the steps of this rank, one after the other; `restore` goes on from any of them.

    packs: of a step. stop: the place at which the stream ends (None: it has no end). late: rows are
    checked here, and bad ones are left out; else one is an error. A step ends early where so many
    of its rows are bad that the run is to hear of it (`LateChecks`): they may all be.
    """

    def __init__(
        self,
        order: Order,
        measure: Measure,
        packer: Packer,
        packs: int,
        *,
        rank: int,
        world_size: int,
        stop: int | None = None,
        late: bool = False,
    ):
        self.order = order
        self.measure = measure
        self._packer = packer
        self._packs = packs
        self._rank = rank
        self._world_size = world_size
        self._stop = stop
        self._late = late
        self._next = 0  # in this rank's share of the places
        self._ready: list[list[Pick]] = []
        self._ended = False

    def state(self) -> dict[str, Any]:
        """How the stream goes on, as JSON holds it."""
        return {
            "next": self._next,
            "ended": self._ended,
            "ready": [[list(pick) for pick in picks] for picks in self._ready],
            "packer": self._packer.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._next, self._ended = state["next"], state["ended"]
        self._ready = [[_pick(pick) for pick in picks] for picks in state["ready"]]
        self._packer.restore(state["packer"])

    def passes(self, state: dict[str, Any]) -> float:
        """Passes over the order that a state is behind."""
        places: int = state["next"] * self._world_size
        return (places if self._stop is None else min(places, self._stop)) / len(self.order)

    @property
    def is_over(self) -> bool:
        """Whether every pack of the stream was planned."""
        return self._ended and not self._ready

    def next_step(self) -> StepPlan:
        """The packs of the next step: fewer, or none, at the end of the stream."""
        start = self._next
        packs, bad = self._next_packs()
        return StepPlan(packs, self._next - start, bad, self.state())

    def _next_packs(self) -> tuple[list[list[Pick]], list[BadRow]]:
        bad: list[BadRow] = []
        while len(self._ready) < self._packs and not self._ended and len(bad) < FEWEST_ROWS:
            place = self._next * self._world_size + self._rank
            if self._stop is not None and place >= self._stop:
                self._ended = True
                self._take(self._packer.flush())
                break
            self._next += 1
            try:
                pieces = self.measure.pieces(self.order[place])
            except DataError as error:
                row = self.measure.rows[self.order[place]]
                if not self._late:
                    raise DataError(f"{row.file}:{row.line}: {error}") from None
                bad.append(BadRow(row, str(error)))
                continue
            for piece, (tokens, tiles) in enumerate(pieces):
                self._take(self._packer.add(Item([place, piece], tokens, tiles)))
        packs, self._ready = self._ready[: self._packs], self._ready[self._packs :]
        return packs, bad

    def count_steps(self) -> int:
        """The steps until the stream ends, which it is then at."""
        steps = 0
        while not self.is_over:
            packs, _ = self._next_packs()
            steps += bool(packs)
        return steps

    def _take(self, packs: Sequence[Pack]) -> None:
        self._ready += [[_pick(item.key) for item in pack.items] for pack in packs]


def _pick(key: Sequence[int]) -> Pick:
    place, piece = key
    return place, piece


class PickedRows:
    """The rows of a pack's picks: what the loader's workers read."""

    def __init__(self, rows: Sequence[Row], order: Order):
        self._rows = rows
        self._order = order

    def __getitem__(self, picks: Sequence[Pick]) -> list[tuple[Row, Pick]]:
        return [(self._rows[self._order[pick[0]]], pick) for pick in picks]


@dataclass
class PackCollator:
    """The packs of a step, each as one micro-batch, in the data loader's worker.

    step: how rows are encoded, checked and counted. limits: of a pack. epoch_length: places of an
    epoch. at_epoch: told the epoch of a sample before it is encoded.
    """

    step: StepCollator
    limits: PackLimits
    epoch_length: int
    at_epoch: Callable[[int], None]

    def __call__(self, packs: Sequence[Sequence[tuple[Row, Pick]]]) -> dict[str, StepBatch]:
        batch = StepBatch([], {})
        used: list[Row] = []
        examples: list[Example] = []
        for picked in packs:
            mine: list[Example] = []
            for row, (place, piece) in picked:
                self.at_epoch(place // self.epoch_length)
                try:
                    mine.append(self._encode(row, piece))
                except DataError as error:
                    if self.step.longest is None:
                        raise
                    batch.bad.append(BadRow(row, str(error)))
                else:
                    used.append(row)
            if sum(example.num_tokens for example in mine) > self.limits.tokens:
                raise DataError(f"{picked[0][0].file}: rows have changed since they were measured")
            if mine:
                batch.microbatches.append(pack(mine))
            examples += mine
        batch.counts = self.step.count(examples)
        if self.step.tally is not None:
            batch.counts |= self.step.tally(used, examples)
        batch.counts["packs"] = float(len(batch.microbatches))
        return {STEP_BATCH: batch}

    def _encode(self, row: Row, piece: int) -> Example:
        if row.fault is not None:
            raise DataError(row.fault)
        example = self.step.encode(row)
        if example.num_tokens <= self.limits.longest:
            return example
        return split_example(example, self.limits.longest)[piece]


class PackLoader:
    """What Trainer iterates over: this rank's steps, from where the planner stands.

    state: how the stream goes on behind the step that was handed out last.
    """

    def __init__(self, planner: Planner, collator: PackCollator, workers: int):
        self.planner = planner
        self.state = planner.state()
        self._collator = collator
        self._workers = workers

    @property
    def epoch(self) -> float:
        """Passes over the samples of the order, so far."""
        return self.planner.passes(self.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.planner.restore(state)
        self.state = state

    def __iter__(self) -> Iterator[dict[str, StepBatch]]:
        ahead: deque[StepPlan] = deque()  # planned, and perhaps encoded, before they are asked for

        def steps() -> Iterator[list[list[Pick]]]:
            while True:
                plan = self.planner.next_step()
                ahead.append(plan)
                yield plan.packs

        loader: DataLoader[Any] = DataLoader(
            PickedRows(self.planner.measure.rows, self.planner.order),  # type: ignore[arg-type]
            batch_sampler=steps(),
            collate_fn=self._collator,
            num_workers=self._workers,
            # the collator holds the trainer, which other start methods would have to pickle
            multiprocessing_context="fork" if self._workers else None,
            generator=torch.Generator(),  # the workers' base seed must not move the global RNG
        )
        for inputs in loader:
            plan = ahead.popleft()
            step: StepBatch = inputs[STEP_BATCH]
            step.rows, step.bad = plan.rows, [*plan.bad, *step.bad]
            self.state = plan.state
            yield inputs
