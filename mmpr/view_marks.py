"""What differs between two texts, word by word; Chinese, Japanese and Korean by characters.

"The red bar is 2."   The red bar is [2].
"The red bar is 3."   The red bar is [3].
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
# a word or number with the white space behind it, so that a match never hangs on a space alone
_WORD = re.compile(rf"(?:[{_CJK}]|\d+(?:[.,]\d+)*|[^\W\d{_CJK}]+|[^\s])\s*|\s+")
_MOST_WORDS = 12_000  # of a text that is compared: beyond it the comparison takes 18 MB and more
_ALIKE = 0.5  # below it a match of one or two words is chance
_STRANGE = 0.15  # below it nothing is marked: all of it differs
_LONG_SAME = 1500  # characters that both have, from which only the ends are shown
_ENDS = 500  # characters shown of them at each end
_MOST_SHOWN = 12_000  # characters of a text on the page


class Run(NamedTuple):
    """A part of a text. kind: "same", "differs", or "left out" (then the text says how much)."""

    text: str
    kind: str


@dataclass(frozen=True)
class Marked:
    """Two texts with their difference. note: what a reader must know; words: that differ."""

    chosen: list[Run]
    rejected: list[Run]
    note: str
    words: int


def mark_difference(chosen: str, rejected: str) -> Marked:
    """Both texts in runs, of which those that the other lacks are marked.

    >>> mark_difference("It is 2.", "It is 3.").rejected
    [Run(text='It is ', kind='same'), Run(text='3', kind='differs'), Run(text='.', kind='same')]
    """
    from rapidfuzz.distance import Indel

    first, second = _WORD.findall(chosen), _WORD.findall(rejected)
    if max(len(first), len(second)) > _MOST_WORDS:
        note = f"more than {_MOST_WORDS:,} words: the difference is not marked"
        return Marked(cut_text(chosen), cut_text(rejected), note, len(first) + len(second))
    keys = [[word.strip() for word in words] for words in (first, second)]
    alike = Indel.normalized_similarity(*keys)
    if alike < _STRANGE:
        words = len(first) + len(second)
        return Marked(cut_text(chosen), cut_text(rejected), "hardly a word in common", words)
    blocks = [
        (op.tag == "equal", op.src_start, op.src_end, op.dest_start, op.dest_end)
        for op in Indel.opcodes(*keys)
    ]
    if alike < _ALIKE:
        blocks = _without_chance(blocks, len(first))
    halves = (_runs(first, [(same, a, b) for same, a, b, _, _ in blocks]),
              _runs(second, [(same, c, d) for same, _, _, c, d in blocks]))  # fmt: skip
    words = sum(b - a + d - c for same, a, b, c, d in blocks if not same)
    note = "" if words else "they differ in white space alone"
    return Marked(_shortened(halves[0]), _shortened(halves[1]), note, words)


_Block = tuple[bool, int, int, int, int]


def _without_chance(blocks: Sequence[_Block], length: int) -> list[_Block]:
    """Matches of one or two words between differences are taken for differences."""
    return [
        (same and (end - start > 2 or start == 0 or end == length), start, end, left, right)
        for same, start, end, left, right in blocks
    ]


def _runs(words: Sequence[str], blocks: Sequence[tuple[bool, int, int]]) -> list[Run]:
    """The words joined by kind; white space at the end of a difference is not part of it."""
    runs: list[Run] = []
    for same, start, end in blocks:
        text = "".join(words[start:end])
        if not text:
            continue
        bare = text if same else text.rstrip()
        for piece, kind in ((bare, "same" if same else "differs"), (text[len(bare) :], "same")):
            if not piece:
                continue
            if runs and runs[-1].kind == kind:
                runs[-1] = Run(runs[-1].text + piece, kind)
            else:
                runs.append(Run(piece, kind))
    return runs


def _shortened(runs: Sequence[Run]) -> list[Run]:
    """Runs for the page: of long text that both have only the ends, and not too much in all."""
    short: list[Run] = []
    for run in runs:
        if run.kind == "same" and len(run.text) > _LONG_SAME:
            short.append(Run(run.text[:_ENDS], "same"))
            short.append(
                Run(f"{len(run.text) - 2 * _ENDS:,} characters that both have", "left out")
            )
            short.append(Run(run.text[-_ENDS:], "same"))
        else:
            short.append(run)
    return _cut(short)


def _cut(runs: Sequence[Run]) -> list[Run]:
    kept: list[Run] = []
    room = _MOST_SHOWN
    for number, run in enumerate(runs):
        if len(run.text) <= room:
            kept.append(run)
            room -= len(run.text)
            continue
        rest = len(run.text) - room + sum(len(other.text) for other in runs[number + 1 :])
        kept.append(Run(run.text[:room], run.kind))
        kept.append(Run(f"{rest:,} more characters", "left out"))
        break
    return kept


def cut_text(text: str) -> list[Run]:
    """A text that is compared with none, cut where it is too long for the page."""
    return _cut([Run(text, "same")])


def visible(text: str) -> Iterator[tuple[str, bool]]:
    """Text in pieces: (piece, whether it stands for a character that no one would see).

    Those are control and formatting characters (bidirectional overrides, zero widths) and halves of
    surrogate pairs, each as its code point; line breaks and tabs stay.

    >>> list(visible("a\\u202eb"))
    [('a', False), ('U+202E', True), ('b', False)]
    """
    start = 0
    for place, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t":
            if start < place:
                yield text[start:place], False
            yield f"U+{ord(character):04X}", True
            start = place + 1
    if start < len(text):
        yield text[start:], False
