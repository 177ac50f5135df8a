"""Matcher of lists and sets: the same items in any order."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rewards.reasons import CannotJudge, Options
from rewards.texts import normalise


def read_list(text: str) -> list[str]:
    """The items that a text lists: a JSON list, or text with separators."""
    text = text.strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list):
            return [str(item) for item in found]
    return [part.strip() for part in text.strip("[]{}").split(",") if part.strip()]


def is_list_of_lists(answer: Sequence[object]) -> bool:
    """Whether gold answers are several lists, rather than the items of one."""
    return any(not isinstance(item, str) or len(read_list(item)) > 1 for item in answer)


def match_list(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both hold the same items."""
    wanted = sorted(map(normalise, read_list(gold)))
    if not wanted:
        raise CannotJudge(f"gold answer {gold!r} lists nothing")
    return float(wanted == sorted(map(normalise, read_list(prediction))))
