"""What trainers read: MMPR's own files, and the columns of TRL's DPOTrainer.

    mmpr   JSONL lines {image, question, chosen, rejected, answer_gt} and their entry in a meta.json
           {name: {root, annotation, data_augment, repeat_time, length}}, as InternVL publishes it.
           Its trainer opens `annotation` (which must end in "jsonl") and `root` from the folder
           that it is started in: start it in meta.json's. `image` is a path from `root`, a list of
           them, or absent (never null, at which that trainer takes another row at random).
    trl    parquet with prompt, chosen, rejected (messages whose content is a list of parts, so that
           an image keeps its place in the text) and images (`datasets.Image`): absolute paths, or
           the files' bytes. `datasets.load_dataset("parquet", data_files=...)` gives pictures.

A chat template writes a line break after each image part, so that one behind "<image>" is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import (
    IMAGE_PLACEHOLDER,
    Quarantine,
    Row,
    portable_record,
    write_json,
    write_jsonl,
)
from internvl.errors import DataError

if TYPE_CHECKING:
    import datasets

_ROWS_A_GROUP = 1000  # of a parquet file; so many are in memory


# ---------------------------------------------------------------- MMPR's own


def enter_in_meta(
    meta: Path,
    name: str,
    annotation: Path,
    root: Path,
    length: int,
    *,
    repeat_time: float = 1,
    max_tiles: int | None = None,
) -> None:
    """Add a data set to an MMPR meta.json, or replace the one of that name; others stay.

    Paths are written relative to meta.json's folder, as `internvl.data` reads them.
    Raises DataError when the file is there and is no meta.json.
    """
    entries: dict[str, object] = {}
    if meta.exists():
        try:
            entries = json.loads(meta.read_bytes())
        except ValueError as error:
            raise DataError(f"{meta}: not valid JSON: {error}") from None
        if not isinstance(entries, dict):
            raise DataError(f"{meta}: expected {{name: {{root, annotation, ...}}}}")
    folder = meta.resolve().parent
    entry: dict[str, object] = {
        "root": os.path.relpath(root.resolve(), folder),
        "annotation": os.path.relpath(annotation.resolve(), folder),
        "data_augment": False,
        "repeat_time": int(repeat_time) if repeat_time == int(repeat_time) else repeat_time,
        "length": length,
    }
    if max_tiles is not None:
        entry["max_dynamic_patch"] = max_tiles
    entries[name] = entry
    write_json(meta, entries)


def write_data_set(
    folder: Path,
    name: str,
    rows: Iterable[Row],
    root: Path,
    *,
    stored: bool,
    repeat_time: float = 1,
    max_tiles: int | None = None,
) -> int:
    """Write rows as `folder/annotations/NAME.jsonl` and enter them in `folder/meta.json`.

    root: where the rows' image paths start. stored: write the images themselves, too, into
    `folder/images` (rows whose images are bytes cannot do without). Returns the number of rows.
    """
    annotation = folder / "annotations" / f"{name}.jsonl"
    count = write_jsonl(annotation, (_mmpr_record(row, folder, stored) for row in rows))
    enter_in_meta(
        *(folder / "meta.json", name, annotation, folder if stored else root, count),
        repeat_time=repeat_time,
        max_tiles=max_tiles,
    )
    return count


def _mmpr_record(row: Row, folder: Path, stored: bool) -> dict[str, Any]:
    """The record as InternVL's trainer reads it: no null, no empty image."""
    row = replace(row, max_tiles=None)  # meta.json says it of the whole data set
    if stored and row.images:
        whole = [s if isinstance(s, bytes) else s.read_bytes() for s in row.image_sources()]
        image = whole if isinstance(row.data["image"], list) else whole[0]
        row = replace(row, data={**row.data, "image": image})
    record = portable_record(row, folder / "meta.json")
    return {key: value for key, value in record.items() if value is not None}


# ---------------------------------------------------------------- TRL's


def trl_features() -> datasets.Features:
    """The columns of TRL's conversational preference data with images."""
    import datasets

    text = datasets.Value("string")
    message = {"role": text, "content": datasets.List({"type": text, "text": text})}
    return datasets.Features(
        {
            "prompt": datasets.List(message),
            "chosen": datasets.List(message),
            "rejected": datasets.List(message),
            "images": datasets.List(datasets.Image()),
        }
    )


def content_parts(text: str) -> list[dict[str, str | None]]:
    r"""A question as a message's parts; the line break behind an image is the template's.

    >>> content_parts("<image>\nHow many?")
    [{'type': 'image', 'text': None}, {'type': 'text', 'text': 'How many?'}]
    """
    parts: list[dict[str, str | None]] = []
    for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image", "text": None})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def trl_record(row: Row, *, embed: bool) -> dict[str, Any]:
    """A pair's row as TRL reads it; embed: the images' bytes instead of absolute paths.

    Raises DataError for a video, and for an image file that is not there or outside its root.
    """
    row.check_paths()
    if row.num_frames:
        raise DataError("a pair with a video, which the trl format cannot hold")
    images: list[dict[str, bytes | str | None]] = []
    for source in row.image_sources():
        if isinstance(source, Path) and not source.is_file():
            raise DataError(f"{source}: no such image")
        if isinstance(source, bytes):
            images.append({"bytes": source, "path": None})
        elif embed:
            images.append({"bytes": source.read_bytes(), "path": source.name})
        else:
            images.append({"bytes": None, "path": str(source.resolve())})
    system = row.data.get("system")
    turns = [("system", [{"type": "text", "text": system}])] if system else []
    for turn in row.data.get("history") or []:
        said = turn["value"]
        if turn["from"] == "human":
            turns.append(("user", content_parts(said)))
        else:
            turns.append(("assistant", [{"type": "text", "text": said}]))
    turns.append(("user", content_parts(row.data["question"])))
    record = {"prompt": [{"role": role, "content": parts} for role, parts in turns]}
    for name in ("chosen", "rejected"):
        said = [{"type": "text", "text": row.data[name]}]
        record[name] = [{"role": "assistant", "content": said}]
    return {**record, "images": images}


def write_trl(path: Path, rows: Iterable[Row], quarantine: Quarantine, *, embed: bool) -> int:
    """Write pairs as a parquet file for TRL, whole or not at all; returns their number.

    embed: see `trl_record`; rows that it refuses go to the quarantine.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = trl_features().arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(partial, schema) as out:
        for row in rows:
            try:
                waiting.append(trl_record(row, embed=embed))
            except DataError as error:
                quarantine.add(row.file, row.line, str(error), row.data)
                continue
            count += 1
            if len(waiting) == _ROWS_A_GROUP:
                out.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        out.write_table(pa.Table.from_pylist(waiting, schema))
    partial.replace(path)
    return count
