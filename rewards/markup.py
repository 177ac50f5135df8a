r"""Markdown and LaTeX around an answer that carry no meaning."""

from __future__ import annotations

import re

_BOLD = re.compile(r"(?<!\w)\*\*([^*\n]{1,200})\*\*(?!\w)")  # not the power in 2**3


def clean(text: str) -> str:
    r"""An answer without the wrapping that carries no meaning: `$`, `**`, \text{}, quotes, a
    closing full stop.

    >>> clean(r" **$\text{B}$.** ")
    'B'
    """
    before = None
    text = _BOLD.sub(r"\1", text.strip())
    for _ in range(8):  # wrappings nest only a few deep; a bound keeps hostile input linear
        if text == before:
            break
        before = text
        text = text.strip(" \t\r\n*`")
        text = _unwrap(text)
        if not text.endswith("..."):
            text = text.rstrip(".。，；;！").rstrip()
    return text


_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ('"', '"'),
    ("“", "”"),
    ("'", "'"),
    ("__", "__"),
)
_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s{0,2}\{")


def _unwrap(text: str) -> str:
    for left, right in _WRAPPERS:
        if not (text.startswith(left) and text.endswith(right)):
            continue
        inner = text[len(left) : -len(right)]
        # "$1$ and $2$" is not one wrapped answer
        if inner and left not in inner and right not in inner:
            return inner.strip()
    if (command := _COMMAND.match(text)) and brace_end(text, command.end()) == len(text):
        return text[command.end() : -1].strip()
    return text


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


def brace_end(text: str, start: int) -> int | None:
    """The index after the `}` that closes the brace opened just before `start`, or None."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() in "{}":
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return brace.end()
    return None
