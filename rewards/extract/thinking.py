"""Completions that think aloud first: <think> .. </think>, and <answer> .. </answer> after it."""

from __future__ import annotations

import re
from itertools import islice

_THINK = re.compile(r"<(/?)think(?:ing)?\s{0,3}>", re.IGNORECASE)
_ANSWER_OPENS = re.compile(r"<answer\s{0,3}>", re.IGNORECASE)
_ANSWER_CLOSES = re.compile(r"</?answer\s{0,3}>", re.IGNORECASE)
_MAX_TRIES = 32  # of words that look like a tag from the end, and are none


def _quoted(text: str, tag: re.Match[str]) -> bool:
    """Whether a tag is named as code, `<think>`, rather than used."""
    return text[tag.start() - 1 : tag.start()] == "`" == text[tag.end() : tag.end() + 1]


def _last_tag(text: str, low: str) -> re.Match[str] | None:
    """The last <think> or </think>; looked for from the end, for there may be a million."""
    stop = len(low)
    for _ in range(_MAX_TRIES):
        stop = low.rfind("think", 0, stop)
        if stop < 1:
            return None
        tag = _THINK.match(text, stop - 1) or _THINK.match(text, max(0, stop - 2))
        if tag and not _quoted(text, tag):
            return tag
    return None


def after_think(text: str, low: str) -> tuple[str | None, str | None]:
    """The text after the last </think>, and what is wrong with the thinking (None for nothing).

    The text is None while the thinking was never closed, and the whole text without any thinking.
    `low` is the text in lower case.
    """
    last = _last_tag(text, low)
    if last is None:
        return text, None
    if not last[1]:
        return None, "<think> is never closed"
    used = (tag for tag in islice(_THINK.finditer(text), _MAX_TRIES) if not _quoted(text, tag))
    tags = list(islice(used, 3))
    fault = None
    if all(tag[1] for tag in tags):
        fault = "</think> without <think>"
    elif len(tags) != 2:
        fault = "several <think> blocks"
    elif text[: tags[0].start()].strip(" \t\n*_`>#-+"):
        fault = "text before <think>"
    return text[last.end() :].strip(), fault


def in_answer_tag(text: str, low: str) -> tuple[str, str, bool] | None:
    """What the last <answer> holds, what follows it, and whether it is closed; None without one."""
    start = low.rfind("<answer")
    opening = _ANSWER_OPENS.match(text, start) if start >= 0 else None
    if opening is None:
        return None
    closing = _ANSWER_CLOSES.search(text, opening.end())
    if closing is None:
        return text[opening.end() :], "", False
    return text[opening.end() : closing.start()], text[closing.end() :], True
