"""Where rows come from: JSONL, CSV, parquet, saved data sets and TSV, alone or in a `meta.json`."""

from __future__ import annotations

import json
import math
import re
import shlex
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from internvl.data.benchmarks import BenchmarkTable
from internvl.data.cache import CACHED_FROM
from internvl.data.csv_tables import CsvTable
from internvl.data.lines import Lines, open_lines
from internvl.data.records import implies_placeholder
from internvl.data.tables import Table, open_tables
from internvl.errors import DataError

_FIRST_RECORDS = 100  # that tell how a file writes its images
_SHOWN_BYTES = 500  # of a line that is not JSON
_HUB_NAME = re.compile(r"(hf://(datasets/)?)?[\w.-]+/[\w.-]+")
_LIST_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|$)")  # of a whole file, not of a line
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04")
_OTHER_FILES = (
    *((signature, "a packed file; unpack it first") for signature in _PACKED),
    *((mark, "text in UTF-16; write it as UTF-8") for mark in (b"\xff\xfe", b"\xfe\xff")),
    (b"PAR1", "a parquet file; name it *.parquet"),
    (b"\xff\xff\xff\xff", "an Arrow file; give the folder that save_to_disk made"),
)


class Source(Protocol):
    """Records by number from 0."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Any, str | None]:
        """A record, and why it could not be read; then the record is what can be shown of it."""
        ...

    def origin(self, index: int) -> tuple[Path, int]:
        """The file and the line (or row) that a record came from; lines count from 1."""
        ...

    def files(self) -> list[Path]:
        """The files that the records are read from."""
        ...

    @property
    def image_in_front(self) -> bool:
        """Whether one image without `<image>` belongs in front; see `implies_placeholder`."""
        ...


class _Records:
    """What a source knows of its records as a whole."""

    @cached_property
    def image_in_front(self: Any) -> bool:
        """Whether one image without `<image>` belongs in front; see `implies_placeholder`."""
        first = range(min(len(self), _FIRST_RECORDS))
        return implies_placeholder(self.read(number)[0] for number in first)


class JsonLines(_Records):
    """The records of a JSONL file; blank lines are none."""

    def __init__(self, path: Path, lines: Lines):
        self.path = path
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> tuple[Any, str | None]:
        """A record by its number; see `Source`."""
        raw = self._lines.read(index)
        try:
            return json.loads(raw), None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
            reason = f"not valid JSON: {error}"
        except RecursionError:
            reason = "not valid JSON: nested too deeply"
        return raw[:_SHOWN_BYTES].decode("utf-8", "replace"), reason

    def origin(self, index: int) -> tuple[Path, int]:
        """A record's file and line; see `Source`."""
        return self.path, self._lines.number(index)

    def files(self) -> list[Path]:
        """The one file; see `Source`."""
        return [self.path]


