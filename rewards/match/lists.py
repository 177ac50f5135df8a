"""Matcher of lists, sets and records: the same items in any order."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rewards.markup import clean
from rewards.match.quantities import Number, read_number, same_number
from rewards.match.reasons import CannotJudge, Options
from rewards.match.texts import normalise

MAX_ITEMS = 5_000  # of a gold list
_MAX_NUMBERS = 64  # items compared as numbers, each with each
_BULLET = re.compile(r"\s{0,20}(?:[-*•·]\s{1,9}|\(?\d{1,3}[.)、]\s{1,9})")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "《": "》"}
_BRACKETS = {"[": "]", "(": ")", "{": "}", "（": "）", "【": "】"}
_AND = re.compile(
    r"^and\s{1,9}|\s{1,9}and\s{1,9}|\s{1,9}&\s{1,9}|\s{0,3}[和与及]\s{0,3}", re.IGNORECASE
)
_MARK = re.compile(r"[\"'“‘「《\[({（【\])}）】,;；、，\n]")
_COLON = re.compile(r"\s?:\s?")
_DIGITS = re.compile(r"\d")


def read_list(text: str) -> list[str]:
    """The items that a text lists: JSON, a list as Python prints it, or text with separators.

    Items part at new lines (bullets and numbers go), else at ";", else at commas and a last "and";
    never inside quotes, brackets or a number ("1,234"). An object's items are "key: value".
    No text is evaluated.

    >>> read_list("['a', \\"it's\\", '1,234']"), read_list("red, green and blue")
    (['a', "it's", '1,234'], ['red', 'green', 'blue'])
    >>> read_list('{"total": 9.5, "date": "1 May"}')
    ['total: 9.5', 'date: 1 May']
    """
    return _read(text)[0]


def _read(text: str) -> tuple[list[str], list[str] | None]:
    """The items of a text, and another reading in which "and" parts nothing, if it has one."""
    text = clean(text)
    if text[:1] in ("[", "{") and (found := _read_json(text)) is not None:
        return found, None
    bracketed = text[:1] in _BRACKETS and text[-1:] == _BRACKETS[text[0]]
    if bracketed and len(text) > 1:
        text = text[1:-1].strip()
    parts = [part for part in _split(text) if part.strip()]
    plain = [_unquote(part) for part in parts]
    if bracketed or not parts:
        return plain, None
    last = [_unquote(part) for part in _AND.split(parts[-1]) if part.strip()]
    if "\n" in text or last == plain[-1:]:
        return plain, None
    return [*plain[:-1], *last], plain


def _read_json(text: str) -> list[str] | None:
    """The items of a JSON list or object, or None when it is neither."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return [f"{key}: {_text(value)}" for key, value in found.items()]
        return [_text(item) for item in found] if isinstance(found, list) else None
    except (ValueError, RecursionError):  # 1 MB of "["
        return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _split(text: str) -> list[str]:
    """The parts of a text between its separators, of the strongest kind that it has."""
    if "\n" in text.strip():
        return [_BULLET.sub("", line, count=1).rstrip(",;") for line in text.splitlines()]
    cuts: dict[str, list[int]] = {";": [], "、": [], ",": []}
    closers: list[str] = []
    for mark in _MARK.finditer(text):
        sign, at = mark[0], mark.start()
        if closers and closers[-1] in _QUOTES.values():  # in quotes only their end counts
            if sign == closers[-1] and not text[at + 1 : at + 2].isalnum():
                closers.pop()
        elif sign in _QUOTES and _opens_quote(text, at):
            closers.append(_QUOTES[sign])
        elif sign in _BRACKETS:
            closers.append(_BRACKETS[sign])
        elif closers and sign == closers[-1]:
            closers.pop()
        elif not closers and sign in ";；,，、":
            kind = {"；": ";", "，": ","}.get(sign, sign)
            if kind != "," or not _in_number(text, at):
                cuts[kind].append(at)
    if closers:  # something never closes: its opening was no opening
        return _split_plain(text)
    at_last = next((places for places in cuts.values() if places), [])
    starts = [0, *(place + 1 for place in at_last)]
    return [text[start:end] for start, end in zip(starts, [*at_last, len(text)], strict=True)]


def _split_plain(text: str) -> list[str]:
    for separators in (";；", "、"):
        if any(sign in text for sign in separators):
            return re.split(f"[{separators}]", text)
    return re.split(r"，|,(?!(?<=\d,)\d{3}(?!\d))", text)


def _opens_quote(text: str, at: int) -> bool:
    """Whether a quotation mark begins an item ('a', "b": "c"), and is no apostrophe or inch."""
    before = text[max(0, at - 20) : at].rstrip()
    return not before or before[-1] in ",;:；，、[({（【" or text[at] not in "'\""


def _in_number(text: str, at: int) -> bool:
    """Whether the comma at a place is one of thousands: "1,234" but not "1, 234" or "1,23"."""
    digits = text[at + 1 : at + 4]
    if not (text[at - 1 : at].isdigit() and len(digits) == 3 and digits.isdigit()):
        return False
    before = text[max(0, at - 4) : at]
    return not text[at + 4 : at + 5].isdigit() and not (len(before) == 4 and before.isdigit())


def _unquote(part: str) -> str:
    part = part.strip()
    if len(part) > 1 and _QUOTES.get(part[0]) == part[-1]:
        return part[1:-1]
    return part


def is_list_of_lists(answer: Sequence[object]) -> bool:
    """Whether gold answers are several lists, rather than the items of one.

    They are when an item is a list, or a text with separators of its own ("a, b").

    >>> is_list_of_lists(["a", "b"]), is_list_of_lists(["a, b", "b; a"]), is_list_of_lists([1, 2])
    (False, True, False)
    """
    for item in answer:
        if isinstance(item, list | tuple | Mapping):
            return True
        if isinstance(item, str):
            items, plain = _read(item)
            if len(items if plain is None else plain) > 1:
                return True
    return False


def match_list(prediction: str, gold: str, options: Options = None) -> float:
    """F1 of the items, as multisets in any order; 1.0, a match, when they are the same.

    Items are equal as normalised texts or as numbers; those of a record with their keys
    (SROIE, Huang et al. 2019, task 3). Where "and" may part items or not ("salt and pepper"), the
    better reading counts. Raises CannotJudge for a gold that lists nothing, or over 5,000 items.
    """
    wanted_readings = [items for items in _read(gold) if items]
    if not wanted_readings:
        raise CannotJudge(f"gold answer {gold[:40]!r} lists nothing")
    if len(wanted_readings[0]) > MAX_ITEMS:
        raise CannotJudge(f"gold answer lists over {MAX_ITEMS} items")
    best = 0.0
    for given in _read(prediction):
        if not given or len(given) > 10 * len(wanted_readings[0]):  # an F1 below 0.2 is 0
            continue
        for wanted in wanted_readings:
            best = max(best, _f1([*map(_item, given)], [*map(_item, wanted)]))
            if best == 1.0:
                return best
    return best


def _item(text: str) -> str:
    """An item as it is compared, a record's without spaces around its colon."""
    text = normalise(text)
    if text[:1] in _QUOTES:
        text = text.strip("'\"")
    return _COLON.sub(":", text, count=1) if ":" in text else text


def _f1(given: list[str], wanted: list[str]) -> float:
    left = Counter(wanted)
    rest = []
    for item in given:
        if left[item] > 0:
            left[item] -= 1
        else:
            rest.append(item)
    missing = list(left.elements())
    hits = len(given) - len(rest) + _equal_numbers(rest, missing)
    return 2 * hits / (len(given) + len(wanted))


def _equal_numbers(given: list[str], wanted: list[str]) -> int:
    """How many items that differ as texts are the same numbers (under the same key)."""
    if not given or not wanted:
        return 0
    left = [found for item in wanted[:_MAX_NUMBERS] if (found := _keyed_number(item))]
    hits = 0
    for item in given[:_MAX_NUMBERS] if left else ():
        found = _keyed_number(item)
        if found is None:
            continue
        for index, (key, number) in enumerate(left):
            if key == found[0] and same_number(found[1], number):
                del left[index]
                hits += 1
                break
    return hits


def _keyed_number(item: str) -> tuple[str, Number] | None:
    if len(item) > 100 or not _DIGITS.search(item):
        number = read_number(item)
        return None if number is None else ("", number)
    key, colon, value = item.partition(":")
    number = read_number(value if colon else item)
    return None if number is None else (key if colon else "", number)
