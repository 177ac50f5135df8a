"""The data sets behind a path, each with what is wrong with its entry in meta.json.

`internvl.data.read_rows` stops at the first such fault; here all are found, and what can be opened
is opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl.data import input_folder, open_source
from internvl.data.sources import Source, check_input, meta_place
from internvl.errors import DataError


@dataclass
class DataSetToCheck:
    """A data set; source: None where it cannot be opened, and faults say why.

    faults: what stops a trainer here. notes: what is only worth knowing.
    """

    name: str
    root: Path
    source: Source | None = None
    repeat: float = 1.0
    max_tiles: int | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def data_sets_to_check(path: Path, image_root: Path | None = None) -> Iterator[DataSetToCheck]:
    """The data sets of a meta.json, or the one that a path is.

    image_root: instead of the roots that meta.json names. Raises `DataError` where nothing can be
    read at all.
    """
    check_input(path)
    if path.suffix != ".json":
        root = image_root or input_folder(path)
        name = path.resolve().name if path.is_dir() else path.stem.replace("*", "")
        yield DataSetToCheck(name, root, open_source(path))
        return
    for name, entry in _entries(path):
        found = DataSetToCheck(name, image_root or path.parent)
        _open_entry(found, entry, path, image_root)
        yield found


def _entries(path: Path) -> list[tuple[str, Any]]:
    """The entries of a meta.json, names that come twice included."""
    try:
        entries = json.loads(path.read_bytes(), object_pairs_hook=_Pairs)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(entries, _Pairs) or not entries:
        raise DataError(f"{path}: expected {{name: {{root, annotation, ...}}}}")
    return entries


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written, key by key."""


def _open_entry(found: DataSetToCheck, entry: object, meta: Path, image_root: Path | None) -> None:
    if not isinstance(entry, _Pairs):
        found.faults.append(f"its entry is {entry!r}, expected {{root, annotation, ...}}")
        return
    facts = dict(entry)
    _check_root(found, facts, meta, image_root)
    _check_repeat(found, facts)
    if facts.get("data_augment"):
        found.faults.append(
            f"data_augment is {facts['data_augment']!r}, which is not supported here; give false"
        )
    tiles = facts.get("max_dynamic_patch")
    if tiles is None or (type(tiles) is int and tiles >= 1):
        found.max_tiles = tiles
    else:
        found.faults.append(f"max_dynamic_patch is {tiles!r}; give a whole number, 1 or more")
    annotation = facts.get("annotation")
    if not isinstance(annotation, str) or not annotation:
        found.faults.append("it has no 'annotation' path")
        return
    if not annotation.endswith("jsonl"):
        found.notes.append("annotation: InternVL's own trainer reads only *.jsonl")
    place = meta_place(meta, annotation)
    try:
        found.source = open_source(place)
    except DataError as error:
        found.faults.append(f"annotation: {error}")
        return
    length = facts.get("length")
    if length != len(found.source):
        found.notes.append(f"length is {length!r}, and the file has {len(found.source)} rows")


def _check_root(
    found: DataSetToCheck, facts: dict[str, Any], meta: Path, image_root: Path | None
) -> None:
    root = facts.get("root")
    if root is None:
        found.notes.append("it has no 'root', without which InternVL's own trainer stops")
    elif not isinstance(root, str):
        found.faults.append(f"root is {root!r}, expected the folder that image paths start from")
        return
    if image_root is None:
        found.root = meta_place(meta, root or "")
        if not found.root.is_dir():
            found.notes.append(f"root {found.root}: no such folder")


def _check_repeat(found: DataSetToCheck, facts: dict[str, Any]) -> None:
    repeat = facts.get("repeat_time", 1)
    if "repeat_time" not in facts:
        found.notes.append("it has no 'repeat_time', without which InternVL's own trainer stops")
    if type(repeat) not in (int, float) or not 0 <= repeat < math.inf:
        found.faults.append(f"repeat_time is {repeat!r}; give a number of 0 or more")
        return
    found.repeat = float(repeat)
    if repeat == 0:
        found.notes.append("repeat_time is 0: none of it is trained on")
    elif repeat > 1 and repeat != int(repeat):
        found.notes.append(
            f"repeat_time is {repeat}: InternVL's own trainer takes it {int(repeat)} time(s), "
            "the trainers here a fraction of it once more"
        )
