r"""Numbers as people write them: units, percent, currency, thousands separators, scale words.

    "1,234.5"  "1 234"  "1,23,456"  "-3"  "12 cm"  "50%"  "$3.2 million"  "1 1/2"  "1½"  "x = 9"
    "\frac{1}{2}"  "1.5 * 10^3"  "twenty-one"  "一百二十"  "30^\circ"  full-width, too

Values are exact fractions: no rounding can make two answers equal. What only holds a number is
none: ranges, dates, times, ordinals, "9 or 10", "±5", "> 5", "(5)", "3x".
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.markup import clean, fold
from rewards.match.number_words import CHINESE_STARTERS, STARTERS, read_chinese, read_english
from rewards.match.units import CURRENCIES, read_unit, units_differ

_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "lakh": 10**5,
    "mn": 10**6,
    "mil": 10**6,
    "million": 10**6,
    "crore": 10**7,
    "bn": 10**9,
    "billion": 10**9,
    "tn": 10**12,
    "trillion": 10**12,
    "dozen": 12,
    "百": 10**2,
    "千": 10**3,
    "万": 10**4,
    "百万": 10**6,
    "亿": 10**8,
    "万亿": 10**12,
}
_SCALE = re.compile(
    r"(?:(?:mn|bn|tn|mil|hundred|thousand|lakh|million|crore|billion|trillion)s?|dozen)\b"
    r"|百万|万亿|[百万亿]|千(?![米克瓦])",
    re.IGNORECASE,
)
# "5k" is five thousand, "5 K" five kelvin; "5M" and "$5m" are millions, "5 m" metres
_LETTER_SCALE = re.compile(r"[kmb](?![^\W\d_])", re.IGNORECASE)

_DIGITS = (
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?"
    r"|\d{1,3}(?:\ \d{3})+(?![\d/])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+"
)
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?)\s*(?P<currency>(?:us\$|[$€£¥₹]|(?:usd|eur|gbp|cny|rmb|inr|rs\.?|rm)(?=[\s\d]))?)
    \s*(?P<sign2>[+-]?)\s*
    (?:10\s?\^\s?\{{?\s?(?P<base>[+-]?\d{{1,3}})\s?\}}?
      |(?:(?P<whole>\d{{1,15}})(?:\s+|\s*\+\s*|\s*and\s+))?
         (?P<top>[+-]?\d{{1,15}})\s*/\s*(?P<bottom>-?\d{{1,15}})(?![\d.,])
      |(?P<digits>{_DIGITS})
         (?:e(?P<exponent>[+-]?\d{{1,3}})(?!\d)
           |\s*(?:×|\*|x|·|\\times|\\cdot)\s*10\s?\^\s?\{{?\s?(?P<power>[+-]?\d{{1,3}})\s?\}}?)?)
    \s*(?P<rest>.*)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_PLAIN = re.compile(r"(-?)(\d{1,18})(?:\.(\d{1,18}))?")
_SENTENCE = re.compile(  # "The area is 24", "答案是 5"; but not "it is not 5" or "no bar is 5"
    r"(?!.{0,60}\b(?i:not?|none|neither|never)\b)"
    r"[A-Za-z][A-Za-z' ]{0,40}\s(?:is|are|equals)\s*:?\s+"
    r"|[\u4e00-\u9fff]{0,12}(?<!不)[是为]\s*[:：]?\s*"
)
_LEAD = re.compile(
    r"(?:[A-Za-z]\w{0,10}(?:\s\w{1,10})?\s*[=≈]\s*)?"
    r"(?:(?:approximately|approx\.?|about|around|roughly|大约|约|≈|~|=)\s*"
    r"|(?:in\s|(?:in\s)?(?:the\s)?year\s)\s*(?=[12]\d{3}$))?",
    re.IGNORECASE,
)
_FRAC = re.compile(
    r"(\d?)\s?\\[dtc]?frac\s?"
    r"(?:(\d)\s?(\d)(?!\d)|\{\s?([+-]?[\d,.]{1,20})\s?\}\s?(?:\{\s?(-?[\d,.]{1,20})\s?\}|(\d)))"
)
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|textbf|textrm|mathbf|mbox)\s?\{([^{}]{0,40})\}"), r" \1 "),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree"), "°"),
    (re.compile(r"\\(?:[,;:! ]|quad)|~(?=\S)"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\^\s?\{\s?([23])\s?\}"), r"^\1"),
    (re.compile(r"\s\^"), "^"),
)
# "$12$ cm", "\(12\) cm": a number in its delimiters, and a unit behind them
_MATHS = re.compile(r"\$(?=\S)([^$]*[^$\s])\$(?=\s|$)|\\\((.*?)\\\)")
_HINT = re.compile(r"\d|[〇零一二两三四五六七八九十]")
_NOT_AMOUNTS = re.compile(r"(?:st|nd|rd|th)\b|['!:;?]", re.IGNORECASE)
_DECADE = re.compile(r"[12]\d\d0s")
_MAX_LENGTH = 80  # nobody writes a longer number; bounds the work on hostile text


class Number(NamedTuple):
    """A value and its unit ("" if none was written); the value of "50%" is 50, its unit "%"."""

    value: Fraction
    unit: str

    def unit_differs(self, other: Number) -> bool:
        """Whether both have a unit and the units are not the same."""
        return units_differ(self.unit, other.unit)

    def readings(self, other: Number) -> list[Fraction]:
        """The values this may mean beside `other`: a percentage may also be written as a share."""
        if self.unit == "%" and not other.unit:
            return [self.value, self.value / 100]
        if other.unit == "%" and not self.unit:
            return [self.value, self.value * 100]
        return [self.value]


def read_number(text: str, *, known_units: bool = False) -> Number | None:
    """The number that a whole text is, or None; never finds a number inside other text.

    known_units: accept only units of the table ("3 doors" is then no number).

    >>> read_number("$3.2 million")
    Number(value=Fraction(3200000, 1), unit='$')
    >>> read_number("1,2,3") is None
    True
    """
    text = text.strip()
    if plain := _PLAIN.fullmatch(text):
        return Number(_plain_value(*plain.groups()), "")
    if len(text) > _MAX_LENGTH:
        return None
    text = fold(text)
    if _HINT.search(text) is None and _first_word(text) not in STARTERS:
        return None
    text = _MATHS.sub(_inside, text)
    if "\\" in text or "^" in text or "{" in text:
        text = _plain_latex(text)
    text = clean(text).replace("~", " ") if "~" in text[1:] else clean(text)
    if plain := _PLAIN.fullmatch(text):
        return Number(_plain_value(*plain.groups()), "")
    if not known_units and (sentence := _SENTENCE.match(text)):
        text = text[sentence.end() :]
    text = text[_LEAD.match(text).end() :]  # type: ignore[union-attr]  # it matches nothing, too
    found = _NUMBER.fullmatch(text)
    return _read_words(text, known_units) if found is None else _read_digits(found, known_units)


def _first_word(text: str) -> str:
    words = re.findall(r"[a-z]+", text[:40].lower())
    skip = {"minus", "negative", "about", "around", "roughly", "approximately", "approx"}
    return next((word for word in words if word not in skip), "")


def _inside(found: re.Match[str]) -> str:
    return (found[1] or found[2] or "").strip()


def _plain_latex(text: str) -> str:
    r"""The LaTeX of numbers as plain text: \frac, \text, degrees, spaces, {,}."""
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    return _FRAC.sub(_plain_frac, text)


def _plain_frac(found: re.Match[str]) -> str:
    whole, top, bottom, long_top, long_bottom, short_bottom = found.groups()
    top, bottom = top or long_top, bottom or long_bottom or short_bottom
    top, bottom = top.replace(",", ""), bottom.replace(",", "")
    if "." in top or "." in bottom:  # "\frac{1.5}{2}" is "15/20"
        places = max(len(part.partition(".")[2]) for part in (top, bottom))
        top, bottom = (
            part.replace(".", "") + "0" * (places - len(part.partition(".")[2]))
            for part in (top, bottom)
        )
    return f"{whole} {top}/{bottom}" if whole else f"{top}/{bottom}"


def _plain_value(sign: str, whole: str, decimals: str | None) -> Fraction:
    digits = int(sign + whole + (decimals or ""))
    return Fraction(digits, 10 ** len(decimals)) if decimals else Fraction(digits)


def _fraction(digits: str) -> Fraction:
    whole, _, decimals = digits.replace(",", "").replace(" ", "").partition(".")
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals))


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a `_NUMBER` match, sign and exponent included; None where it makes none."""
    if found["sign"] and found["sign2"]:
        return None
    if found["base"]:
        value = Fraction(10) ** int(found["base"])
    elif found["top"]:
        top, bottom = int(found["top"]), int(found["bottom"])
        if bottom == 0 or (found["whole"] and not 0 < top < bottom):
            return None
        value = int(found["whole"] or 0) + Fraction(top, bottom)
    else:
        value = _fraction(found["digits"])
        if exponent := found["exponent"] or found["power"]:
            value *= Fraction(10) ** int(exponent)
    return -value if "-" in (found["sign"], found["sign2"]) else value


