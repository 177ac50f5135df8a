"""Numbers spelled in words, English and Chinese.

>>> read_english("one hundred and five apples".split())
(Fraction(105, 1), 4)
>>> read_chinese("三百二十五元")
(Fraction(325, 1), 5)
"""

from __future__ import annotations

from fractions import Fraction

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_SMALL = {word: value for value, word in enumerate(_UNITS.split())}
_DECADES = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * value for value, word in enumerate(_DECADES.split(), 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4,
    "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "seventh": 7, "sevenths": 7,
    "eighth": 8, "eighths": 8, "ninth": 9, "ninths": 9, "tenth": 10, "tenths": 10,
}  # fmt: skip
NUMBER_WORDS = frozenset([*_SMALL, *_TENS, *_SCALES, "hundred", "dozen"])
STARTERS = NUMBER_WORDS - {"hundred", *_SCALES} | {"a", "an", "half"}


def read_english(words: list[str], start: int = 0) -> tuple[Fraction, int] | None:
    """The number that words spell from `start` on, and where it ends; None where none starts.

    "two hundred and five", "a dozen", "two thirds", "one and a half", "three point five"; words
    already apart at their hyphens. "one two" is a one, ending before the two.
    """
    whole = _read_whole(words, start)
    if whole is None:
        article = words[start] in ("a", "an") if start < len(words) else False
        at = start + article
        if at < len(words) and words[at] in _PARTS and (article or words[at] == "half"):
            return Fraction(1, _PARTS[words[at]]), at + 1
        return None
    value, end = whole
    following = words[end : end + 3]
    if following[:1] and following[0] in _PARTS and 0 < value < 10:
        return Fraction(value, _PARTS[following[0]]), end + 1
    if following[:2] == ["and", "a"] and following[2:] and following[2] in _PARTS:
        return value + Fraction(1, _PARTS[following[2]]), end + 3
    if following[:1] == ["point"]:
        digits = []
        for word in words[end + 1 : end + 16]:
            if _SMALL.get(word, 10) > 9:
                break
            digits.append(str(_SMALL[word]))
        if digits:
            return value + Fraction(int("".join(digits)), 10 ** len(digits)), end + 1 + len(digits)
    return Fraction(value), end


def _read_whole(words: list[str], start: int) -> tuple[int, int] | None:
    """The whole number from `start` on, and where it ends."""
    total, current, room, ceiling, index = 0, 0, 0, 10**15, start
    seen = False  # room: below which value a word may still be added to `current`
    if words[start : start + 1] in (["a"], ["an"]) and words[start + 1 : start + 2]:
        if words[start + 1] not in ("hundred", "dozen", *_SCALES):
            return None
        current, seen, index = 1, True, start + 1
    else:
        room = 100
    while index < len(words):
        word = words[index]
        small = _SMALL.get(word, _TENS.get(word))
        if small is not None and small < room and (small or not seen):
            current, room = current + small, 10 if word in _TENS else 0
            seen = True
        elif word == "hundred" and seen and 0 < current < 100:
            current, room = current * 100, 100
        elif word in _SCALES and seen and current and _SCALES[word] < ceiling:
            total, current, ceiling, room = total + current * _SCALES[word], 0, _SCALES[word], 100
        elif word == "dozen" and (not seen or 0 < current < 100) and not total:
            return (current or 1) * 12, index + 1
        elif word == "and" and seen and room == 100 and _adds(words, index + 1):
            pass
        else:
            break
        index += 1
    return (total + current, index) if seen else None


def _adds(words: list[str], index: int) -> bool:
    """Whether the word at `index` is a small number ("and five", not "and a half")."""
    return index < len(words) and (_SMALL.get(words[index]) or _TENS.get(words[index]) or 0) > 0


def english_runs(words: list[str]) -> list[str]:
    """Words with each spelled whole number replaced by its digits.

    >>> english_runs("twenty one dogs and two hundred cats".split())
    ['21', 'dogs', 'and', '200', 'cats']
    """
    done, index = [], 0
    while index < len(words):
        found = _read_whole(words, index) if words[index] in NUMBER_WORDS else None
        if found is None:
            bare = {"hundred": 100, **_SCALES}.get(words[index])
            done.append(words[index] if bare is None else str(bare))
            index += 1
        else:
            done.append(str(found[0]))
            index = found[1]
    return done


_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
CHINESE_STARTERS = frozenset([*_DIGITS, "十"])


def read_chinese(text: str) -> tuple[Fraction, int] | None:
    """The number at the start of a text in Chinese numerals, and where it ends, or None.

    "十二", "一百二十", "三点五", "二〇一九" (digit by digit), "一万二" (12,000, as it is spoken).
    """
    end = 0
    while end < len(text) and (text[end] in _DIGITS or text[end] in _PLACES or text[end] in "万亿"):
        end += 1
    run = text[:end]
    if not run or run[0] not in CHINESE_STARTERS:
        return None
    if len(run) > 1 and all(char in _DIGITS for char in run):
        if "两" in run:
            return None
        whole = int("".join(str(_DIGITS[char]) for char in run))
    else:
        places = _read_places(run)
        if places is None:
            return None
        whole = places
    decimals = ""
    if text[end : end + 1] == "点":
        at = end + 1
        while at < len(text) and text[at] in _DIGITS:
            decimals += str(_DIGITS[text[at]])
            at += 1
        if not decimals:
            return None
        end = at
    if decimals and text[end : end + 1] and text[end] in _MYRIADS:  # "一点五万"
        value = (whole + Fraction(int(decimals), 10 ** len(decimals))) * _MYRIADS[text[end]]
        return value, end + 1
    return whole + Fraction(int(decimals or 0), 10 ** len(decimals)), end


def _read_places(run: str) -> int | None:
    """The value of numerals with places ("一百二十"), or None where they make no number."""
    total = section = 0
    digit: int | None = None
    place = 10**4  # the last place read: within a section they fall
    for char in run:
        if char in _DIGITS:
            if digit is not None and digit != 0:
                return None
            digit = _DIGITS[char]
        elif char in _PLACES:
            if _PLACES[char] >= place or (digit is None and char != "十"):
                return None
            section += (1 if digit is None else digit) * _PLACES[char]
            digit, place = None, _PLACES[char]
        else:  # "二千万" is added to "一亿", "一万" is multiplied by "亿"
            section += digit or 0
            total = (total + section) * 10**8 if char == "亿" else total + section * 10**4
            section, digit, place = 0, None, 10**4
    if digit:
        spoken = run[-2:-1] and run[-2] in "百千万亿"  # "一百二" is 120
        scale = (_PLACES | _MYRIADS)[run[-2]] // 10 if spoken else 1
        return total + section + digit * scale
    return total + section
