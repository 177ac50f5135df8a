"""Matcher of multiple-choice answers: by letter or by the option's text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.markup import clean, fold
from rewards.match.quantities import read_number
from rewards.match.reasons import CannotJudge, Options
from rewards.match.texts import normalise

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # options beyond the 26th are reached by their text
_INDEX = {letter: place for place, letter in enumerate(LETTERS)}
_LEAD = re.compile(
    r"(?:the\s{1,3})?(?:correct\s{1,3})?(?:(?:options?|choices?|answers?)\b(?:\s{1,3}(?:is|are)\b)?"
    r"|选(?:项|择)?|答案?[是为]?)\s{0,3}[:：]?\s{0,3}",
    re.IGNORECASE,
)
# "B"  "(B)"  "B."  "[B]:"
_ALONE = re.compile(r"[(\[【]?\s?([A-Za-z])\s?[)\]】]?\s?[.:、)!]?项?")
# "B. Paris"  "(B) Paris"  "B: Paris"  "B - Paris"  "B (Paris)"; not "U.S." or "e.g. this"
_LABELLED = re.compile(
    r"[(\[【]\s?([A-Za-z])\s?[)\]】]\s?[.:、]?\s*(\S.*)"
    r"|([A-Z])\s?(?:[)\]】.:、]|\s[-—]\s|\s(?=\([^()]*\)$))"
    r"(?:\s+(?!(?:[A-Za-z]\.\s){4})|(?![A-Za-z]\.))(\S.*)"
    r"|([a-z])\s?[)\]】.:、]\s+(\S.*)",
    re.DOTALL,
)
# "B, because ..", "B is correct": what follows is no text of an option
_REASONED = re.compile(
    r"[(\[]?([A-Za-z])[)\]]?\s?(?:[,;:.—]\s?|\s)\s{0,9}(?:because|since|as|for|given|due|so)\b(.*)"
    r"|[(\[]?([A-Za-z])[)\]]?[.,;:—]?\s{0,3}(?:\n|因为|由于)(.*)"
    r"|[(\[]?([A-Z])[)\]]?\s{1,3}(?:is|was)\s{1,3}(?:the\s{1,3})?(?:correct|right|best|answer)"
    r"(\s{1,3}(?:answer|option|choice|one))?",
    re.DOTALL | re.IGNORECASE,
)
# "London (B)", "London, because Big Ben is there": the option's text comes first
_TEXT_FIRST = re.compile(
    r"(.+?)(?:\s\(([A-Z])\)|,?\s(?:because|since)\b.*|[，,](?:因为|由于).*)", re.DOTALL
)
_SPACED = re.compile(r"([A-Z]) (\S.*)", re.DOTALL)  # "B London"
_OTHERS = re.compile(r"(?<![A-Za-z'’.])[A-HJ-Z](?![A-Za-z'’])")  # I is a word
_HEDGE = re.compile(
    r"\b(?:or|and|或)\s{0,3}[(\[]?[A-Z](?![A-Za-z])|^\s{0,3}[/&,]\s{0,3}[A-Z]\b"
    r"|^[A-Z](?:[.,:、)\s]{1,3}[A-Z]){1,9}[.)]?$"  # "A. B. C."
)
_OR = re.compile(r"\s{1,9}or\s{1,9}|\s{0,9}[/或]\s{0,9}")
_SEPARATORS = re.compile(r"\s{0,9}(?:[,;、/&+]|\band\b|和|与|及)\s{0,9}(?:and\b\s{0,3})?|\s{1,9}")
_RUN = re.compile(r"[A-Z]{2,26}|[a-z]{2,26}")
_MAX_LETTERS = 120  # of a text that lists letters
_ARTICLE = re.compile(r"(?:the|an?) ")


def _listed_letters(text: str) -> frozenset[str] | None:
    """The letters of "A, C", "A and C", "(A)(C)", "ACD"; None where the text is not only letters.

    "A or B" lists none: it does not decide.
    """
    if len(text) > _MAX_LETTERS or text[1:2] in (".", ":"):  # "B. x" is labelled
        return None
    if _RUN.fullmatch(text):
        return frozenset(text.upper()) if len(set(text)) == len(text) else None
    found = []
    for part in _SEPARATORS.split(text.replace(")(", ") (")):
        alone = _ALONE.fullmatch(part)
        if alone is None:
            return None
        found.append(alone[1].upper())
    return frozenset(found)


def _strip_lead(text: str) -> str:
    """A text without "Option", "The answer is", "选项" before its letter."""
    if len(text) > 1 and (lead := _LEAD.match(text)) and lead.end() < len(text):
        return clean(text[lead.end() :])
    return text


def _label(text: str) -> tuple[str, str] | None:
    """The letter that labels a text ("B. London") and the text after it."""
    if (label := _LABELLED.fullmatch(text)) is None:
        return None
    letter, rest = (group for group in label.groups() if group is not None)
    return letter.upper(), rest


def _claimed(text: str) -> str | None:
    """The letter of "B. London" or "B, because ..", unless other letters are named beside it."""
    if reasoned := _REASONED.fullmatch(text):
        letter, reason, *_ = (group for group in [*reasoned.groups(), ""] if group is not None)
        return None if _OTHERS.search(reason) else letter.upper()
    label = _label(text)
    return label[0] if label and not _HEDGE.search(label[1][:200]) else None


def option_letter(text: str) -> str | None:
    """The letter of "B", "(B)", "B.", "Option B", "B. Paris"; None for other text.

    >>> option_letter("**(b)**"), option_letter("A red bar")
    ('B', None)
    """
    letters = _letters(text)
    return next(iter(letters)) if letters is not None and len(letters) == 1 else None


def _letters(text: str) -> frozenset[str] | None:
    """The option letters that a text names when no options are given."""
    text = _strip_lead(clean(fold(text)))
    if alone := _ALONE.fullmatch(text):
        return frozenset(alone[1].upper())
    if listed := _listed_letters(text):
        return listed
    claimed = _claimed(text)
    return None if claimed is None else frozenset(claimed)


class _Options:
    """The options of one question: what each letter and each text stands for.

    An option is known by its place; options of equal text count as one, the first.
    """

    def __init__(self, options: Sequence[str]):
        labels = [_label(clean(fold(option))) for option in options]
        own = [label[0] if label else None for label in labels]
        if None in own or len(set(own)) < len(own):  # letters of their own, or none
            own = [letter if letter == LETTERS[place : place + 1] else None
                   for place, letter in enumerate(own)]  # fmt: skip
        self.place_of: dict[str, int] = {}
        places: dict[str, int] = {}
        self.texts = []
        for place, option in enumerate(options):
            label, letter = labels[place], own[place]
            text = normalise(label[1] if label and letter else option)
            first = places.setdefault(text, place)
            self.texts.append(text)
            if letter or place < len(LETTERS):
                self.place_of[letter or LETTERS[place]] = first
        self.places = places

    def by_text(self, text: str) -> int | None:
        """The option of that text, or of that number or without its article, if it is one."""
        text = normalise(text)
        if text in self.places:
            return self.places[text]
        bare = _bare(text)
        if bare != text or any(_ARTICLE.match(option) for option in self.places):
            for option, place in self.places.items():
                if _bare(option) == bare:
                    return place
        number = read_number(text)
        if number is None:
            return None
        same = [
            place
            for option, place in self.places.items()
            if (value := read_number(option)) is not None
            and value.value == number.value
            and not value.unit_differs(number)
        ]
        return same[0] if len(same) == 1 else None

    def read(self, text: str) -> frozenset[int] | None:
        """The options that a text names, by letter, by text, or by both if they agree."""
        whole = clean(fold(text))
        bare = _strip_lead(whole)
        alone = _ALONE.fullmatch(bare)
        if alone and alone[1].upper() in self.place_of:
            return frozenset([self.place_of[alone[1].upper()]])
        place = self.by_text(whole)
        if place is None and bare != whole:
            place = self.by_text(bare)
        if place is not None:
            return frozenset([place])
        if listed := _listed_letters(bare):
            if not listed <= self.place_of.keys():
                return None
            return frozenset(self.place_of[letter] for letter in listed)
        return self._labelled(bare)

    def _labelled(self, text: str) -> frozenset[int] | None:
        """The option of "B. London" or "B, because ..", unless the text is another option's."""
        label = _label(text)
        if label is None and (spaced := _SPACED.fullmatch(text)):
            label = spaced[1], spaced[2]
        if label is not None:
            letter, rest = label
            place = self.place_of.get(letter)
            rest = rest[1:-1] if rest[0] == "(" and rest[-1] == ")" else rest
            meant = self.by_text(rest)
            if meant is not None:
                return frozenset([meant]) if meant == place else None
            if any(self.by_text(part) not in (place, None) for part in _OR.split(rest[:200])):
                return None
        if first := _TEXT_FIRST.fullmatch(text):
            place = self.by_text(first[1])
            if place is not None:
                return frozenset([place]) if self.place_of.get(first[2], place) == place else None
        claimed = _claimed(text)
        return frozenset([self.place_of[claimed]]) if claimed in self.place_of else None


