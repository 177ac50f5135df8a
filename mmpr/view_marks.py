"""What differs between two texts, word by word; Chinese, Japanese and Korean by characters.

"The red bar is 2."   The red bar is [2].
"The red bar is 3."   The red bar is [3].
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from internvl.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
# a word or number with the white space behind it, so that a match never hangs on a space alone
_WORD = re.compile(rf"(?:[{_CJK}]|\d+(?:[.,]\d+)*|[^\W\d{_CJK}]+|[^\s])\s*|\s+")
_MOST_WORDS = 12_000  # of a text that is compared: beyond it the comparison takes 18 MB and more
_ALIKE = 0.5  # of the part that differs: below it a match of one or two words is chance
_STRANGE = 0.15  # below it nothing is marked: all of it differs
_LONG_SAME = 1500  # characters that both have, from which only the ends are shown
_ENDS = 500  # characters shown of them at each end
_MOST_SHOWN = 12_000  # characters of a text on the page


class Run(NamedTuple):
    """A part of a text. kind: "same", "differs", "slot" (a picture's place in a question), or
    "left out" (then the text says how much).
    """

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
    if Indel.normalized_similarity(*keys) < _STRANGE:
        words = len(first) + len(second)
        return Marked(cut_text(chosen), cut_text(rejected), "hardly a word in common", words)
    blocks = _blocks(*keys)
    halves = (_runs(first, [(same, a, b) for same, a, b, _, _ in blocks]),
              _runs(second, [(same, c, d) for same, _, _, c, d in blocks]))  # fmt: skip
    words = sum(b - a + d - c for same, a, b, c, d in blocks if not same)
    note = "" if words else "they differ in white space alone"
    return Marked(_shortened(halves[0]), _shortened(halves[1]), note, words)


_Block = tuple[bool, int, int, int, int]


def _blocks(first: list[str], second: list[str]) -> list[_Block]:
    """What both have, and what not: (same, from and to in the first, from and to in the second).

    Where the middle between the common ends is of other wording, a word or two in common there is
    chance, and taken for different.
    """
    from rapidfuzz.distance import Indel

    short = min(len(first), len(second))
    head = next((n for n in range(short) if first[n] != second[n]), short)
    tail = next((n for n in range(short - head) if first[-1 - n] != second[-1 - n]), short - head)
    middle = first[head : len(first) - tail], second[head : len(second) - tail]
    other_wording = Indel.normalized_similarity(*middle) < _ALIKE
    blocks = [(True, 0, head, 0, head)]
    for op in Indel.opcodes(*middle):
        same = op.tag == "equal" and not (other_wording and op.src_end - op.src_start < 3)
        here = (head + op.src_start, head + op.src_end)
        blocks.append((same, *here, head + op.dest_start, head + op.dest_end))
    ends = len(first), len(second)
    blocks.append((True, ends[0] - tail, ends[0], ends[1] - tail, ends[1]))
    return blocks


def _runs(words: Sequence[str], blocks: Sequence[tuple[bool, int, int]]) -> list[Run]:
    """The words joined by kind; white space at the end of a difference is not part of it."""
    runs: list[Run] = []
    filled = (block for block in blocks if block[1] < block[2])
    for same, group in groupby(filled, key=lambda block: block[0]):
        text = "".join("".join(words[start:end]) for _, start, end in group)
        if same:
            runs.append(Run(text, "same"))
            continue
        bare = text.rstrip()
        runs += [Run(bare, "differs")] if bare else []
        runs += [Run(text[len(bare) :], "same")] if bare != text else []
    return [Run("".join(run.text for run in group), kind)
            for kind, group in groupby(runs, key=lambda run: run.kind)]  # fmt: skip


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


def mark_slots(text: str) -> list[Run]:
    """A question with the places of its pictures marked, cut where it is too long."""
    parts = re.split(f"({re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)})", text)
    kinds = ("same", "slot")  # re.split gives them in turn
    return _cut([Run(part, kinds[number % 2]) for number, part in enumerate(parts) if part])


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
