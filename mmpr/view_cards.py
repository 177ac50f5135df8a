"""What a page shows of a record: plain data, which the template only lays out.

a pair                   -> its pictures, question, chosen | rejected with their difference
a question's rollouts    -> its pictures, question, every completion with what became of it
a question               -> its pictures, question, answer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Row, load_image
from internvl.data.rows import path_fault
from internvl.errors import DataError
from internvl.thumbnails import THUMBNAIL_BYTES, THUMBNAIL_SIDE, Thumbnail, make_thumbnail
from mmpr.token_counts import picture_budget
from mmpr.view_draw import is_mixed
from mmpr.view_marks import Marked, Run, cut_text, mark_difference, mark_slots

if TYPE_CHECKING:
    from PIL import Image

MOST_PICTURES = 8  # of a record; the others are counted
FEW_WORDS = 6  # that differ: hardly any


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are cut and shown: see `make_thumbnail`. max_tiles: of a whole prompt."""

    max_tiles: int = 12
    tile_size: int = 448
    side: int = 512


@dataclass(frozen=True)
class Broken:
    """A picture that cannot be shown, and why."""

    reason: str


@dataclass(frozen=True)
class Said:
    """One completion. facts: (name, value) of what is known of it."""

    runs: list[Run]
    outcome: str
    extracted: str | None
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """One item of the page.

    kinds: what the filter by kind finds it by. only: further filters that it passes. where: its
    file and line. more_pictures: how many are not shown. facts: (name, value).
    """

    name: str
    data_set: str
    where: str
    question: list[Run]
    pictures: list[Thumbnail | Broken]
    more_pictures: int
    only: list[str]
    answers: list[str]
    system: str
    kinds: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    marked: Marked | None = None
    said: list[Said] = field(default_factory=list)


ONLY = {  # name in a link -> label
    "mixed": "some right, some wrong",
    "few": f"at most {FEW_WORDS} words differ",
    "longer": "chosen is longer",
    "shorter": "chosen is shorter",
    "reason": "a reason is given",
    "cut-off": "cut off at the length limit",
    "broken": "a picture cannot be read",
    "none": "no picture",
    "several": "several pictures",
    "video": "a video",
}


def make_card(rows: Sequence[Row], kind: str, settings: PictureSettings) -> Card:
    """The card of a record, or of all rollouts of a question."""
    row, data = rows[0], rows[0].data
    pictures, more = load_pictures(row, settings)
    card = Card(
        name=str(data.get("id") or ""),
        data_set=str(data["dataset"]),
        where=f"{row.file.name}:{row.line}",
        question=mark_slots(_asked(data)),
        system=str(data.get("system") or ""),
        pictures=pictures,
        more_pictures=more,
        only=_picture_filters(row, pictures),
        answers=_texts(data.get("answer_gt" if kind == "pair" else "answer")),
    )
    if kind == "pair":
        return _pair_card(card, data)
    if kind == "question":
        return replace(card, kinds=_texts(data.get("matcher")))
    return _rollout_card(card, [one.data for one in rows], judged=kind == "verdict")


def _asked(data: dict[str, Any]) -> str:
    """The question, below the turns before it where there are some."""
    before = [f"{turn['from']}: {turn['value']}" for turn in data.get("history") or []]
    return "\n\n".join([*before, f"human: {data['question']}"]) if before else data["question"]


def _pair_card(card: Card, data: dict[str, Any]) -> Card:
    marked = mark_difference(data["chosen"], data["rejected"])
    return replace(
        card,
        kinds=[str(data.get("kind") or "not said")],
        only=[*_pair_filters(data, marked), *card.only],
        facts=_lengths(data),
        marked=marked,
    )


def _rollout_card(card: Card, records: Sequence[dict[str, Any]], *, judged: bool) -> Card:
    said = [_said(record) for record in sorted(records, key=lambda record: record["sample"])]
    return replace(
        card,
        kinds=sorted({one.outcome for one in said}),
        only=[*_rollout_filters(records), *card.only],
        facts=[*(_right(said) if judged else [("completions", str(len(said)))]), *_model(records)],
        said=said,
    )