def is_option(text: str, options: Options) -> bool:
    """Whether a text is nothing but a letter, or the letter of an option with just its text.

    >>> is_option("B. London", ["Paris", "London"]), is_option("B. It is tall", ["Paris", "London"])
    (True, False)
    """
    whole = clean(fold(text))
    if _ALONE.fullmatch(whole):
        return True
    label = _label(whole)
    if label is None or not options:
        return False
    table = _Options(options)
    place = table.by_text(label[1])
    return place is not None and place == table.place_of.get(label[0])


def _bare(text: str) -> str:
    return text[article.end() :] if (article := _ARTICLE.match(text)) else text


def match_choice(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both name the same option, or the same set of options ("AC", "A and C").

    With `options` either may be the letter or the option's text; a letter beside another option's
    text names none. "A or B" is wrong, and so is a letter whose reason names another letter.
    Raises CannotJudge when the gold names no option (or, without options, no letter).
    """
    wanted: frozenset[int] | frozenset[str] | None
    given: frozenset[int] | frozenset[str] | None
    if options:
        table = _Options(options)
        wanted = table.read(gold)
        if wanted is None:
            raise CannotJudge(f"gold answer {gold[:40]!r} is none of the {len(options)} options")
        given = table.read(prediction)
    else:
        wanted = _letters(gold)
        if wanted is None or (len(wanted) > 1 and gold.islower()):
            raise CannotJudge(
                f"gold answer {gold[:40]!r} is no option letter, and no options are given"
            )
        given = _letters(prediction)
    return float(given == wanted)
