"""Which examples a rank takes at a step, and their packing into micro-batches.

    epoch's shuffled order -> step s: [s * B * W, (s + 1) * B * W) -> rank r's share of B
        -> encode -> Examples -> StepBatch(micro-batches)

Every rank has the same number of steps, no row is repeated, and the last step may be smaller or
empty on a rank (accelerate's even_batches=True repeats rows; False hangs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from internvl.data import Row
from internvl.errors import DataError
from internvl.packing import Example, PackedBatch, pack, plan_microbatches

SHUFFLED_IN_MEMORY = 2**24  # rows; of more, the order alone would be hundreds of megabytes a rank
STEP_BATCH = "step"  # the one key of the dict that Trainer hands to training_step
# rows that a step uses and their examples to totals by name, the same names on every rank
Tally = Callable[[Sequence[Any], Sequence[Example]], dict[str, float]]


@dataclass
class StepBatch:
    """What one rank does in one optimizer step.

    microbatches: on the CPU, tiles as uint8. counts: this rank's own totals, by which the stage's
    loss is normalised once they are summed over the ranks. rows, bad: how many rows were looked at,
    and those that cannot be used, where rows are checked when they are used.
    """

    microbatches: list[PackedBatch]
    counts: dict[str, float]
    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all micro-batches; a prompt counts once, however many completions it has."""
        return sum(len(batch.input_ids) for batch in self.microbatches)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    row: Row
    reason: str


class StepSampler(Sampler[list[int]]):
    """The indices of this rank's share of each step of an epoch.

    by_place: they are places in the stream of all epochs, for rows that have an order of their own
    (training/orders.py); nothing is shuffled here, and steps that are skipped cost nothing.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        by_place: bool = False,
    ):
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.by_place = by_place
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order: Any = range(self.length)
        if self.by_place:
            order = range(self.epoch * self.length, (self.epoch + 1) * self.length)
        elif self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.length, generator=generator).numpy()
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            stop = min(start + self.batch_size, self.length)
            yield [int(index) for index in order[start:stop]] if start < stop else []


class StepLoader(DataLoader[Any]):
    """A DataLoader over `StepSampler` that Trainer can tell the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)


@dataclass
class StepCollator:
    """Rows to a `StepBatch`, in the data loader's worker.

    encode: a row to its Example. count: examples to the totals that the loss is normalised by.
    longest: rows are checked here, and this many tokens are allowed (None: they were checked
    before, and an error is one). tally: further totals, of the rows that are used.
    """

    encode: Callable[[Any], Example]
    count: Callable[[Sequence[Example]], dict[str, float]]
    max_tokens: int
    max_tiles: int | None
    longest: int | None = None
    tally: Tally | None = None

    def __call__(self, rows: Sequence[Any]) -> dict[str, StepBatch]:
        examples, used, bad = [], [], []
        for row in rows:
            try:
                example = self.encode(row) if self.longest is None else self._checked(row)
            except DataError as error:
                if self.longest is None:
                    raise
                bad.append(BadRow(row, str(error)))
            else:
                examples.append(example)
                used.append(row)
        step = self.batch(examples)
        if self.tally is not None:
            step.counts |= self.tally(used, examples)
        if self.longest is not None:
            step.rows, step.bad = len(rows), bad
        return {STEP_BATCH: step}

    def _checked(self, row: Row) -> Example:
        if row.fault is not None:
            raise DataError(row.fault)
        example = self.encode(row)
        if self.longest is not None and example.num_tokens > self.longest:
            over = f"over max_length {self.longest} (never cut)"
            raise DataError(f"{example.num_tokens} tokens, {over}")
        return example

    def batch(self, examples: Sequence[Example]) -> StepBatch:
        """Examples that are encoded already, packed."""
        plan = plan_microbatches(examples, self.max_tokens, self.max_tiles)
        return StepBatch([pack(examples, indices) for indices in plan], self.count(examples))
