"""Texts in units that fit their script: words, but characters for Chinese, Japanese and Korean.

"The bar is 3.5 high" -> The, bar, is, 3.5, high      "柱高3.5" -> 柱, 高, 3.5
"""

from __future__ import annotations

import re
from typing import NamedTuple

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_UNIT = re.compile(rf"[{CJK}]|\d+(?:[.,]\d+)*|[^\W\d_{CJK}]+(?:['’][^\W\d_{CJK}]+)*")
# a full stop ends a sentence only before white space: not in 3.5, nor in a file's name
_SENTENCE = re.compile(r"(?:[^\n。！？.!?]|[.!?](?!\s|$))+[.!?。！？]*")
_WORD = re.compile(rf"[^\s{CJK}　-〿＀-￯]+")
_BOX = re.compile(r"<box>[^<]*</box>")  # no search to the text's end for a box that never ends


class Span(NamedTuple):
    """A part of a text: from `start` up to, and without, `end`."""

    start: int
    end: int


def find_units(text: str) -> list[Span]:
    """Words, numbers, and single characters of Chinese, Japanese and Korean; no punctuation.

    >>> [text[a:b] for text in ["It's 3.5 柱高"] for a, b in find_units(text)]
    ["It's", '3.5', '柱', '高']
    """
    return [Span(*match.span()) for match in _UNIT.finditer(text)]


def find_sentences(text: str) -> list[Span]:
    """Sentences: they end at . ! ? before white space, at their Chinese signs, at line breaks.

    >>> [text[a:b] for text in ["It is 3.5. 是的。Yes"] for a, b in find_sentences(text)]
    ['It is 3.5.', ' 是的。', 'Yes']
    """
    return [Span(*match.span()) for match in _SENTENCE.finditer(text)]


def find_lines(text: str) -> list[Span]:
    """Lines that are not blank, without the white space around them."""
    found = []
    for match in re.finditer(r"[^\n]+", text):
        line = match.group()
        if bare := line.strip():
            start = match.start() + line.index(bare)
            found.append(Span(start, start + len(bare)))
    return found


def find_words(text: str) -> list[Span]:
    """Runs without white space, Chinese, Japanese, Korean and full-width signs left out.

    The coordinates between <box> and </box> are no word.
    """
    bare = _BOX.sub(lambda match: " " * len(match.group()), text)
    return [Span(*match.span()) for match in _WORD.finditer(bare)]


def join_spans(spans: list[Span]) -> list[Span]:
    """Spans in order of their starts, those that touch or overlap joined."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start <= joined[-1].end:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined
