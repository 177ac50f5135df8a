"""What the page shows of a rejected row: plain data, which the template only lays out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from internvl.data import Row, load_image
from internvl.data.rows import path_fault
from internvl.errors import DataError
from internvl.thumbnails import Thumbnail, make_thumbnail
from sft.data_tools.review import rules_of

MOST_PICTURES = 4
_MOST_SHOWN = 12_000  # characters of a turn
_SIDE, _MOST_BYTES = 400, 30_000  # of a picture on the page
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
_UNSEEN = re.compile(rf"[{_CONTROLS}\ud800-\udfff]")


class Run(NamedTuple):
    """A part of a text. kind: "plain", "marked", "slot" (a picture's place), "unseen", "more"."""

    text: str
    kind: str


@dataclass(frozen=True)
class Turn:
    """A turn with what was found in it marked."""

    speaker: str
    runs: list[Run]


@dataclass(frozen=True)
class Reason:
    """rule: its name; told: what it found; limit: the value beside the threshold."""

    rule: str
    told: str
    limit: str


@dataclass(frozen=True)
class Card:
    """A row. key: by which it is taken back. pictures: or why one cannot be shown."""

    key: str
    name: str
    data_set: str
    where: str
    rules: tuple[str, ...]
    reasons: list[Reason]
    facts: list[tuple[str, str]]
    system: list[Run]
    turns: list[Turn]
    pictures: list[Thumbnail | str]
    more_pictures: int


def make_card(entry: dict[str, Any], image_root: Path | None) -> Card:
    """The card of a line; image_root: instead of the one that the line names."""
    data = entry["row"]
    row = Row(data, Path(entry["file"]), entry["line"], image_root or Path(entry["image_root"]))
    reasons = entry.get("reasons", [])
    facts = [("domain", entry["domain"])] if entry.get("domain") else []
    facts += [(name, f"{score:g} of 10") for name, score in entry.get("scores", {}).items()]
    pictures, more = _load_pictures(row)
    return Card(
        key=entry["key"],
        name=str(data.get("id") or ""),
        data_set=str(entry.get("dataset") or ""),
        where=f"{row.file.name}:{row.line}",
        rules=rules_of(entry),
        reasons=[_reason(one) for one in reasons] or [Reason("undecided", entry["reason"], "")],
        facts=facts,
        system=mark_text(str(data.get("system") or ""), []),
        turns=[
            Turn(turn["from"], mark_text(turn["value"], _spans_of(number, reasons)))
            for number, turn in enumerate(data["conversations"])
        ],
        pictures=pictures,
        more_pictures=more,
    )


def _reason(one: dict[str, Any]) -> Reason:
    value, threshold = one["value"], one["threshold"]
    sign = ">" if value > threshold else "<"
    where = f", turn {one['turn']}" if "turn" in one else ""
    return Reason(one["rule"], one["told"], f"{value:g} {sign} {threshold:g}{where}")


def _spans_of(turn: int, reasons: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(s, e) for one in reasons if one.get("turn") == turn for s, e in one["spans"]]


def mark_text(text: str, spans: Sequence[tuple[int, int]]) -> list[Run]:
    """A text in runs: marked where a span lies, the places of pictures and unseen signs named.

    A long text is cut, but not before its first mark can be seen.

    >>> [tuple(run) for run in mark_text("<image> no no", [(8, 13)])]
    [('<image>', 'slot'), (' ', 'plain'), ('no no', 'marked')]
    """
    start = max(0, min((s for s, _ in spans), default=0) - _MOST_SHOWN // 2)
    start = 0 if len(text) <= _MOST_SHOWN else start
    end = min(len(text), start + _MOST_SHOWN)
    inside = bytearray(len(text))
    for first, last in spans:
        inside[first:last] = b"\1" * (min(last, len(text)) - first)
    runs = [Run(f"{start:,} characters before", "more")] if start else []
    place = start
    while place < end:
        stop = place
        while stop < end and inside[stop] == inside[place]:
            stop += 1
        runs += _named(text[place:stop], "marked" if inside[place] else "plain")
        place = stop
    return [*runs, Run(f"{len(text) - end:,} more characters", "more")] if end < len(text) else runs


def _named(text: str, kind: str) -> list[Run]:
    """A text of one kind, with pictures' places and unseen signs apart."""
    runs, place = [], 0
    for match in re.finditer(rf"<image>|<video>|{_UNSEEN.pattern}", text):
        if match.start() > place:
            runs.append(Run(text[place : match.start()], kind))
        slot = match.group() in ("<image>", "<video>")
        shown = match.group() if slot else f"U+{ord(match.group()):04X}"
        runs.append(Run(shown, "slot" if slot else "unseen"))
        place = match.end()
    return [*runs, Run(text[place:], kind)] if place < len(text) else runs


def _load_pictures(row: Row) -> tuple[list[Thumbnail | str], int]:
    """The first pictures, or frames, and how many more there are; a reason for one that fails."""
    number = row.num_frames or len(row.images)
    shown: list[Thumbnail | str] = []
    if row.num_frames:
        try:
            frames = row.load_images()[:MOST_PICTURES]
        except DataError as error:
            return [str(error)], 0
        shown += [_thumbnail(frame) for frame in frames]
        return shown, number - len(shown)
    for source in row.image_sources()[:MOST_PICTURES]:
        try:
            if isinstance(source, Path) and (fault := path_fault(source, row.image_root)):
                raise DataError(fault)
            shown.append(_thumbnail(load_image(source)))
        except DataError as error:
            shown.append(str(error))
    return shown, number - len(shown)


def _thumbnail(image: Any) -> Thumbnail:
    return make_thumbnail(image, max_tiles=None, side=_SIDE, most_bytes=_MOST_BYTES)
