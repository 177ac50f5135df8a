"""Rows by number: each is read from its file when it is asked for, so a set of any size is small.

DataSet (records by number) -> first pass: faults to the quarantine -> numbers that are kept
                                                         Rows[i] -> read -> tidy -> Row
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from internvl.data import preferences, records
from internvl.data.cache import CACHED_FROM, cached_file
from internvl.data.fingerprint import digest_of, file_digest, fingerprint
from internvl.data.quarantine import Quarantine
from internvl.data.records import Kind, find_fault, record_key, tidy_record
from internvl.data.rows import Row
from internvl.data.sources import DataSet, Source, open_data_sets
from internvl.errors import DataError

HOPELESS = 100_000  # records of which not one is good


@dataclass(frozen=True)
class Span:
    """The rows of one data set in a sequence: their numbers, and what `meta.json` says of it."""

    numbers: range
    name: str | None = None
    weight: float | None = None


class RowSequence(Sequence[Row]):
    """Rows by number; a slice is a view."""

    def row(self, index: int) -> Row:
        """The row of a number from 0."""
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """What tells these rows from others; see `internvl.data.fingerprint`."""
        raise NotImplementedError

    def spans(self) -> list[Span]:
        """The data sets that the rows are of, in order."""
        return [Span(range(len(self)))]

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Selection: ...

    def __getitem__(self, index: int | slice) -> Row | Selection:
        if isinstance(index, slice):
            return Selection(self, range(*index.indices(len(self))))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(number)


class Selection(RowSequence):
    """Some rows of others, by their numbers there, which ascend (or are a slice's)."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]):
        self._rows = rows
        self._numbers = numbers
        self._ascending = not isinstance(numbers, range) or numbers.step > 0

    def __len__(self) -> int:
        return len(self._numbers)

    def row(self, index: int) -> Row:
        """The row of a number from 0."""
        return self._rows[self._numbers[index]]

    def fingerprint(self) -> str | None:
        """The whole's, and the numbers."""
        whole = fingerprint(self._rows)
        return None if whole is None else digest_of([whole, *self._numbers])

    def spans(self) -> list[Span]:
        """What is left of each data set; of rows that are in another order only that it is one."""
        if not isinstance(self._rows, RowSequence) or not self._ascending:
            return super().spans()
        out, start = [], 0
        for span in self._rows.spans():
            stop = bisect_left(self._numbers, span.numbers.stop)
            out.append(replace(span, numbers=range(start, stop)))
            start = stop
        return out


@dataclass(frozen=True)
class _Part:
    """A data set's part in `Rows`. kept: the numbers of its good records (None: all)."""

    data_set: DataSet
    kept: array[int] | None

    @property
    def number(self) -> int:
        """Rows of one time through."""
        return len(self.data_set.source) if self.kept is None else len(self.kept)

    @property
    def length(self) -> int:
        """Rows, repetitions counted: r times is int(r) times, and the first fraction once more."""
        whole = int(self.data_set.repeat)
        return whole * self.number + round((self.data_set.repeat - whole) * self.number)


class Rows(RowSequence):
    """The rows of one or more data sets of one kind.

    checked: whether the records were looked at already; otherwise that is done as each is read,
    and `Row.fault` says what was found.
    """

    def __init__(self, parts: Sequence[_Part], kind: Kind, *, checked: bool):
        self._parts = parts
        self._ends = list(accumulate(part.length for part in parts))
        self._kind = kind
        self._checked = checked

    def __len__(self) -> int:
        return self._ends[-1]

    def fingerprint(self) -> str:
        """Of every data set the bytes of its files, what is left out, and what is said of it."""
        return digest_of(
            [
                [
                    *(file_digest(file) for file in part.data_set.source.files()),
                    None if part.kept is None else part.kept.tolist(),
                    _said(part.data_set),
                ]
                for part in self._parts
            ]
        )

    @property
    def never_augmented(self) -> bool:
        """Whether every data set says that its images are not augmented."""
        return all(part.data_set.augment is False for part in self._parts)

    def spans(self) -> list[Span]:
        """The data sets in order, repetitions counted."""
        starts = [0, *self._ends]
        return [
            Span(range(start, stop), part.data_set.name, part.data_set.weight)
            for part, start, stop in zip(self._parts, starts, self._ends, strict=False)
        ]

    def row(self, index: int) -> Row:
        """The row of a number from 0, read from its file."""
        where = bisect_right(self._ends, index)
        part = self._parts[where]
        number = (index - (self._ends[where - 1] if where else 0)) % part.number
        if part.kept is not None:
            number = part.kept[number]
        data_set = part.data_set
        record, fault = _read(data_set.source, number, self._kind, check=not self._checked)
        if data_set.name is not None and isinstance(record, dict):
            record.setdefault("dataset", data_set.name)
        file, line = data_set.source.origin(number)
        return Row(
            *(record, file, line, data_set.root, data_set.max_tiles, fault),
            augment=data_set.augment,
            data_set=data_set.name,
        )


def _said(data_set: DataSet) -> list[Any]:
    """What meta.json says of a data set, as far as it decides what is trained."""
    rest = [data_set.augment, data_set.weight]
    return [data_set.repeat, data_set.max_tiles, *(said for said in rest if said is not None)]


def _read(source: Source, number: int, kind: Kind, *, check: bool) -> tuple[Any, str | None]:
    """A tidy record and what is wrong with it."""
    record, fault = source.read(number)
    if fault is None and isinstance(record, dict):
        in_front = kind != "pair" or source.image_in_front
        record = tidy_record(record, kind, image_in_front=in_front)
    if fault is None and check:
        fault = find_fault(record, kind)
    return record, fault


def read_rows(
    path: Path | str,
    *,
    kind: Kind,
    quarantine: Quarantine,
    image_root: Path | None = None,
    checked: bool = True,
    limit: int | None = None,
    cached_from: int = CACHED_FROM,
    quiet: bool = False,
) -> Rows:
    """The rows of a JSONL file, an MMPR `meta.json`, parquet files or a saved data set.

    Bad records are put aside, all of them now; with `checked=False` nothing is looked at before it
    is used: rows then say themselves what is wrong (`Row.fault`), and ids may repeat. image_root:
    where relative paths of images start; by default the folder of the data, or the `root` of
    meta.json. `repeat_time` r repeats a data set int(r) times and takes the first fraction of it
    once more (MMPR's meaning: 0.5 takes the first half). limit: so many good records of a data set
    are enough, and those behind them are not looked at. cached_from: bytes of a data set from which
    what was found is kept in the cache. quiet: no progress bars.
    Raises `DataError` when a file is missing, when more rows are bad than the quarantine allows,
    or when no row is left.
    """
    path = Path(path)
    parts, read = [], 0
    for data_set in open_data_sets(path, image_root, cached_from=cached_from, quiet=quiet):
        if data_set.augment and kind not in ("pair", "conversation"):
            raise DataError(
                f"{path}: data set {data_set.name!r}: data_augment is true, but what is sampled, "
                "and trained online, is the picture itself; take it out"
            )
        if data_set.weight is not None and kind != "conversation":
            raise DataError(
                f"{path}: data set {data_set.name!r}: weight is read by SFT alone; repeat_time "
                "says how often a data set is taken here"
            )
        kept, looked_at = None, len(data_set.source)
        if limit is not None:
            kept, looked_at = _sift_first(data_set, kind, quarantine, limit)
        elif checked:
            kept = _sift(data_set, kind, quarantine, cached_from=cached_from, quiet=quiet)
        read += looked_at
        parts.append(_Part(data_set, kept))
    quarantine.check(read)
    if not any(part.length for part in parts):
        raise DataError(f"{path}: no usable {kind} row ({read} read)")
    return Rows(parts, kind, checked=checked)


def _sift(
    data_set: DataSet, kind: Kind, quarantine: Quarantine, *, cached_from: int, quiet: bool
) -> array[int] | None:
    """The numbers of the good records, or None where all are; the others are put aside."""
    source = data_set.source
    files = source.files()

    def find() -> dict[int, str]:
        judged = _judged(source, kind, quiet=quiet)
        return {number: fault for number, fault in judged if fault is not None}

    def make(target: Path) -> None:
        target.write_text(json.dumps(find()))

    if sum(file.stat().st_size for file in files) < cached_from:
        faults = find()
    else:
        # what makes a record bad is written there: another text of it finds the faults anew
        written = b"".join(
            Path(str(module.__file__)).read_bytes() for module in (records, preferences)
        )
        rules = hashlib.sha256(written).hexdigest()
        kept_file = cached_file(files, f".{kind}.faults.json", make, version=rules)
        faults = {int(number): fault for number, fault in json.loads(kept_file.read_text()).items()}
    _put_aside(source, kind, faults, quarantine)
    if not faults:
        return None
    return array("q", (number for number in range(len(source)) if number not in faults))


def _sift_first(
    data_set: DataSet, kind: Kind, quarantine: Quarantine, limit: int
) -> tuple[array[int], int]:
    """The numbers of the first good records, and how many were looked at."""
    kept = array("q")
    faults = {}
    looked_at = 0
    for number, fault in _judged(data_set.source, kind, quiet=True):
        if len(kept) == limit:
            break
        looked_at += 1
        if fault is None:
            kept.append(number)
        else:
            faults[number] = fault
    _put_aside(data_set.source, kind, faults, quarantine)
    return kept, looked_at


def _put_aside(source: Source, kind: Kind, faults: dict[int, str], quarantine: Quarantine) -> None:
    for number, fault in faults.items():
        record, _ = _read(source, number, kind, check=False)
        quarantine.add(*source.origin(number), fault, record)


def _judged(source: Source, kind: Kind, *, quiet: bool) -> Iterator[tuple[int, str | None]]:
    """Each record's number and what is wrong with it, an id that comes again included.

    Raises `DataError` where none of very many is good: then it is the file that is the wrong one.
    """
    from tqdm import tqdm

    seen: dict[tuple[object, ...], int] = {}
    good = 0
    for number in tqdm(range(len(source)), desc="reading rows", delay=2, disable=quiet):
        record, fault = _read(source, number, kind, check=True)
        if fault is None and (key := record_key(record, kind)) is not None:
            first = seen.setdefault(key, number)
            if first != number:
                _, line = source.origin(first)
                fault = f"the id of line {line} again: {record['id']!r}"
        good += fault is None
        if not good and number + 1 == HOPELESS:
            raise DataError(
                f"{source.origin(0)[0]}: none of the first {HOPELESS} records is a usable {kind}; "
                f"of the last of them: {fault}"
            )
        yield number, fault
