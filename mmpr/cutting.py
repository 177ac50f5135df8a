"""Where a reply can be cut: between two of its tokens, and not inside a word.

    token ids --half of them--> a place between tokens --back to a word's end--> prefix | rest

The published scripts cut at spaces, which leaves nothing of a Chinese reply. Here a word is what
its script makes one: letters and digits that stand together (with "don't", "3.14", "\\frac" and
"<think>" in one piece), and one character where words are not set apart (Chinese, Japanese, Thai).
A character with its accents or an emoji with its modifiers is never parted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# written without spaces: Thai, Lao, Tibetan, Myanmar, Khmer; kana, bopomofo, ideographs
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_LETTER = rf"[^\W_{_UNSPACED}]"
_UNIT = re.compile(
    r"</?\w+>"  # a tag
    rf"|\\{_LETTER}+"  # a command of LaTeX
    # a word or a number, with what stands inside of them: "it's", "3.14", "12:30"
    rf"|[-+]?{_LETTER}+(?:['’\-_.]{_LETTER}+|(?<=\d)[,:/](?=\d){_LETTER}+)*%?"
    r"|\r\n"
)
_JOINER = "\u200d"  # emoji that are one: a family, a profession
_MODIFIERS = frozenset(map(chr, (*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080))))
_LOST = "\ufffd"  # what bytes that are no whole character decode to


@dataclass(frozen=True)
class Cut:
    """A reply cut in two: its first `tokens` token ids, which decode to `prefix`."""

    tokens: int
    prefix: str


def _is_flag(character: str) -> bool:
    """Whether it is one of the letters of which two make a flag."""
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _extends(text: str, place: int) -> bool:
    """Whether the character at `place` belongs to the one before it."""
    before, here = text[place - 1], text[place]
    if unicodedata.category(here).startswith("M") or here in _MODIFIERS:
        return True
    if _JOINER in (before, here):
        return True
    if not (_is_flag(here) and _is_flag(before)):
        return False
    flags = re.search("[\U0001f1e6-\U0001f1ff]*$", text[:place])
    return flags is not None and len(flags[0]) % 2 == 1


def word_boundaries(text: str) -> list[bool]:
    """For each place from 0 to len(text): whether the text can be parted there.

    >>> text = "It's 3.5, 红色!"
    >>> "".join("|" * can + c for c, can in zip(text, word_boundaries(text)))
    "|It's| |3.5|,| |红|色|!"
    """
    # a mark counts as a letter, so that a word goes on behind it
    shadow = "".join("x" if unicodedata.category(c).startswith("M") else c for c in text)
    parts = [True] * (len(text) + 1)
    for unit in _UNIT.finditer(shadow):
        parts[unit.start() + 1 : unit.end()] = [False] * (len(unit[0]) - 1)
    for place in range(1, len(text)):
        parts[place] = parts[place] and not _extends(text, place)
    return parts


def cut_reply(
    ids: Sequence[int], text: str, ratio: float, decode: Callable[[Sequence[int]], str]
) -> Cut | None:
    """Cut a reply of these ids, which decode to `text`, at `ratio` of its tokens.

    The place is the last one before it that parts no word; where there is none, the first one
    behind it. On both sides there is text, not just white space. None where that cannot be had.
    """
    parts = word_boundaries(text)
    wanted = int(len(ids) * ratio)
    for tokens in (*range(wanted, 0, -1), *range(wanted + 1, len(ids))):
        prefix = decode(ids[:tokens])
        if prefix.endswith(_LOST) or not text.startswith(prefix) or not parts[len(prefix)]:
            continue
        if prefix.strip() and text[len(prefix) :].strip():
            return Cut(tokens, prefix)
    return None
