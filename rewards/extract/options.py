r"""The options that a multiple-choice question lists.

    one a line      A. Paris · (A) Paris · A) Paris · A: Paris · A、Paris · - A. Paris
    in one line     A. Paris B. London C. Rome · (A) Paris (B) London
    announced       Options: A. Paris B. London · 选项: A. 巴黎 B. 伦敦

Labels run from A without a gap; the last such run counts. Initials ("A. Einstein met N. Bohr")
and pictures' parts ("in (A) and (B)") are no options. Linear in the question's length.
"""

from __future__ import annotations

import re
from itertools import pairwise

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LINE = re.compile(
    r"^[ \t]{0,12}(?:[-*+•>][ \t]{1,4})?[*_]{0,2}"
    r"(?:[(\[（]([A-Z])[)\]）][.:：、]?|([A-Z])[)）.:：、．])[*_]{0,2}[ \t]{0,8}(?![:：=])"
    r"(\S[^\n]*)?$",
    re.MULTILINE,
)
# In one line a label must stand apart from the word before it, and its mark from the next one.
_INLINE = (
    re.compile(r"(?<![\w)）])[(（\[]([A-Z])[)）\]][.:：]?\s{0,4}"),
    re.compile(r"(?<![\w(（\[.'’])([A-Z])[)）]\s{0,4}"),
    re.compile(r"(?<![\w(（\[.'’&-])([A-Z])[.．](?=\D)\s{0,4}|(?<![\w.])([A-Z])[.．](?=\d)"),
    re.compile(r"(?<![\w(（\[])([A-Z])[、:：]\s{0,4}"),
)
_ANNOUNCED = re.compile(
    r"(?:options?|choices|candidates|选项|選項|备选|[?？:：。.!！\n]|answers)[\s*_:：(（]{0,6}$",
    re.IGNORECASE,
)
_KEYWORD = re.compile(r"(?:options?|choices|选项|選項|备选)[\s*_:：(（]{0,6}$", re.IGNORECASE)
_NO_OPTION = re.compile(r"[\s,，;；]*(?:and|or|&|和|与|或|to|vs)?[\s,，;；.。]*$", re.IGNORECASE)
_GOES_ON = re.compile(r"(?:^|\s)(?:and|or|,)$", re.IGNORECASE)
_REQUEST = re.compile(
    r"(?:[.。;]?\s{1,3}|[。；])"
    r"(?:Please|Answer (?:with|the|by|using)|Choose|Select|Respond|Give|请)"
)
_FOLLOWING = dict(pairwise(_LETTERS))


def options_in(question: str) -> list[str] | None:
    r"""The options that a question lists, from A on; None where it lists no complete run of them.

    >>> options_in("Which city?\nA. Paris\nB. London")
    ['Paris', 'London']
    >>> options_in("Who was it, A. Einstein or N. Bohr?") is None
    True
    """
    if "A" not in question or "B" not in question:
        return None
    question = question.replace("\r\n", "\n")
    return _one_a_line(question) or _in_line(question)


def _one_a_line(question: str) -> list[str] | None:
    """Options that each begin a line; a text may stand in the line after its label."""
    labels = list(_LINE.finditer(question))
    start = max((n for n, m in enumerate(labels) if (m[1] or m[2]) == "A"), default=None)
    if start is None:
        return None
    labels = labels[start:]
    if len(labels) < 2 or not _LETTERS.startswith("".join(m[1] or m[2] for m in labels)):
        return None
    texts = []
    for n, label in enumerate(labels):
        text = label[3]
        if text is None:
            end = labels[n + 1].start() if n + 1 < len(labels) else len(question)
            text = question[label.end() : end].strip().partition("\n")[0]
        elif n + 1 == len(labels) and _next_inside(text, label):
            return None  # several in this line
        texts.append(_tidy(text))
    return texts if all(texts) else None


def _next_inside(text: str, label: re.Match[str]) -> bool:
    """Whether the label that should come next stands inside an option's own line."""
    letter = label[1] or label[2]
    mark = label[0].partition(letter)[2][:1]
    return f" {_FOLLOWING.get(letter)}{mark} " in f"{text} "


def _in_line(question: str) -> list[str] | None:
    """Options that stand one after the other in a line (or in several)."""
    for pattern in _INLINE:
        labels = [(m.start(), m.end(), m[m.lastindex or 1]) for m in pattern.finditer(question)]
        if run := _last_run(labels):
            texts = _texts_of(run, labels, question)
            if texts is not None:
                return texts
    return None


def _last_run(labels: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The labels from the last A on that run without a gap; [] when one is out of order."""
    start = max((n for n, label in enumerate(labels) if label[2] == "A"), default=None)
    if start is None:
        return []
    run = labels[start:]
    in_order = _LETTERS.startswith("".join(label[2] for label in run))
    return run if in_order and len(run) >= 2 else []


def _texts_of(
    run: list[tuple[int, int, str]], labels: list[tuple[int, int, str]], question: str
) -> list[str] | None:
    """The texts between the labels, or None when they are no options."""
    before = question[max(0, run[0][0] - 24) : run[0][0]]
    at_start = not before.strip() or before.rstrip(" \t").endswith("\n")
    if not at_start and not _ANNOUNCED.search(before) and len(run) < 3:
        return None
    ends = [label[0] for label in run[1:]] + [len(question)]
    texts = [question[label[1] : end] for label, end in zip(run, ends, strict=True)]
    texts[-1] = texts[-1].strip().partition("\n")[0]
    texts[-1] = (
        texts[-1][: request.start()] if (request := _REQUEST.search(texts[-1])) else texts[-1]
    )
    if any(_NO_OPTION.match(text) for text in texts):
        return None
    if any(_GOES_ON.search(text.strip()) for text in texts[:-1]):
        return None  # "A. Einstein and B. Podolsky"
    by_commas = all(text.rstrip().endswith((",", "，")) for text in texts[:-1])
    if by_commas and len(run) < 3 and not _KEYWORD.search(before):
        return None  # "A. Einstein, B. Podolsky wrote"
    if texts[-1].rstrip().endswith(("?", "？")) and not _KEYWORD.search(before):
        return None  # the question goes on: these were names
    return [_tidy(text) for text in texts]


def _tidy(text: str) -> str:
    """An option's text without the separator and the emphasis around it."""
    text = text.strip().rstrip(";；,，").strip()
    if text.endswith("**") and text.count("**") == 1:
        text = text[:-2]
    return text.removeprefix("**").strip() if text.count("**") == 1 else text
