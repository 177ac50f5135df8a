"""Matchers of numbers: equal amounts, and ChartQA's relaxed accuracy."""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.markup import clean, fold
from rewards.match.quantities import Number, read_number, same_number
from rewards.match.reasons import CannotJudge, Options
from rewards.match.texts import match_exact

RELAXED_SHARE = 20  # of the gold number: within a twentieth, 5% (ChartQA, section 5.1)
YEARS = range(1500, 2101)  # a gold integer in here is taken for a year
_YEAR = re.compile(r"\d{4}年?|[〇零一二三四五六七八九]{4}年?")


def _gold_number(gold: str) -> Number:
    number = read_number(gold)
    if number is None:
        raise CannotJudge(f"gold answer {gold[:40]!r} is not a number")
    return number


def match_number(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are the same number, in units that do not contradict each other.

    A unit missing on one side is forgiven, another unit is not, and none is converted: "12 cm" is
    not "0.12 m", for the question asked for one of them. A percentage is also its share ("50%",
    "50", "0.5"). No rounding: "0.33" is not "1/3". Raises CannotJudge when the gold is no number.
    """
    wanted = _gold_number(gold)
    given = read_number(prediction)
    return float(given is not None and same_number(given, wanted))


def match_relaxed(prediction: str, gold: str, options: Options = None) -> float:
    """ChartQA's relaxed accuracy: within 5% of a gold number, equal text otherwise.

    Masry et al. 2022, section 5.1. A gold year (a plain integer in 1500..2100) and a gold zero
    must be met exactly; a list ("[1, 2]" or "1, 2") is text. Raises CannotJudge for a blank gold.
    """
    wanted = read_number(gold)
    if wanted is None:
        listed = gold[1:-1].strip() if gold[:1] == "[" and gold[-1:] == "]" else ""
        return match_exact(prediction, gold) or (match_exact(prediction, listed) if listed else 0.0)
    given = read_number(prediction)
    if given is None:
        return 0.0
    if same_number(given, wanted):
        return 1.0
    if wanted.value == 0 or wanted.unit_differs(given) or _is_year(gold, wanted):
        return 0.0
    return float(any(_is_near(value, wanted.value) for value in given.readings(wanted)))


def _is_near(value: Fraction, wanted: Fraction) -> bool:
    """Whether a value is within the tolerance: in whole numbers, for Fractions are slow."""
    top, bottom = wanted.numerator, wanted.denominator
    distance = abs(value.numerator * bottom - top * value.denominator)
    return distance * RELAXED_SHARE <= abs(top) * value.denominator


def _is_year(gold: str, wanted: Number) -> bool:
    """Whether a gold number is written as a year: four plain digits, or with 年."""
    value = wanted.value  # a Fraction: `in` would compare it with every year
    if value.denominator != 1 or value.numerator not in YEARS:
        return False
    return _YEAR.fullmatch(clean(fold(gold))) is not None