def _texts(value: object) -> list[str]:
    """A gold answer, or several, as text; an empty one is none."""
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if one is not None and one != ""]


def _lengths(data: dict[str, Any]) -> list[tuple[str, str]]:
    chosen, rejected = len(data["chosen"]), len(data["rejected"])
    difference = f"{chosen - rejected:+,}" if chosen != rejected else "equal"
    return [("characters", f"{chosen:,} and {rejected:,} ({difference})")]


def _right(said: Sequence[Said]) -> list[tuple[str, str]]:
    right = sum(one.outcome == "correct" for one in said)
    return [("right", f"{right} of {len(said)}")]


def _model(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    names = sorted({str(record["model"]) for record in records if record.get("model")})
    return [("model", ", ".join(names))] if names else []


def _said(data: dict[str, Any]) -> Said:
    """A completion; without a verdict its finish reason stands where the outcome does."""
    facts = [(name, str(data[name])) for name in ("matcher", "reason") if data.get(name)]
    if data.get("score") not in (None, 0, 1):
        facts.append(("score", f"{data['score']:.2f}"))
    if data.get("format_ok") is False and data.get("outcome") != "no_answer":
        facts.append(("format", "not followed"))
    if data.get("finish_reason") == "length":
        facts.append(("", "cut off at the length limit"))
    extracted = data.get("extracted")
    return Said(
        runs=cut_text(data["completion"]),
        outcome=str(data.get("outcome") or data.get("finish_reason") or "not said"),
        extracted=None if extracted is None else str(extracted),
        facts=[*facts, ("", f"{len(data['completion']):,} characters")],
    )


def _pair_filters(data: dict[str, Any], marked: Marked) -> list[str]:
    names = ["few"] if marked.words <= FEW_WORDS else []
    difference = len(data["chosen"]) - len(data["rejected"])
    return names + (["longer"] if difference > 0 else ["shorter"] if difference < 0 else [])


def _rollout_filters(records: Sequence[dict[str, Any]]) -> list[str]:
    passed = {
        "mixed": is_mixed([str(record.get("outcome")) for record in records]),
        "reason": any(record.get("reason") for record in records),
        "cut-off": any(record.get("finish_reason") == "length" for record in records),
    }
    return [name for name, passes in passed.items() if passes]


def _picture_filters(row: Row, pictures: Sequence[Thumbnail | Broken]) -> list[str]:
    passed = {
        "broken": any(isinstance(picture, Broken) for picture in pictures),
        "none": not pictures,
        "several": len(row.images) > 1,
        "video": row.num_frames > 0,
    }
    return [name for name, passes in passed.items() if passes]


def load_pictures(row: Row, settings: PictureSettings) -> tuple[list[Thumbnail | Broken], int]:
    """The first pictures of a row, or frames of its video, and how many more there are.

    Several are shown smaller, and share the bytes of one: so every card has its part of the page.
    """
    number = row.num_frames or len(row.images)
    if not number:
        return [], 0
    shown = min(number, MOST_PICTURES)
    side = settings.side if number == 1 else max(64, settings.side // 2)
    most_bytes = round(THUMBNAIL_BYTES * (settings.side / THUMBNAIL_SIDE) ** 2) // shown
    make = partial(make_thumbnail, tile_size=settings.tile_size, side=side, most_bytes=most_bytes)
    pictures: list[Thumbnail | Broken] = []
    if row.num_frames:
        try:
            frames = row.load_images()
        except DataError as error:
            return [Broken(str(error))], 0
        pictures += [make(frames[n * number // shown], max_tiles=None) for n in range(shown)]
        return pictures, number - shown
    budget = picture_budget(row, settings.max_tiles)
    for source in row.image_sources()[:shown]:
        try:
            pictures.append(make(_load(row, source), max_tiles=budget))
        except DataError as error:
            pictures.append(Broken(str(error)))
    return pictures, number - shown


def _load(row: Row, source: Path | bytes) -> Image.Image:
    """One picture of a row; the others may be shown though this one cannot be read."""
    if isinstance(source, Path) and (fault := path_fault(source, row.image_root)):
        raise DataError(fault)
    return load_image(source)
