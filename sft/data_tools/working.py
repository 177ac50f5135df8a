"""Rows through a model, many at a time, and out again in their order, each into one file.

    rows -> decide(row), in threads -> kept       OUTPUT
                                    -> rejected   OUTPUT.rejected.jsonl
                                    -> undecided  OUTPUT.undecided.jsonl
    (bad ones before that)          -> quarantine OUTPUT.quarantine.jsonl

Files are whole or not there: they are written beside their places and moved at the end. A killed
run leaves the endpoint's replies behind, by which the next one gets to the same point at once; so
rows that were undecided come to stand where they belong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from internvl.data import Quarantine, Row, dump_line, portable_record
from internvl.data.quarantine import json_value
from internvl.errors import DataError
from sft.data_tools.inputs import Part, row_key

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome = Literal["kept", "rejected", "undecided"]
_AHEAD = 16  # rows a thread that may be under way before the slowest one is written


@dataclass(frozen=True)
class Decision:
    """What becomes of a row. told: of one that is not kept, for its line; record: instead of the
    row's own; reasons: by which it is counted.
    """

    outcome: Outcome
    told: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    reasons: Sequence[str] = ()


@dataclass
class Counts:
    """How many rows became what; every row that was read is one of them."""

    read: int = 0
    quarantined: int = 0
    kept: int = 0
    rejected: int = 0
    undecided: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, decision: Decision) -> None:
        """Count a row."""
        setattr(self, decision.outcome, getattr(self, decision.outcome) + 1)
        for reason in sorted(set(decision.reasons)):
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def facts(self) -> dict[str, Any]:
        """For the summary: read = quarantined + kept + rejected + undecided."""
        return {**vars(self), "reasons": dict(sorted(self.reasons.items()))}

    @property
    def whole(self) -> bool:
        """Whether every row is accounted for."""
        return self.read == self.quarantined + self.kept + self.rejected + self.undecided


def in_order(
    items: Iterable[Item], work: Callable[[Item], Result], *, workers: int
) -> Iterator[tuple[Item, Result]]:
    """Every item with its result, in order; `workers` threads work ahead of the slowest one."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    threads = ThreadPoolExecutor(workers, "row")
    try:
        for item in items:
            waiting.append((item, threads.submit(work, item)))
            while waiting and (len(waiting) >= _AHEAD * workers or waiting[0][1].done()):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        # after an error nobody waits for what is under way: it ends with its endpoint
        threads.shutdown(wait=False, cancel_futures=True)


class Files:
    """The files of a run, each written beside its place until `finish` moves all of them."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._places: dict[Path, TextIO] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, path: Path) -> TextIO:
        """Begin a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(path.name + ".partial").open("w", encoding="utf-8")
        self._places[path] = self._open.enter_context(file)
        return file

    def finish(self) -> None:
        """Move all files to their places."""
        self._open.close()
        for path in self._places:
            path.with_name(path.name + ".partial").replace(path)


def beside(output: Path, what: str) -> Path:
    """A further file of an output, as kept.jsonl.rejected.jsonl."""
    return output.with_name(f"{output.name}.{what}")


def decide_rows(
    parts: Sequence[Part],
    decide: Callable[[Part, Row], Decision],
    *,
    output: Path,
    files: Sequence[Path],
    quarantine: Quarantine,
    workers: int,
    what: str,
    rejects: bool,
) -> tuple[Counts, list[int]]:
    """Decide on all rows and write them; (counts, rows kept of each data set).

    rejects: whether the tool rejects rows at all. what: the word on the progress bar.
    """
    from tqdm import tqdm

    counts = Counts(read=sum(part.read for part in parts))
    counts.quarantined = counts.read - sum(len(part.rows) for part in parts)
    kept = []
    total = sum(len(part.rows) for part in parts)
    bar = tqdm(total=total, desc=what, unit="row", delay=1, smoothing=0.05)
    with Files() as places, bar:
        out = {"undecided": places.add(beside(output, "undecided.jsonl"))}
        if rejects:
            out["rejected"] = places.add(beside(output, "rejected.jsonl"))
        for part, file in zip(parts, files, strict=True):
            before = counts.kept
            writer = _Writer(part, file, {**out, "kept": places.add(file)}, quarantine)
            for row, decision in in_order(part.rows, partial(decide, part), workers=workers):
                if writer.write(row, decision):
                    counts.add(decision)
                else:
                    counts.quarantined += 1
                bar.update()
                bar.set_postfix(
                    kept=counts.kept, rejected=counts.rejected, undecided=counts.undecided,
                    refresh=False,
                )  # fmt: skip
            kept.append(counts.kept - before)
        places.finish()
    quarantine.check(counts.read)
    assert counts.whole, counts
    return counts, kept


class _Writer:
    """Writes a data set's rows where they belong."""

    def __init__(self, part: Part, file: Path, out: dict[str, TextIO], quarantine: Quarantine):
        self._part, self._file, self._out, self._quarantine = part, file, out, quarantine
        self._root = file.parent if part.holds_bytes() else None

    def write(self, row: Row, decision: Decision) -> bool:
        """Write a row; False where it cannot be written at all, and was put aside."""
        try:
            record = portable_record(row, self._file, self._root)
            if decision.record is not None:
                record |= decision.record
            if decision.outcome != "kept":
                record = self._entry(row, decision, record)
            line = dump_line(record)
        except DataError as error:
            self._quarantine.add(row.file, row.line, str(error), row.data)
            return False
        self._out[decision.outcome].write(line)
        return True

    def _entry(self, row: Row, decision: Decision, record: dict[str, Any]) -> dict[str, Any]:
        """A line about a row that is not kept, with all that a review needs."""
        name = row.data.get("dataset") or self._part.name
        root = self._root or row.image_root
        entry = {"key": row_key(row), "file": str(row.file), "line": row.line}
        entry |= {"dataset": name} if name else {}
        told = json_value(decision.told)
        assert isinstance(told, dict)
        return {**entry, **told, "image_root": str(root.resolve()), "row": record}
