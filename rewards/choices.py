"""Matcher of multiple-choice answers: by letter or by the option's text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.markup import clean
from rewards.reasons import CannotJudge, Options
from rewards.texts import normalise

_OPTION_LETTER = re.compile(
    r"(?:(?:option|choice|选项)\s{0,3})?[(\[（]?([A-Za-z])(?:[)\]）][.:：]?|[.:：、)])?",
    re.IGNORECASE,
)
_OPTION_BOTH = re.compile(r"[(\[（]?([A-Za-z])(?:[)\]）][.:：]?|[.:：、])\s{0,3}(\S.*)", re.DOTALL)


def option_letter(text: str) -> str | None:
    """The letter of "B", "(B)", "B.", "Option B", "B. Paris"; None for other text."""
    text = clean(text)
    if alone := _OPTION_LETTER.fullmatch(text):
        return alone.group(1).upper()
    both = _OPTION_BOTH.fullmatch(text)
    return both.group(1).upper() if both else None


def _option_texts(options: Sequence[str]) -> list[str]:
    """The options without their own letters ("A. Paris" at place 0 is "paris")."""
    texts = []
    for index, option in enumerate(options):
        both = _OPTION_BOTH.fullmatch(clean(option))
        own = both is not None and both.group(1).upper() == chr(ord("A") + index)
        texts.append(normalise(both.group(2) if both and own else option))
    return texts


def _chosen_option(text: str, texts: list[str]) -> str | None:
    """The letter that a text names: by letter, by the option's text, or both if they agree."""
    whole = clean(text)
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    if (alone := _OPTION_LETTER.fullmatch(whole)) and alone.group(1).upper() in letters:
        return alone.group(1).upper()
    if normalise(whole) in texts:
        return letters[texts.index(normalise(whole))]
    if both := _OPTION_BOTH.fullmatch(whole):
        letter, rest = both.group(1).upper(), normalise(both.group(2))
        contradicts = rest in texts and letters[texts.index(rest)] != letter
        return letter if letter in letters and not contradicts else None
    return None


def match_choice(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both name the same option.

    With `options` either may be the letter or the option's text. Raises CannotJudge when the gold
    names no option (or, without options, is no letter).
    """
    if options:
        texts = _option_texts(options)
        wanted = _chosen_option(gold, texts)
        if wanted is None:
            raise CannotJudge(f"gold answer {gold!r} is none of the {len(texts)} options")
        return float(_chosen_option(prediction, texts) == wanted)
    wanted = option_letter(gold)
    if wanted is None:
        raise CannotJudge(f"gold answer {gold!r} is no option letter, and no options are given")
    return float(option_letter(prediction) == wanted)


def options_in(question: str) -> list[str] | None:
    r"""The options that a question lists, one a line, from A on; None where it lists none.

    >>> options_in("Which city?\nA. Paris\nB. London")
    ['Paris', 'London']
    """
    found = re.findall(r"^[ \t]*[(（]?([A-Z])[)）.:：、]{1,2}[ \t]*(\S.*)$", question, re.MULTILINE)
    letters = "".join(letter for letter, _ in found)
    if len(found) < 2 or not "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters):
        return None
    return [text.strip() for _, text in found]