def _scale(rest: str, *, money: bool, attached: bool) -> tuple[int, str]:
    """The factor that begins what follows the digits ("million", "k", "万"), and what is left."""
    if word := _SCALE.match(rest):
        name = word[0].lower()
        return _SCALES.get(name) or _SCALES[name.removesuffix("s")], rest[word.end() :].lstrip()
    if letter := _LETTER_SCALE.match(rest):  # "5M" and "$5m" but not "5 m"
        if letter[0] in "kK" and (attached or money):
            return 1000, rest[1:].lstrip()
        if letter[0] in "MB" or (letter[0] in "mb" and money):
            return _SCALES[letter[0].lower() + "n"], rest[1:].lstrip()
    return 1, rest


def _read_digits(found: re.Match[str], known_units: bool) -> Number | None:
    """The number of a `_NUMBER` match, its scale word and its unit."""
    value = _value(found)
    if value is None:
        return None
    rest, currency = found["rest"], ""
    if found["currency"]:
        currency = CURRENCIES[found["currency"].lower()]
    if rest:
        attached = not found.string[found.start("rest") - 1].isspace()
        if _NOT_AMOUNTS.match(rest) or (
            rest == "s" and attached and _DECADE.fullmatch(found.string)
        ):
            return None  # "1st", "10:30", "9!", "1990s"
        scale, rest = _scale(rest, money=bool(currency), attached=attached)
        value *= scale
    unit = read_unit(rest, known_only=known_units)
    if unit is None or (unit and currency and unit != currency):
        return None
    return Number(value, currency or unit)


