"""Verdicts of a rollouts file while it still grows.

    sampling: batch on disk -> reached() ----.
                                             v
    a thread: the lines between -> verify -> appended to the verdicts, synced to disk

The two files alone say how far a run came: verdicts stand in the order of the rollouts, so what
follows the last whole verdict is verified again after a kill.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from internvl.data import Quarantine, Row, append_jsonl, dump_line
from internvl.data.resumable import naming_the_file, whole_lines
from internvl.errors import UserError
from mmpr.verify import VerifyReport, as_asked, verify_rows
from rewards.judging import Verifier

AT_ONCE = 4096  # verdicts written and synced together

Key = tuple[str, int, str]  # of a rollout: its question's id, the number of its sample, its text


def key_of(record: dict[str, Any]) -> Key:
    """What a rollout and its verdict share."""
    return record["id"], record["sample"], record["completion"]


def recover_verdicts(path: Path, report: VerifyReport) -> Key | None:
    """Count the verdicts that are there and cut off a torn end; the last one's key, if any."""
    last, end = None, 0
    if not path.exists():
        return None
    for _, end, record in whole_lines(path):  # noqa: B007
        report.add(record)
        last = key_of(record)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return last


class FollowingVerifier:
    """Verifies a rollouts file behind its sampling; use it in a `with` statement.

    report, quarantine: filled with all rollouts, those verified before a restart included. Leaving
    the statement waits for the last verdict, unless an error is on its way.
    Raises UserError when the verdicts belong to other rollouts or cannot be written.
    """

    def __init__(
        self,
        rollouts: Path,
        verdicts: Path,
        *,
        verifier: Verifier,
        report: VerifyReport,
        quarantine: Quarantine,
    ):
        self.rollouts, self.verdicts = rollouts, verdicts
        self.verifier, self.report, self.quarantine = verifier, report, quarantine
        self._wake = threading.Condition()
        self._size = 0  # bytes of rollouts that are whole
        self._line = 0  # the last that was read
        self._over = self._given_up = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)

    def __enter__(self) -> FollowingVerifier:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._wake:
            self._over, self._given_up = True, error is not None
            self._wake.notify()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def reached(self) -> None:
        """Say that the rollouts are whole as far as they go now; raises the thread's error."""
        with self._wake:
            if self._error is not None:
                raise self._error
            self._size = self.rollouts.stat().st_size if self.rollouts.exists() else 0
            self._wake.notify()

    def _run(self) -> None:
        try:
            last = recover_verdicts(self.verdicts, self.report)
            position = 0
            while (size := self._next_size(position)) is not None:
                rows = self._rows(position, size)
                if last is not None:
                    self._skip(rows, last)
                    last = None
                self._verify(rows)
                position = size
        except BaseException as error:  # the thread that samples raises it
            self._error = error

    def _next_size(self, position: int) -> int | None:
        """Wait for more rollouts; how far they are whole, None when there will be no more."""
        with self._wake:
            while self._size <= position and not self._over:
                self._wake.wait()
            return None if self._given_up or self._size <= position else self._size

    def _rows(self, start: int, end: int) -> Iterator[Row]:
        """The rollouts between two offsets of their file."""
        with self.rollouts.open("rb") as lines:
            lines.seek(start)
            while start < end:
                raw = lines.readline()
                start += len(raw)
                self._line += 1
                root = self.rollouts.parent  # nothing here looks at an image
                yield Row(json.loads(raw), self.rollouts, self._line, root)

    def _skip(self, rows: Iterator[Row], last: Key) -> None:
        """Pass over what has its verdict; what was put aside there is put aside again."""
        for row in rows:
            if fault := self.verifier.fault(as_asked(row.data), unanswered=True):
                self.quarantine.add(row.file, row.line, fault, row.data)
            if key_of(row.data) == last:
                return
        raise UserError(
            f"{self.verdicts} ends with sample {last[1]} of question {last[0]!r}, which "
            f"{self.rollouts} does not hold: they are verdicts of other rollouts. Delete the file, "
            "or give another output."
        )

    def _verify(self, rows: Iterator[Row]) -> None:
        verdicts = verify_rows(rows, self.report, self.quarantine, self.verifier)
        while part := list(itertools.islice(verdicts, AT_ONCE)):
            with naming_the_file(self.verdicts), append_jsonl(self.verdicts) as out:
                out.writelines(map(dump_line, part))
            if self._given_up:
                return