class Tables(_Records):
    """The rows of parquet or Arrow files, one file after the other."""

    def __init__(self, tables: Sequence[Table]):
        self._tables = tables
        self._ends = list(accumulate(map(len, tables)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, index: int) -> tuple[Table, int]:
        number = bisect_right(self._ends, index)
        return self._tables[number], index - (self._ends[number - 1] if number else 0)

    def read(self, index: int) -> tuple[Any, str | None]:
        """A row by its number; see `Source`."""
        table, row = self._find(index)
        try:
            return table.record(row), None
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date in year 40000
            return {}, f"a cell cannot be read: {error}"

    def origin(self, index: int) -> tuple[Path, int]:
        """A row's file and its number there; see `Source`."""
        table, row = self._find(index)
        return table.path, row + 1

    def files(self) -> list[Path]:
        """The files in order; see `Source`."""
        return [table.path for table in self._tables]


@dataclass(frozen=True)
class DataSet:
    """One data set: its records, the folder its images lie in, and what `meta.json` says of it.

    repeat: how often it is taken. max_tiles: the tile budget of its prompts (None: not given).
    name: what `meta.json` calls it; its records carry it as "dataset" unless they name one.
    augment: whether its images are augmented in training (None: not given). weight: of the data set
    where a stage mixes by weights (None: not given).
    """

    source: Source
    root: Path
    repeat: float = 1.0
    max_tiles: int | None = None
    name: str | None = None
    augment: bool | None = None
    weight: float | None = None


def check_input(path: Path) -> None:
    """Raise `DataError` unless there are data at a path; nothing is read."""
    if path.exists() or "*" in path.name:
        return
    if _HUB_NAME.fullmatch(str(path)) and not path.suffix:
        raise DataError(
            f"{path}: no such file or folder. A data set of the Hugging Face hub is downloaded "
            f"first: hf download {path} --repo-type dataset --local-dir DIR; then give DIR"
        )
    raise DataError(f"{path}: no such file")


def input_folder(path: Path) -> Path:
    """Where relative paths of images start by default."""
    return path if path.is_dir() else path.parent


def open_source(path: Path, *, cached_from: int = CACHED_FROM, quiet: bool = False) -> Source:
    """The records of a JSONL or CSV file, parquet files, a saved data set or a benchmark's TSV.

    cached_from: see `open_lines` and `open_tables`. quiet: no progress bars.
    """
    check_input(path)
    if path.is_dir() or path.suffix == ".parquet" or "*" in path.name:
        return Tables(open_tables(path, cached_from=cached_from, quiet=quiet))
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    _refuse_other_files(path)
    if path.suffix == ".tsv":
        return BenchmarkTable(path)
    if path.suffix == ".csv":
        return CsvTable(path)
    return JsonLines(path, open_lines(path, cached_from=cached_from, quiet=quiet))


def _refuse_other_files(path: Path) -> None:
    """Raise `DataError` for a file whose beginning shows that it holds no JSON lines."""
    with path.open("rb") as file:
        start = file.read(1000)
    if _LIST_START.match(start):
        raise DataError(_list_told(path))
    for signature, told in _OTHER_FILES:
        if start.startswith(signature):
            raise DataError(f"{path}: not JSON lines, but {told}")


def _list_told(path: Path) -> str:
    lines = path.with_name(f"{path.stem}.lines.jsonl")
    return (
        f"{path}: one JSON list, but a record is expected on each line. So it is written by: "
        f"jq -c '.[]' {shlex.quote(str(path))} > {shlex.quote(str(lines))}"
    )


def open_data_sets(
    path: Path,
    image_root: Path | None = None,
    *,
    cached_from: int = CACHED_FROM,
    quiet: bool = False,
) -> Iterator[DataSet]:
    """The data sets behind a path, one by one: several for a `meta.json`, else the one.

    image_root: instead of the folder that the data lie in, or the roots that meta.json names.
    Raises `DataError` for an entry of meta.json that is not whole or asks for what is not done.
    """
    check_input(path)
    if path.suffix != ".json":
        root = image_root or input_folder(path)
        yield DataSet(open_source(path, cached_from=cached_from, quiet=quiet), root)
        return
    for name, entry in _read_meta(path).items():
        where = f"{path}: data set {name!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise DataError(f"{where} has no 'annotation' path")
        augment = entry.get("data_augment")
        if augment is not None and not isinstance(augment, bool):
            raise DataError(f"{where}: data_augment is {augment!r}; give true or false")
        root = image_root or meta_place(path, str(entry.get("root") or ""))
        repeat, max_tiles = _repeat(entry, where), _max_tiles(entry, where)
        weight = _weight(entry, where)
        annotation = meta_place(path, entry["annotation"])
        if not annotation.exists() and "*" not in annotation.name:
            raise DataError(f"{where}: {annotation}: no such file")
        source = open_source(annotation, cached_from=cached_from, quiet=quiet)
        yield DataSet(source, root, repeat, max_tiles, name, augment, weight)


def meta_place(meta: Path, name: str) -> Path:
    """Where a path that a meta.json names lies: it starts from that file's folder.

    MMPR as published starts its paths from the folder above, with the data set's own name
    ("MMPR-v1.2/annotations/..."): where only the rest of such a path is there, that is meant.
    """
    place = meta.parent / name
    if Path(name).is_absolute() or place.exists() or "*" in place.name:
        return place
    inside = meta.parent.joinpath(*Path(name).parts[1:])
    return inside if len(Path(name).parts) > 1 and inside.exists() else place


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON: {error}; a file with a record on each line is named *.jsonl"
        ) from None
    if isinstance(meta, list):
        raise DataError(_list_told(path))
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"{path}: expected {{name: {{root, annotation, ...}}}}")
    return meta


def data_set_weights(path: Path) -> dict[str, float | None]:
    """The data sets of a `meta.json` with their weights; of other data none."""
    entries = _read_meta(path).items() if path.suffix == ".json" else ()
    return {
        name: _weight(entry, f"{path}: data set {name!r}") if isinstance(entry, dict) else None
        for name, entry in entries
    }


def _weight(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("weight")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise DataError(
            f"{where}: weight is {value!r}; give a number over 0 (repeat_time 0 leaves it out)"
        )
    return float(value)


def _repeat(entry: dict[str, Any], where: str) -> float:
    value = entry.get("repeat_time", 1)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise DataError(f"{where}: repeat_time is {value!r}; give a number of 0 or more")
    return float(value)


def _max_tiles(entry: dict[str, Any], where: str) -> int | None:
    value = entry.get("max_dynamic_patch")
    if value is not None and (type(value) is not int or value < 1):
        raise DataError(
            f"{where}: max_dynamic_patch is {value!r}; give a whole number of tiles, 1 or more"
        )
    return value
