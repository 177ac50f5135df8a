"""Completions that think aloud first: <think> .. </think>, and <answer> .. </answer> after it."""

from __future__ import annotations

import re

_THINK = re.compile(r"<(/?)think(?:ing)?\s{0,3}>", re.IGNORECASE)
_ANSWER = re.compile(r"<(/?)answer\s{0,3}>", re.IGNORECASE)


def _tags(text: str) -> list[re.Match[str]]:
    """The <think> and </think> of a text; one that is quoted as code, `<think>`, is none."""
    return [
        tag
        for tag in _THINK.finditer(text)
        if text[tag.start() - 1 : tag.start()] != "`" or text[tag.end() : tag.end() + 1] != "`"
    ]


def after_think(text: str) -> tuple[str | None, str | None]:
    """The text after the last </think>, and what is wrong with the thinking (None for nothing).

    The text is None while the thinking was never closed, and the whole text without any thinking.
    """
    tags = _tags(text)
    if not tags:
        return text, None
    if not tags[-1][1]:
        return None, "<think> is never closed"
    fault = None
    if all(tag[1] for tag in tags):
        fault = "</think> without <think>"
    elif len(tags) != 2:
        fault = "several <think> blocks"
    elif text[: tags[0].start()].strip(" \t\n*_`>#-+"):
        fault = "text before <think>"
    return text[tags[-1].end() :].strip(), fault


def in_answer_tag(text: str) -> tuple[str, str, bool] | None:
    """What the last <answer> holds, what follows it, and whether it is closed; None without one."""
    tags = list(_ANSWER.finditer(text))
    opening = max((n for n, tag in enumerate(tags) if not tag[1]), default=None)
    if opening is None:
        return None
    start = tags[opening].end()
    if opening + 1 == len(tags):
        return text[start:], "", False
    return text[start : tags[opening + 1].start()], text[tags[opening + 1].end() :], True
