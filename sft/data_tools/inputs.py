"""The rows that a data tool goes through, data set by data set, each row once.

`read_rows` gives what a training run sees: repeated by repeat_time, all data sets in one row. A
tool writes a file for each data set, and a meta.json that says of them what the old one said.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from internvl.data import Quarantine, Row, input_folder, read_rows, write_json
from internvl.data.fingerprint import digest_of
from internvl.data.sources import meta_place, open_data_sets
from internvl.errors import UserError

_FIRST_ROWS = 1000  # that tell whether a data set holds its images' bytes


@dataclass(frozen=True)
class Part:
    """A data set: its rows, its name and entry in a meta.json (None: the input is the one set).

    read: its rows, bad ones included. root: where its image paths start.
    """

    rows: Sequence[Row]
    read: int
    root: Path
    name: str | None = None
    entry: dict[str, Any] | None = None

    def holds_bytes(self) -> bool:
        """Whether its images are bytes, which are written as files."""
        firsts = (row.images for row in islice(self.rows, _FIRST_ROWS))
        return any(isinstance(image, bytes) for images in firsts for image in images)


def read_parts(
    path: Path, quarantine: Quarantine, *, image_root: Path | None, max_bad: float
) -> list[Part]:
    """The data sets behind a path; bad rows are put aside.

    Raises `DataError` as `read_rows` does; max_bad counts over all data sets together.
    """
    quarantine.max_bad = math.inf  # of one data set alone; all of them are looked at below
    parts = [_open_part(*found, quarantine, image_root) for found in _annotations(path, image_root)]
    quarantine.max_bad = max_bad
    quarantine.check(sum(part.read for part in parts))
    return parts


def _annotations(
    path: Path, image_root: Path | None
) -> Iterator[tuple[Path, Path | None, str | None, dict[str, Any] | None]]:
    """(file, image root, name, entry of meta.json) of each data set."""
    if path.suffix != ".json":
        yield path, image_root, None, None
        return
    list(open_data_sets(path, image_root, quiet=True))  # which refuses what is not whole
    for name, entry in json.loads(path.read_bytes()).items():
        root = image_root or meta_place(path, str(entry.get("root") or ""))
        yield meta_place(path, entry["annotation"]), root, name, entry


def _open_part(
    path: Path,
    root: Path | None,
    name: str | None,
    entry: dict[str, Any] | None,
    quarantine: Quarantine,
    image_root: Path | None,
) -> Part:
    before = quarantine.count
    rows = read_rows(path, kind="conversation", quarantine=quarantine, image_root=root)
    read = len(rows) + quarantine.count - before
    return Part(rows, read, root or image_root or input_folder(path), name, entry)


def row_key(row: Row) -> str:
    """What a row is known by in a review: its content, wherever it lies."""
    return digest_of([row.data])[:16]


def output_files(output: Path, parts: Sequence[Part], suffix: str = "") -> list[Path]:
    """The file that each data set is written to: OUTPUT itself, or one for each beside it.

    suffix: for the names of data sets. Raises UserError where names would be one file.
    """
    if parts[0].name is None:
        return [output]
    folder = output.with_name(f"{output.stem}_data")
    names = ["".join(c if c.isalnum() or c in "-_." else "_" for c in str(part.name))
             for part in parts]  # fmt: skip
    files = [folder / f"{name}{suffix}.jsonl" for name in names]
    if len(set(map(str.lower, map(str, files)))) < len(files):
        raise UserError("two data sets' names differ in no letter that a file's name can hold")
    return files


def check_output(source: Path, output: Path) -> None:
    """Raise UserError unless the output is of the input's kind, and not the input itself."""
    if source.resolve() == output.resolve():
        raise UserError(f"--output {output} is the input itself")
    if source.suffix == ".json" and output.suffix != ".json":
        raise UserError(f"--output {output}: {source.name} lists data sets; name a new meta.json")
    if source.suffix != ".json" and output.suffix != ".jsonl":
        raise UserError(f"--output {output}: the rows are written as JSON lines; name it *.jsonl")


def write_meta(
    output: Path, parts: Sequence[Part], files: Sequence[Path], counts: Sequence[int], suffix: str
) -> list[str]:
    """Write the new meta.json; returns the names of data sets that no row is left of.

    Those are left out of it, everything else that the old entries say stays.
    """
    meta, empty = {}, []
    for part, file, count in zip(parts, files, counts, strict=True):
        assert part.entry is not None and part.name is not None
        if not count:
            empty.append(part.name)
            continue
        root = file.parent if part.holds_bytes() else part.root
        meta[part.name + suffix] = {
            **part.entry,
            "root": _place(root, output, absolute=Path(str(part.entry.get("root"))).is_absolute()),
            "annotation": _place(file, output),
            "length": count,
        }
    write_json(output, meta)
    return empty


def _place(path: Path, meta: Path, *, absolute: bool = False) -> str:
    return str(path.resolve()) if absolute else os.path.relpath(path, meta.parent)