def _read_words(text: str, known_units: bool) -> Number | None:
    """The number that a text spells, with its unit: "twenty-one cm", "minus two", "百分之五十"."""
    sign = 1
    for word in ("minus ", "negative ", "负"):
        if text[: len(word)].casefold() == word:
            sign, text = -1, text[len(word) :]
            break
    if text.startswith("百分之"):
        inner = read_number(text[3:], known_units=True)
        return None if inner is None or inner.unit else Number(sign * inner.value, "%")
    if sign == -1 and text[:1].isdigit():
        inner = read_number(text, known_units=known_units)
        return None if inner is None else Number(-inner.value, inner.unit)
    if text[:1] in CHINESE_STARTERS:
        chinese = read_chinese(text)
        if chinese is None:
            return None
        unit = read_unit(text[chinese[1] :], known_only=known_units, classifier=True)
        return None if unit is None else Number(sign * chinese[0], unit)
    words = text.casefold().replace("-", " ").split()
    english = read_english(words)
    if english is None:
        return None
    unit = read_unit(" ".join(words[english[1] :]), known_only=known_units)
    return None if unit is None else Number(sign * english[0], unit)


def same_number(given: Number, wanted: Number) -> bool:
    """Equal values in units that do not contradict each other (a missing unit is forgiven)."""
    if given.unit == wanted.unit:
        return given.value == wanted.value
    return not given.unit_differs(wanted) and wanted.value in given.readings(wanted)
