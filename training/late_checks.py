"""Rows that are checked when they are used: what is bad goes to the quarantine as training goes.

For data too large to be looked at before the first step. A bad row leaves its place in the batch
empty: nothing takes its place, and the loss is normalised by what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist

from internvl.data import Quarantine
from internvl.errors import DataError
from training.arguments import PackedTrainingArguments
from training.batches import BadRow, StepBatch
from training.metrics import sum_over_ranks

FEWEST_ROWS = 1000  # a share of bad rows is taken of at least so many: the first few tell nothing


def late_quarantine(args: PackedTrainingArguments) -> Path:
    """Where they go: beside the quarantine of the rows that are checked before."""
    given = args.quarantine_file
    path = Path(given) if given else Path(args.output_dir or "") / "quarantine.jsonl"
    return path.with_name(f"{path.stem}.used{path.suffix}")


class LateChecks:
    """Puts aside the bad rows of each step; the first rank writes, and all stop together.

    quarantine_file: begun anew, or gone on with by `go_on`. max_bad: the share (< 1) of the rows
    seen so far, or the number (>= 1), that may be bad. most_rows: a share is taken of no more, as
    often as they may come again.
    """

    def __init__(
        self,
        quarantine_file: Path,
        max_bad: float,
        *,
        rank: int,
        device: torch.device,
        most_rows: int = sys.maxsize,
    ):
        self.seen = 0  # rows that all ranks have looked at
        self.bad = 0  # of them; the first rank's count
        self._file = quarantine_file if rank == 0 else None
        self._max_bad = max_bad
        self._most_rows = most_rows
        self._rank = rank
        self._device = device
        self._opened: Quarantine | None = None

    def _quarantine(self) -> Quarantine:
        if self._opened is None:
            if self.bad == 0 and self._file is not None:
                self._file.unlink(missing_ok=True)
            # what a killed run found after the checkpoint is found again, and counted then
            self._opened = Quarantine(self._file, self._max_bad, keep=self.bad)
        return self._opened

    def go_on(self, seen: int, bad: int) -> None:
        """Go on from a checkpoint that was saved with these counts."""
        self.seen, self.bad = seen, bad

    def look(self, step: StepBatch) -> None:
        """Take in one step of this rank.

        Raises `DataError`, on every rank, when more rows were bad than are allowed.
        """
        quarantine = self._quarantine()
        mine = {"rows": float(step.rows), "bad": float(len(step.bad))}
        totals = sum_over_ranks(mine, self._device)
        self.seen += int(totals["rows"])
        if not totals["bad"]:
            return
        for bad in self._gather(step.bad):
            quarantine.add(bad.row.file, bad.row.line, bad.reason, bad.row.data)
        self.bad = quarantine.count
        fault = None
        if self._rank == 0:
            try:
                seen = min(self.seen, self._most_rows)  # a bad row is counted once in all epochs
                quarantine.check(seen, at_least=min(FEWEST_ROWS, self._most_rows))
            except DataError as error:
                fault = str(error)
        if fault := self._from_first(fault):
            raise DataError(fault)

    @staticmethod
    def _gather(mine: list[BadRow]) -> list[BadRow]:
        if not dist.is_initialized():
            return mine
        found: list[list[BadRow]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
        return [bad for part in found for bad in part]

    @staticmethod
    def _from_first(fault: str | None) -> str | None:
        if not dist.is_initialized():
            return fault
        told = [fault]
        dist.broadcast_object_list(told, src=0)
        return told[0]
