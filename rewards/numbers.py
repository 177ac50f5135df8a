"""Matchers of numbers: equal amounts, and ChartQA's relaxed accuracy."""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.quantities import Number, read_number, same_number
from rewards.reasons import CannotJudge, Options
from rewards.texts import match_exact

RELAXED_TOLERANCE = Fraction(5, 100)  # ChartQA, section 5.1
YEARS = range(1500, 2101)  # a gold integer in here is taken for a year


def _gold_number(gold: str) -> Number:
    number = read_number(gold)
    if number is None:
        raise CannotJudge(f"gold answer {gold!r} is not a number")
    return number


def match_number(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are the same number, in units that do not contradict each other.

    A unit missing on one side is forgiven, another unit is not. Raises CannotJudge when the gold
    is no number.
    """
    wanted = _gold_number(gold)
    given = read_number(prediction)
    return float(given is not None and same_number(given, wanted))


def match_relaxed(prediction: str, gold: str, options: Options = None) -> float:
    """ChartQA's relaxed accuracy: within 5% of a gold number, equal text otherwise.

    A gold year (a plain integer in 1500..2100) and a gold zero must be met exactly.
    Raises CannotJudge for an empty gold.
    """
    wanted = read_number(gold)
    if wanted is None:
        return match_exact(prediction, gold)
    given = read_number(prediction)
    if given is None:
        return 0.0
    if same_number(given, wanted):
        return 1.0
    year = re.fullmatch(r"\d{4}", gold.strip()) is not None and int(gold) in YEARS
    if year or wanted.value == 0 or wanted.unit_differs(given):
        return 0.0
    allowed = abs(wanted.value) * RELAXED_TOLERANCE
    return float(any(abs(value - wanted.value) <= allowed for value in given.readings(wanted)))
