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
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from internvl.errors import DataError
from internvl.images import MAX_IMAGE_PIXELS as MAX_IMAGE_PIXELS
from internvl.images import image_size as image_size
from internvl.images import load_image as load_image

Kind = Literal["question", "rollout", "verdict", "pair", "conversation"]
RecordFault = Callable[[dict[str, Any]], str | None]
IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Row:
    """One record and where it came from.

    data: the JSON object. file, line: its origin (line counts from 1). image_root: the folder
    that relative image paths start from, and that no path may leave.
    """

    data: dict[str, Any]
    file: Path
    line: int
    image_root: Path

    @property
    def images(self) -> list[str]:
        """The image paths as written in the record (a string, a list, or absent)."""
        value = self.data.get("image")
        if value is None:
            return []
        return [value] if isinstance(value, str) else list(value)

    def image_paths(self) -> list[Path]:
        """The image paths on disk."""
        return [self.image_root / name for name in self.images]


class Quarantine:
    """Where rows go that cannot be used: one JSON line each, and too many of them stop the run.

    path: the file to append to (None: count only). max_bad: the share of rows (< 1) or the number
    of rows (>= 1) that may be bad before `check` raises.
    """

    def __init__(self, path: Path | None, max_bad: float = 0.05):
        if max_bad < 0:
            raise DataError(f"max_bad is {max_bad}; give a share (< 1) or a count (>= 1)")
        self.path = path
        self.max_bad = max_bad
        self.count = 0
        self._seen: set[tuple[str, int]] = set()

    def add(self, file: Path, line: int, reason: str, row: object) -> None:
        """Put one row aside with the reason; a row is counted and written once."""
        if (str(file), line) in self._seen:
            return
        self._seen.add((str(file), line))
        self.count += 1
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"file": str(file), "line": line, "reason": reason, "row": row}
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def check(self, total: int) -> None:
        """Raise `DataError` when more rows are bad than `max_bad` allows of `total`."""
        limit = self.max_bad * total if self.max_bad < 1 else self.max_bad
        if self.count > limit:
            where = f"; their reasons are in {self.path}" if self.path else ""
            raise DataError(
                f"{self.count} of {total} rows are bad, more than max_bad={self.max_bad:g} "
                f"allows{where}. Mend them, or raise max_bad."
            )


def _text(row: dict[str, Any], field: str, *, empty: bool = False) -> str | None:
    value = row.get(field)
    if not isinstance(value, str):
        return f"field {field!r} is {type(value).__name__}, expected a string"
    if not empty and not value.strip():
        return f"field {field!r} is empty"
    return None


def _question_fault(row: dict[str, Any]) -> str | None:
    answer = row.get("answer")
    if isinstance(answer, list):
        if not answer or not all(isinstance(item, str) for item in answer):
            return "field 'answer' is not a list of strings"
    elif not isinstance(answer, str):
        return f"field 'answer' is {type(answer).__name__}, expected a string or a list of strings"
    return _text(row, "id") or _text(row, "question")


def _rollout_fault(row: dict[str, Any]) -> str | None:
    if not isinstance(row.get("sample"), int):
        return "field 'sample' is not an integer"
    return _question_fault(row) or _text(row, "completion", empty=True)


def _verdict_fault(row: dict[str, Any]) -> str | None:
    return _rollout_fault(row) or _text(row, "outcome")


def _pair_fault(row: dict[str, Any]) -> str | None:
    fault = _text(row, "question") or _text(row, "chosen") or _text(row, "rejected")
    if fault is None and row["chosen"] == row["rejected"]:
        return "chosen and rejected are identical"
    return fault


def _conversation_fault(row: dict[str, Any]) -> str | None:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        return "field 'conversations' is not a list of human and gpt turns, two at a time"
    for index, turn in enumerate(turns):
        speaker = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            return f"turn {index} of 'conversations' is not from {speaker!r}"
        if fault := _text(turn, "value"):
            return f"turn {index} of 'conversations': {fault}"
    return None


_FAULTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "question": _question_fault,
    "rollout": _rollout_fault,
    "verdict": _verdict_fault,
    "pair": _pair_fault,
    "conversation": _conversation_fault,
}


def _prompt_text(row: dict[str, Any], kind: Kind) -> str:
    if kind == "conversation":
        return "".join(turn["value"] for turn in row["conversations"][::2])
    return row["question"]


def find_fault(row: object, kind: Kind) -> str | None:
    """What is wrong with a record of this kind, in words, or None."""
    if not isinstance(row, dict):
        return f"the line is a JSON {type(row).__name__}, expected an object"
    image = row.get("image")
    listed = isinstance(image, list) and all(isinstance(name, str) for name in image)
    if not (image is None or isinstance(image, str) or listed):
        return "field 'image' is neither a path nor a list of paths"
    if row.get("video"):
        return "field 'video': videos are not supported yet"
    if not isinstance(row.get("system", ""), str):
        return f"field 'system' is {type(row['system']).__name__}, expected a string"
    if fault := _FAULTS[kind](row):
        return fault
    images = 0 if image is None else 1 if isinstance(image, str) else len(image)
    placeholders = _prompt_text(row, kind).count(IMAGE_PLACEHOLDER)
    if images != placeholders:
        return f"{images} image(s) but {placeholders} {IMAGE_PLACEHOLDER} placeholder(s)"
    return None


def _key(row: dict[str, Any], kind: Kind) -> tuple[object, ...] | None:
    """What must be unique in a file: the id (rollouts: with the sample's number).

    Nothing is looked up by a conversation's id, and published sets repeat theirs.
    """
    if "id" not in row or kind == "conversation":
        return None
    return (row["id"], row["sample"]) if kind in ("rollout", "verdict") else (row["id"],)


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
            fault = find_fault(data, kind)
            if fault is None and (key := _key(data, kind)) is not None:
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


def image_fault(row: Row) -> str | None:
    """Why one of a row's images cannot be used, or None; decodes each image fully."""
    for path in row.image_paths():
        root = os.path.realpath(row.image_root)
        if not os.path.realpath(path).startswith(root + os.sep):
            return f"{path}: outside its root {row.image_root}"
        try:
            load_image(path)
        except DataError as error:
            return str(error)
    return None


def check_images(
    rows: Sequence[Row], *, quarantine: Quarantine, record_fault: RecordFault | None = None
) -> list[Row]:
    """The rows whose images all decode; the others go to the quarantine.

    record_fault: what the caller itself finds wrong with a record, or None.
    Raises `DataError` when the quarantine holds more than it allows, or no row is left.
    """
    from tqdm import tqdm

    def fault_of(row: Row) -> str | None:
        return (record_fault(row.data) if record_fault else None) or image_fault(row)

    good = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        faults = pool.map(fault_of, rows, chunksize=64)
        for row, fault in zip(tqdm(rows, desc="checking images", delay=2), faults, strict=False):
            if fault is None:
                good.append(row)
            else:
                quarantine.add(row.file, row.line, fault, row.data)
    quarantine.check(len(rows))
    if not good and rows:
        raise DataError(f"{rows[0].file}: no row with usable images is left")
    return good


def dump_line(record: dict[str, Any]) -> str:
    """One record as one line of JSONL, newline included."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records whole or not at all (a temporary file, then a rename); returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(dump_line(record))
            count += 1
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
    return count


def write_json(path: Path, value: object) -> None:
    """Write one JSON document whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


@contextmanager
def append_jsonl(path: Path) -> Iterator[TextIO]:
    """Open a JSONL file to append; flushed and synced to disk on leaving."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
