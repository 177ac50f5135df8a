"""The records behind a path, each once and by number, for commands that look and do not use.

    meta.json or one file -> Listing -> row i, its fault named in it; its data set's name

Unlike `read_rows` nothing is repeated (`repeat_time` is told, not done) and nothing is put aside:
who looks at data wants to see what is wrong with them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from internvl.data import Kind, Row, find_fault
from internvl.data.records import tidy_record
from internvl.data.sources import DataSet, Source, open_data_sets
from internvl.errors import DataError
from mmpr.groups import verdict_fault

_TELLTALES: tuple[tuple[str, Kind], ...] = (
    ("chosen", "pair"),
    ("conversations", "conversation"),
    ("outcome", "verdict"),
    ("completion", "rollout"),
    ("answer", "question"),
)


@dataclass(frozen=True)
class Listing:
    """Records of one kind by number, those that cannot be used among them.

    path: what was asked for. data_sets: in order. ends: the number behind each one's last record.
    """

    path: Path
    kind: Kind
    data_sets: tuple[DataSet, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, number: int) -> Row:
        """A record with its origin; `Row.fault` says what is wrong with it."""
        where = bisect_right(self.ends, number)
        data_set = self.data_sets[where]
        index = number - (self.ends[where - 1] if where else 0)
        file, line = data_set.source.origin(index)
        record, fault = data_set.source.read(index)
        if fault is None:
            in_front = self.kind != "pair" or data_set.source.image_in_front
            fault, record = _judge(record, self.kind, in_front)
        if isinstance(record, dict) and record.get("dataset") is None:
            record["dataset"] = data_set.name or self.path.stem
        return Row(record, file, line, data_set.root, data_set.max_tiles, fault)

    def repeats(self) -> dict[str, float]:
        """How often training takes each data set that meta.json says is not taken once."""
        return {
            data_set.name or self.path.stem: data_set.repeat
            for data_set in self.data_sets
            if data_set.repeat != 1
        }


def _judge(record: object, kind: Kind, image_in_front: bool) -> tuple[str | None, object]:
    """What is wrong with a record, and the record in the spelling that all code reads."""
    if isinstance(record, dict):
        record = tidy_record(record, kind, image_in_front=image_in_front)
    fault = find_fault(record, kind)
    if fault is None and kind == "verdict" and isinstance(record, dict):
        fault = verdict_fault(record)
    return fault, record


def open_listing(path: Path, image_root: Path | None = None) -> Listing:
    """The records of a JSONL file, parquet files, a saved data set or a meta.json.

    image_root: where image paths start (default: the file's folder, or meta.json's roots).
    Raises DataError when data are missing, empty, or of no kind that is known.
    """
    data_sets = tuple(open_data_sets(path, image_root))
    ends = tuple(accumulate(len(data_set.source) for data_set in data_sets))
    kinds = (_kind_of(path, data_set.source) for data_set in data_sets)
    kind = next((kind for kind in kinds if kind is not None), None)
    if kind is None:
        raise DataError(f"{path}: not one record")
    return Listing(path, kind, data_sets, ends)


def detect_kind(path: Path) -> Kind:
    """The kind of records that data hold, from the first that can be read.

    Raises DataError when the data are missing or their first record is of no known kind.
    """
    return open_listing(path).kind


def _kind_of(path: Path, source: Source) -> Kind | None:
    for index in range(len(source)):
        record, fault = source.read(index)
        if fault is not None:
            continue
        for field, kind in _TELLTALES:
            if isinstance(record, dict) and field in record:
                return kind
        raise DataError(f"{path}: its first record is no question, rollout, verdict or pair")
    return None
