"""Records in and out: JSONL and MMPR `meta.json`, with a quarantine for what cannot be used.

    file -> read_rows -> [Row]  -> check_images -> [Row] -> a stage
                 \\                     \\
                  `--- quarantine.jsonl: {"file", "line", "reason", "row"} ---'

One JSON object a line; a question, pair or conversation may carry a "system" prompt; fields that
are not named here are kept and passed through.

    question      {"id": "q7", "image": "a.png", "question": "<image>\\nHow many?", "answer": "3"}
    rollout       question + {"sample": 0, "completion": "...", "token_ids": [...], ...}
    verdict       rollout + {"outcome": "correct", "extracted": "3", "score": 1.0, ...}
    pair          {"id": "q7-0", "image": "a.png", "question": "<image>\\n...",
                   "chosen": "...", "rejected": "...", "answer_gt": "3"}
    conversation  {"id": "s1", "image": "a.png", "conversations":
                   [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from internvl.checks import check_images as check_images
from internvl.checks import usable_rows as usable_rows
from internvl.errors import DataError
from internvl.images import MAX_IMAGE_PIXELS as MAX_IMAGE_PIXELS
from internvl.images import image_size as image_size
from internvl.images import load_image as load_image
from internvl.jsonl import append_jsonl as append_jsonl
from internvl.jsonl import dump_line as dump_line
from internvl.jsonl import write_json as write_json
from internvl.jsonl import write_jsonl as write_jsonl
from internvl.quarantine import Quarantine as Quarantine
from internvl.records import IMAGE_PLACEHOLDER as IMAGE_PLACEHOLDER
from internvl.records import Kind as Kind
from internvl.records import RecordFault as RecordFault
from internvl.records import find_fault as find_fault
from internvl.records import record_key, tidy_record
from internvl.rows import Row as Row
from internvl.rows import image_fault as image_fault


def _read_jsonl(path: Path, root: Path, kind: Kind, quarantine: Quarantine) -> Iterator[Row]:
    seen: dict[tuple[object, ...], int] = {}
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                data = json.loads(raw)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
                shown = raw[:500].decode("utf-8", "replace")
                quarantine.add(path, number, f"not valid JSON: {error}", shown)
                continue
            if isinstance(data, dict):
                data = tidy_record(data, kind)
            fault = find_fault(data, kind)
            if fault is None and (key := record_key(data, kind)) is not None:
                if key in seen:
                    fault = f"the id of line {seen[key]} again: {data['id']!r}"
                seen.setdefault(key, number)
            if fault is None:
                yield Row(data, path, number, root)
            else:
                quarantine.add(path, number, fault, data)


def _annotations(path: Path, image_root: Path | None) -> Iterator[tuple[Path, Path, float]]:
    """(annotation file, image root, repeat_time) for a JSONL file or an MMPR `meta.json`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix != ".json":
        yield path, image_root or path.parent, 1.0
        return
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"{path}: expected {{name: {{root, annotation, ...}}}}")
    for name, entry in meta.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise DataError(f"{path}: data set {name!r} has no 'annotation' path")
        annotation = path.parent / entry["annotation"]
        if not annotation.is_file():
            raise DataError(f"{path}: data set {name!r}: {annotation}: no such file")
        for option in ("data_augment", "max_dynamic_patch"):
            if entry.get(option):
                raise DataError(
                    f"{path}: data set {name!r}: {option} is {entry[option]!r}, which is not "
                    "supported here; take it out (the tile budget is the option max_tiles)"
                )
        root = image_root or path.parent / entry.get("root", "")
        yield annotation, root, float(entry.get("repeat_time", 1))


def read_rows(
    path: Path | str,
    *,
    kind: Kind,
    quarantine: Quarantine,
    image_root: Path | None = None,
) -> list[Row]:
    """Read a JSONL file, or every data set of an MMPR `meta.json`, and put bad rows aside.

    image_root: where relative image paths start; by default the JSONL file's own folder, or the
    `root` of meta.json. `repeat_time` r repeats a data set int(r) times and takes the first
    fraction of it once more (MMPR's meaning: 0.5 takes the first half).
    Raises `DataError` when a file is missing, when more rows are bad than the quarantine allows,
    or when no row is left.
    """
    path = Path(path)
    rows: list[Row] = []
    read = 0
    for annotation, root, repeat in _annotations(path, image_root):
        bad_before = quarantine.count
        part = list(_read_jsonl(annotation, root, kind, quarantine))
        read += len(part) + quarantine.count - bad_before
        whole = int(repeat)
        rows.extend(part * whole + part[: round((repeat - whole) * len(part))])
    quarantine.check(read)
    if not rows:
        raise DataError(f"{path}: no usable {kind} row ({read} read)")
    return rows
