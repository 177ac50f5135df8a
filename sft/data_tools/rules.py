"""Rules that find broken responses without a model (InternVL 2.5, "Data Filtering Pipeline").

Each rule is a pure function of one response and its threshold: a `Hit`, or None. The published
pipeline names abnormal sentence length, overly long zero sequences and too many duplicated lines;
its thresholds are not published. Those here are chosen so that sound data passes: what a rule
hits should be worth a look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sft.data_tools.texts import (
    Span,
    find_lines,
    find_sentences,
    find_units,
    find_words,
)

NGRAM_UNITS = 8  # words, or characters of Chinese, Japanese and Korean
NGRAM_CHARACTERS = 24
_LEAST_UNITS, _LEAST_CHARACTERS = 50, 200  # of a response; a shorter one may well repeat itself
_LEAST_LINES = 4  # that repeat an earlier one
_LEAST_LINE = 5  # characters of a line that counts: no brackets, no fences
_MOST_SPANS = 50  # that are told of a hit
_MOST_REPEATS = 10_000  # that are asked for in a pattern
_DRAWING = r"-=_.*#~+|─━═·•…"  # rules, tables and blanks are drawn with them
_ZEROS = re.compile(r"0(?:[\s,;.|]{0,3}0)*")


@dataclass(frozen=True)
class Hit:
    """What a rule found in a text: its value, which passes the threshold, and where.

    told: the value in words. spans: the parts of the text that made it.
    """

    value: float
    told: str
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """A hit as it is kept for review. turn: the number of the response among all turns, from 0.

    For a model's score there is no turn and no span; told is what the model gives as its reason.
    """

    rule: str
    told: str
    value: float
    threshold: float
    turn: int | None = None
    spans: list[Span] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts: dict[str, Any] = {"rule": self.rule, "told": self.told}
        facts |= {"value": self.value, "threshold": self.threshold}
        if self.turn is not None:
            facts |= {"turn": self.turn, "spans": [list(span) for span in self.spans]}
        return facts


def long_sentence(text: str, most: float) -> Hit | None:
    """A sentence of more than `most` words, or characters of Chinese, Japanese and Korean.

    >>> long_sentence("This has five words here. 这是八个汉字的句子。", 6).told
    'a sentence of 9 words or characters'
    """
    units = [span.start for span in find_units(text)]
    longest, where = 0, Span(0, 0)
    number = 0
    for sentence in find_sentences(text):
        first = number
        while number < len(units) and units[number] < sentence.end:
            number += 1
        if number - first > longest:
            longest, where = number - first, sentence
    if longest <= most:
        return None
    return Hit(longest, f"a sentence of {longest} words or characters", [where])


def long_word(text: str, most: float) -> Hit | None:
    """A run of more than `most` characters without white space (base64, a minified file).

    >>> long_word("see aGVsbG8gd29ybGQ=", 10).told
    'a word of 16 characters'
    """
    longest = max(find_words(text), key=lambda span: span.end - span.start, default=Span(0, 0))
    length = longest.end - longest.start
    return Hit(length, f"a word of {length} characters", [longest]) if length > most else None


def short_response(text: str, least: float) -> Hit | None:
    """A response of fewer than `least` characters.

    >>> short_response("Yes", 5).told
    '3 characters'
    """
    length = len(text.strip())
    return Hit(length, f"{length} characters") if length < least else None


def long_response(text: str, most: float) -> Hit | None:
    """A response of more than `most` characters.

    >>> long_response("No, never.", 5).told
    '10 characters'
    """
    length = len(text.strip())
    return Hit(length, f"{length} characters") if length > most else None


def zero_run(text: str, most: float) -> Hit | None:
    """More than `most` zeros in a row, also with white space, commas or points between them.

    >>> zero_run("It is 0.0000000, 0, 0", 8).told
    '10 zeros in a row'
    """
    runs = [(match.group().count("0"), Span(*match.span())) for match in _ZEROS.finditer(text)]
    longest, where = max(runs, default=(0, Span(0, 0)))
    return Hit(longest, f"{longest} zeros in a row", [where]) if longest > most else None


def character_run(text: str, most: float) -> Hit | None:
    """More than `most` times the same character in a row, but for those that lines are drawn with.

    >>> character_run("| --- | ------------ | 哈哈哈哈哈哈哈哈哈哈哈哈", 10).told
    "12 times '哈' in a row"
    """
    runs = [
        (len(match.group()), match) for match in _same(int(min(most, _MOST_REPEATS))).finditer(text)
    ]
    longest, where = max(runs, key=lambda run: run[0], default=(0, None))
    if where is None or longest <= most:
        return None
    return Hit(longest, f"{longest} times {where[1]!r} in a row", [Span(*where.span())])


@lru_cache
def _same(most: int) -> re.Pattern[str]:
    """A character that no lines are drawn with, more than `most` times."""
    return re.compile(rf"([^\s{re.escape(_DRAWING)}0])\1{{{most},}}")


def repeated_lines(text: str, most: float) -> Hit | None:
    """Lines that stood before hold more than the share `most` of all lines' characters.

    Lines of fewer than 5 characters do not count, and at least 4 must repeat an earlier one.

    >>> repeated_lines("The bar is red.\\n" * 5 + "The other bar is blue.", 0.3).told
    '4 of 6 lines stood before: 62% of the characters'
    """
    lines = [line for line in find_lines(text) if line.end - line.start >= _LEAST_LINE]
    seen: set[str] = set()
    repeated: list[Span] = []
    for line in lines:
        words = text[line.start : line.end]
        if words in seen:
            repeated.append(line)
        seen.add(words)
    if len(repeated) < _LEAST_LINES:
        return None
    share = _length(repeated) / _length(lines)
    if share <= most:
        return None
    told = f"{len(repeated)} of {len(lines)} lines stood before: {share:.0%} of the characters"
    return Hit(round(share, 4), told, repeated[:_MOST_SPANS])


def repeated_ngrams(text: str, most: float) -> Hit | None:
    """Runs of 8 words (characters of Chinese, Japanese, Korean) that stood before cover more than
    the share `most` of the response. Responses below 50 words are not looked at.

    >>> repeated_ngrams("so it is then and now the same again " * 8, 0.3).told
    '88% of 72 words or characters stood before, in runs of 8'
    """
    units = find_units(text)
    if len(units) < _LEAST_UNITS:
        return None
    words = tuple(text[start:end].lower() for start, end in units)
    covered = _covered(words, NGRAM_UNITS)
    share = sum(covered) / len(units)
    if share <= most:
        return None
    told = f"{share:.0%} of {len(units)} words or characters stood before, in runs of {NGRAM_UNITS}"
    return Hit(round(share, 4), told, list(_covered_spans(units, covered))[:_MOST_SPANS])


def repeated_characters(text: str, most: float) -> Hit | None:
    """Runs of 24 characters that stood before cover more than the share `most` of the response.

    White space does not count; responses below 200 characters are not looked at. It finds what has
    no words to repeat.

    >>> repeated_characters("=?x1!" * 60, 0.5).told
    '98% of 300 characters stood before, in runs of 24'
    """
    bare = "".join(text.split())
    if len(bare) < _LEAST_CHARACTERS:
        return None
    covered = _covered(bare, NGRAM_CHARACTERS)
    share = sum(covered) / len(bare)
    if share <= most:
        return None
    told = f"{share:.0%} of {len(bare)} characters stood before, in runs of {NGRAM_CHARACTERS}"
    units = [Span(place, place + 1) for place, sign in enumerate(text) if not sign.isspace()]
    return Hit(round(share, 4), told, list(_covered_spans(units, covered))[:_MOST_SPANS])


def _length(spans: Sequence[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _covered(units: tuple[str, ...] | str, n: int) -> list[bool]:
    """For each unit whether it is part of an n-gram that stood before."""
    seen: set[tuple[str, ...] | str] = set()
    covered = [False] * len(units)
    marked = 0  # up to here it is settled
    for start in range(len(units) - n + 1):
        gram = units[start : start + n]
        if gram in seen:
            for place in range(max(start, marked), start + n):
                covered[place] = True
            marked = start + n
        seen.add(gram)
    return covered


def _covered_spans(units: Sequence[Span], covered: Sequence[bool]) -> Iterator[Span]:
    """From the first to the last unit of every covered run."""
    start: int | None = None
    for number, inside in enumerate([*covered, False]):
        if inside and start is None:
            start = number
        elif not inside and start is not None:
            yield Span(units[start].start, units[number - 1].end)
            start = None


@dataclass(frozen=True)
class Rule:
    """A rule with the option that sets its threshold. repetition: exempt data sets skip it."""

    find: Callable[[str, float], Hit | None]
    option: str
    default: float
    about: str
    repetition: bool = False

    @property
    def name(self) -> str:
        """What reasons and `--skip` call it."""
        return self.find.__name__


RULES = (
    Rule(long_sentence, "max-sentence", 400, "words (Chinese: characters) of a sentence"),
    Rule(long_word, "max-word", 500, "characters without white space"),
    Rule(short_response, "min-response", 0, "characters of a response, at least"),
    Rule(long_response, "max-response", 60_000, "characters of a response"),
    Rule(zero_run, "max-zero-run", 50, "zeros in a row"),
    Rule(character_run, "max-character-run", 50, "times the same character in a row"),
    Rule(repeated_lines, "max-repeated-lines", 0.3, "share of lines that stood before", True),
    Rule(repeated_ngrams, "max-repeated-ngrams", 0.4, "share of repeated runs of words", True),
    Rule(repeated_characters, "max-repeated-characters", 0.6,
         "share of repeated runs of characters", True),
)  # fmt: skip


def find_findings(
    turns: Sequence[dict[str, Any]],
    thresholds: dict[str, float],
    *,
    skip: Collection[str] = (),
) -> list[Finding]:
    """What the rules find in the responses of a conversation.

    thresholds: by the rules' names. skip: rules that are left out.
    """
    findings = []
    for number, turn in enumerate(turns):
        if turn["from"] != "gpt":
            continue
        for rule in RULES:
            threshold = thresholds[rule.name]
            if rule.name not in skip and (hit := rule.find(turn["value"], threshold)):
                findings.append(
                    Finding(rule.name, hit.told, hit.value, threshold, number, hit.spans)
                )
    return findings
