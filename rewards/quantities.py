r"""Numbers as people write them: units, percent, currency, thousands separators, scale words.

    "1,234.5"  "1 234"  "-3"  "12 cm"  "50%"  "$3.2 million"  "\frac{1}{2}"  "1.5 * 10^3"
    "x = 9"  "nine"  "30 degrees"  and their full-width, Chinese and LaTeX spellings

Values are exact fractions: no rounding can make two answers equal.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from rewards.markup import clean

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS.split())}
_SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "k": 10**3,
    "thousand": 10**3,
    "万": 10**4,
    "mn": 10**6,
    "million": 10**6,
    "亿": 10**8,
    "bn": 10**9,
    "billion": 10**9,
    "trillion": 10**12,
}
# "5k" is five thousand, "5 K" five kelvin
_SCALE = re.compile(
    r"(?<=\d)k\b|(?:mn|bn|dozen|hundred|thousand|million|billion|trillion)\b|[万亿]", re.IGNORECASE
)
_UNIT_NAMES = {
    "%": "% percent percents percentage pct",
    "°": "° degree degrees deg 度",
    "°c": "°c celsius ℃",
    "°f": "°f fahrenheit",
    "$": "$ usd dollar dollars us$ 美元",
    "€": "€ eur euro euros 欧元",
    "£": "£ gbp pound pounds",
    "¥": "¥ cny rmb yuan 元 人民币",
    "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "m": "m meter meters metre metres 米",
    "km": "km kilometer kilometers kilometre kilometres 千米 公里",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams 毫克",
    "g": "g gram grams 克",
    "kg": "kg kilogram kilograms 千克 公斤",
    "ml": "ml milliliter milliliters millilitre millilitres 毫升",
    "l": "l liter liters litre litres 升",
    "s": "s sec secs second seconds 秒",
    "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时",
    "day": "day days 天",
    "year": "year years yr yrs 年",
    "cm2": "cm2 cm^2 sqcm",
    "m2": "m2 m^2 sqm",
    "cm3": "cm3 cm^3",
    "m3": "m3 m^3",
    "m/s": "m/s",
    "m/s2": "m/s2 m/s^2",
    "km/h": "km/h kmh kph",
    "n": "n newton newtons",
    "j": "j joule joules",
    "w": "w watt watts",
    "v": "v volt volts",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_CURRENCIES = "$€£¥"

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\ \d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"""
    (?:[A-Za-z]\w{{0,10}}\s*=\s*)?                                  # x =
    (?:(?:approximately|approx\.?|about|around|roughly|≈|~|=)\s*)?
    (?P<sign>[+-]?)\s*(?P<currency>[{_CURRENCIES}]?)\s*(?P<sign2>[+-]?)
    (?:\\[dt]?frac\s*{{\s*(?P<top>{_DIGITS})\s*}}\s*{{\s*(?P<bottom>{_DIGITS})\s*}}
      |(?P<digits>{_DIGITS})(?:\s*/\s*(?P<over>\d+))?)
    (?:e(?P<exponent>[+-]?\d{{1,2}})
      |\s*(?:×|\*|x|\\times|\\cdot)\s*10\s*\^\s*{{?\s*(?P<power>[+-]?\d{{1,2}})\s*}}?)?
    \s*(?P<rest>.*)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_UNIT = re.compile(r"[°%$€£¥Ω]?[^\W\d_]*(?:/[^\W\d_]+)?(?:(?<=[^\W\d_])\^?[23])?")
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|textbf|textrm|mbox)\s?\{([^{}]{0,40})\}"), r" \1 "),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree"), "°"),
    (re.compile(r"\\(?:[,;:! ]|quad)|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
)
_MAX_LENGTH = 80  # nobody writes a longer number; bounds the work on hostile text


@dataclass(frozen=True)
class Number:
    """A value and its unit ("" if none was written); the value of "50%" is 50, its unit "%"."""

    value: Fraction
    unit: str

    def unit_differs(self, other: Number) -> bool:
        """Whether both have a unit and the units are not the same."""
        return bool(self.unit and other.unit and self.unit != other.unit)

    def readings(self, other: Number) -> list[Fraction]:
        """The values this may mean beside `other`: a percentage may also be written as a share."""
        if self.unit == "%" and not other.unit:
            return [self.value, self.value / 100]
        if other.unit == "%" and not self.unit:
            return [self.value, self.value * 100]
        return [self.value]


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip("."))


def _unit(text: str, *, known_only: bool) -> str | None:
    """The unit written as `text` ("" for none), or None when it is no unit."""
    words = text.casefold().replace("²", "2").replace("³", "3").rstrip(".").split()
    if not words:
        return ""
    joined = "".join(words)
    if joined in _UNITS:
        return _UNITS[joined]
    if known_only or len(words) > 2 or not all(_UNIT.fullmatch(word) for word in words):
        return None
    return " ".join(words).removesuffix("s")


def read_number(text: str, *, known_units: bool = False) -> Number | None:
    """The number that a whole text is, or None; never finds a number inside other text.

    known_units: accept only units of the table ("3 doors" is then no number).

    >>> read_number("$3.2 million")
    Number(value=Fraction(3200000, 1), unit='$')
    >>> read_number("1,2,3") is None
    True
    """
    if len(text) > _MAX_LENGTH:
        return None
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-")
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    text = clean(text)
    if text.casefold() in NUMBER_WORDS:
        return Number(Fraction(NUMBER_WORDS[text.casefold()]), "")
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["sign2"]):
        return None
    value = _value(found)
    if value is None:
        return None
    rest = found["rest"]
    if word := _SCALE.match(text, found.start("rest")):
        value *= _SCALES[word[0].casefold()]
        rest = text[word.end() :].strip()
    if re.fullmatch(r"(?:st|nd|rd|th)\b.*", rest, re.IGNORECASE):  # an ordinal is no amount
        return None
    unit = _unit(rest, known_only=known_units)
    if unit is None or (unit and found["currency"] and unit != _UNITS[found["currency"]]):
        return None
    return Number(value, _UNITS[found["currency"]] if found["currency"] else unit)


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a `_NUMBER` match, sign and exponent included; None for a zero denominator."""
    if found["top"] is not None:
        top, bottom = _fraction(found["top"]), _fraction(found["bottom"])
    else:
        top, bottom = _fraction(found["digits"]), Fraction(found["over"] or 1)
    if bottom == 0:
        return None
    value = top / bottom * Fraction(10) ** int(found["exponent"] or found["power"] or 0)
    return -value if "-" in (found["sign"], found["sign2"]) else value


def same_number(given: Number, wanted: Number) -> bool:
    """Equal values in units that do not contradict each other (a missing unit is forgiven)."""
    return not given.unit_differs(wanted) and wanted.value in given.readings(wanted)
