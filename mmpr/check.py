"""A data set of pairs in MMPR's format, row by row: what is bad, and what is only worth knowing.

    meta.json, JSONL, parquet -> data sets -> every row: record, texts, images, length, duplicate
                                                 |-> good     (written elsewhere by --fix)
                                                 `-> bad      quarantine: file, line, reason

Bad is what no trainer here takes. A note is what trainers read differently or mend: InternVL's own
puts "<image>" in front of a question with one image as ours do, but not where that image is in a
list; it takes another row at random for `"image": null`; it reads no image bytes. Every row is
counted once: rows = good + bad, for each data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import IMAGE_PLACEHOLDER, Quarantine, Row, find_fault
from internvl.data.records import tidy_record
from internvl.data.rows import Sizes, look_at_images
from internvl.data.sources import Source
from internvl.errors import DataError
from mmpr.check_meta import DataSetToCheck

if TYPE_CHECKING:
    from internvl.encoding import Encoder

_AT_ONCE = 256  # rows that are in memory together
_REMEMBERED = 4096  # images that need not be decoded again
# where no tokenizer is asked: InternVL's own, as in all its checkpoints
_CONTROL = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|</?img>|<IMG_CONTEXT>|<\|begin_of_text\|>"
)
_TEXTS = ("system", "question", "chosen", "rejected")
# a reason's kind, by its words: the first that matches
_KINDS = tuple(
    (re.compile(words), kind)
    for words, kind in (
        (r"^not valid JSON|^the line is a JSON|^a cell cannot be read", "not a record"),
        (r"decompression bomb|over the limit of \d+ a side", "image too large"),
        (r"outside its root", "path outside its root"),
        (r"is not a path|: not a path: ", "not a path"),
        (r"no such (image|video)|: not a file|: cannot be read", "missing image or video"),
        (r"placeholder\(s\)$", "placeholders differ from images"),
        (r"are identical$|differ only in white space", "identical pair"),
        (r"^the same pair as line", "duplicate"),
        (r"control token", "control token"),
        (r"over max_length", "too long"),
        (r"^field '\w+' is empty$|surrogate pair", "no text"),
        (r"^field |^both 'image' and 'video'", "wrong field"),
        (
            r"corrupt|empty file|not an image that|nothing in it|of 16 bits|a known scale"
            r"|are known$|truncated|no frame images|: \d+ frames, expected",
            "corrupt image or video",
        ),
        (r"", "other"),
    )
)


@dataclass
class SetReport:
    """What was found in one data set; bad and notes: rows by kind. good: the good rows' numbers.

    has_bytes: whether a good row's images are bytes. faults: of its entry in meta.json.
    """

    name: str
    rows: int = 0
    good: array[int] = field(default_factory=lambda: array("q"))
    bad: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    entry_notes: list[str] = field(default_factory=list)
    has_bytes: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "rows": self.rows,
            "good": len(self.good),
            "bad": dict(self.bad),
            "notes": dict(self.notes),
            "faults": self.faults,
            "entry_notes": self.entry_notes,
        }


def kind_of(reason: str) -> str:
    """The kind of a reason, as it is counted.

    >>> kind_of("field 'chosen' is empty")
    'no text'
    """
    return next(kind for words, kind in _KINDS if words.search(reason))


def text_fault(record: dict[str, Any]) -> str | None:
    """What is wrong with the texts of a whole pair, besides what `find_fault` finds, or None."""
    if record["chosen"].split() == record["rejected"].split():
        return "chosen and rejected differ only in white space"
    texts = [(name, record.get(name) or "") for name in _TEXTS]
    texts += [("history", turn["value"]) for turn in record.get("history") or []]
    for name, text in texts:
        if found := _CONTROL.search(text):
            return f"{name} holds the control token {found[0]!r}"
    return None


def row_notes(raw: dict[str, Any]) -> list[str]:
    """What is worth knowing of a good row as it was written."""
    notes = []
    image = raw.get("image", raw.get("images"))
    if image == "":
        notes.append('"image": "" is taken as no image')
    if image is None and ("image" in raw or "images" in raw):
        notes.append("image is null: InternVL's own trainer takes another row for it")
    if image and IMAGE_PLACEHOLDER not in raw["question"]:
        if isinstance(image, list):
            notes.append("no <image> for a list of one: InternVL's own trainer fails on it")
        else:
            notes.append("<image> is put in front of the question")
    items = image if isinstance(image, list) else [image]
    if any(isinstance(item, bytes | dict) for item in items):
        notes.append("image bytes: InternVL's own trainer reads paths only")
    return notes


@dataclass(frozen=True)
class _Looked:
    """A row that was looked at: as it was written, as it is read, what is wrong with it."""

    raw: Any
    row: Row
    fault: str | None
    sizes: Sizes


def read_row(source: Source, number: int, root: Path, max_tiles: int | None) -> tuple[Row, Any]:
    """A row, tidy, with what is wrong with its record; and the record as it was written."""
    raw, fault = source.read(number)
    record = raw
    if fault is None and isinstance(raw, dict):
        record = tidy_record(raw, "pair", image_in_front=source.image_in_front)
    fault = fault or find_fault(record, "pair") or text_fault(record)
    data = record if isinstance(record, dict) else {"line": record}
    return Row(data, *source.origin(number), root, max_tiles, fault), raw


def _look(found: DataSetToCheck, source: Source) -> Iterator[_Looked]:
    """Every row in order, its images decoded in threads."""

    seen: dict[tuple[str, ...], tuple[str | None, Sizes]] = {}  # pairs of a question share them

    def look(number: int) -> _Looked:
        row, raw = read_row(source, number, found.root, found.max_tiles)
        paths = tuple(str(image) for image in row.images) if row.fault is None else ()
        if not paths or any(isinstance(image, bytes) for image in row.images):
            return _Looked(raw, row, *look_at_images(row))
        result = seen.get(paths)
        if result is None:
            result = look_at_images(row)
            if len(seen) >= _REMEMBERED:
                seen.clear()
            seen[paths] = result
        return _Looked(raw, row, *result)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(source), _AT_ONCE):
            yield from pool.map(look, range(start, min(start + _AT_ONCE, len(source))))


class Checker:
    """Checks data sets one by one; duplicates are looked for in all of them.

    encoder: counts lengths and knows the checkpoint's control tokens (None: neither). total: rows
    of all data sets, of which the quarantine's share is taken.
    """

    def __init__(self, quarantine: Quarantine, total: int, encoder: Encoder | None = None):
        self._quarantine = quarantine
        self._total = total
        self._encoder = encoder
        self._elsewhere: set[int] = set()  # pairs of other data sets

    def check(self, found: DataSetToCheck, report: SetReport, bar: Any) -> None:
        """Check every row of a data set; bar: a progress bar.

        Raises `DataError` when the quarantine holds more than it allows, `report` being what was
        found until then.
        """
        assert found.source is not None
        lines: dict[int, int] = {}
        ids: set[str] = set()
        for number, looked in enumerate(_look(found, found.source)):
            report.rows += 1
            bar.update()
            fault = looked.fault or self._late_fault(looked)
            key = 0
            if fault is None:
                key = _pair_key(looked.row)
                first = lines.setdefault(key, looked.row.line)
                if first != looked.row.line:
                    fault = f"the same pair as line {first}: image, question and both replies"
            if fault is not None:
                shown = replace(looked.row, fault=None).data if looked.row.data else looked.raw
                report.bad[kind_of(fault)] += 1
                self._quarantine.add(looked.row.file, looked.row.line, fault, shown)
                self._quarantine.check(self._total)
                continue
            report.good.append(number)
            report.has_bytes |= any(isinstance(image, bytes) for image in looked.row.images)
            report.notes.update(row_notes(looked.raw))
            report.notes["the same pair in another data set"] += key in self._elsewhere
            row_id = looked.row.data.get("id")
            report.notes["an id that came before"] += row_id is not None and str(row_id) in ids
            ids.add(str(row_id))
        self._elsewhere.update(lines)
        report.notes = +report.notes
        assert report.rows == len(report.good) + report.bad.total()

    def _late_fault(self, looked: _Looked) -> str | None:
        """What the checkpoint's tokenizer says of a row; asked in one thread."""
        if self._encoder is None:
            return None
        try:
            return self._encoder.length_fault(looked.row, "pair", sizes=looked.sizes)
        except DataError as error:
            return str(error)


def _pair_key(row: Row) -> int:
    """A 64-bit number of a pair's images and texts."""
    digest = hashlib.sha256()
    for source in row.image_sources():
        digest.update(source if isinstance(source, bytes) else os.fsencode(source))
        digest.update(b"\0")
    texts = [row.data.get(name) or "" for name in ("video", *_TEXTS)]
    digest.update("\0".join(texts).encode())
    more = [row.data.get(name) for name in ("history", "num_frames")]
    digest.update(json.dumps(more, sort_keys=True).encode())
    return int.from_bytes(digest.digest()[:8], "big")
