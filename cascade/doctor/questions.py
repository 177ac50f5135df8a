"""Questions out of whatever a recipe trains on, for the checks that ask the model something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cascade.doctor.data import Scanned
from internvl.data import IMAGE_PLACEHOLDER, Row
from internvl.data.rows import look_at_images

_PLENTY = 4  # times as many rows are looked at: some have pictures that are broken


def as_questions(scanned: Scanned, most: int) -> list[Row]:
    """At most so many rows as questions, those with the most pictures' tiles among them.

    Of a conversation its first turn is asked, where it holds all of the row's pictures.
    """
    found = []
    for number in scanned.sample(_PLENTY * most):
        row = _as_question(scanned.rows[number])
        if row is not None and look_at_images(row)[0] is None:
            found.append(row)
        if len(found) == most:
            break
    return found


def _as_question(row: Row) -> Row | None:
    data: dict[str, Any] = {**row.data}
    turns = data.pop("conversations", None)
    if turns is not None:
        data["question"], data["answer"] = turns[0]["value"], turns[1]["value"]
    for name in ("chosen", "rejected"):
        data.pop(name, None)
    if data.pop("history", None):
        return None
    if not row.num_frames and len(row.images) != data["question"].count(IMAGE_PLACEHOLDER):
        return None
    return replace(row, data=data)
