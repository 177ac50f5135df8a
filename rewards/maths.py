r"""Mathematical equality by math-verify (its own verdict: https://github.com/huggingface/Math-Verify).

math-verify guards itself with SIGALRM, which works in a main thread only and is switched off here.
Until verdicts run in a pool of processes with a clock of its own, an expression that could keep
sympy busy is not handed to it: the verdict is then `CannotJudge`, not a hang.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from rewards.markup import clean
from rewards.reasons import CannotJudge

MAX_LENGTH = 300
MAX_DEPTH = 20
_POWER = r"(?:\^|\*\*)"
_DANGERS = (
    (
        re.compile(rf"\d[\s}})]{{0,9}}{_POWER}[\s{{(\\]{{0,9}}[\d.]+[\s}})]{{0,9}}{_POWER}"),
        "a tower of powers",
    ),
    (re.compile(r"(?:\^|\*\*)[\s{(+-]{0,9}\d{4,}"), "an exponent of four digits or more"),
    (re.compile(r"\d{4,}[\s})]{0,9}!|![\s})]{0,9}!"), "a large factorial"),
    (re.compile(r"\\(?:int|sum|prod|lim|binom)|\\(?:o)?iint"), "a sum, product, integral or limit"),
    (re.compile(r"\d{60,}"), "a number of sixty digits or more"),
)


def danger(text: str) -> str | None:
    """Why an expression is not handed to sympy without a clock, or None."""
    if len(text) > MAX_LENGTH:
        return f"an expression of {len(text)} characters (limit {MAX_LENGTH})"
    depth = deepest = 0
    for char in text:
        depth += (char in "({[") - (char in ")}]")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return f"an expression nested {deepest} deep (limit {MAX_DEPTH})"
    for pattern, name in _DANGERS:
        if pattern.search(text):
            return name
    return None


class _TimeoutWarning(logging.Filter):
    """math-verify warns that its timeouts are off; that is the point here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Timeout is disabled" not in str(record.msg)


def _parse(text: str) -> list[Any]:
    """What math-verify reads in an answer: as LaTeX first, then as plain text; [] for nothing."""
    import math_verify  # 0.7 s with sympy: only a run that needs it pays

    for name in ("math_verify.parser", "math_verify.grader"):
        logger = logging.getLogger(name)
        if not any(isinstance(item, _TimeoutWarning) for item in logger.filters):
            logger.addFilter(_TimeoutWarning())
    plain = clean(text)
    for form in (f"${plain}$", plain):
        # no_fallback: what does not parse must not come back as a string
        found: list[Any] = math_verify.parse(
            form, fallback_mode="no_fallback", parsing_timeout=None
        )
        if found:
            return found
    return []


def match_math(prediction: str, gold: str, options: object = None) -> float:
    r"""1.0 when both are mathematically equal: "\frac{1}{2}" and "0.5", "x=3" and "3".

    Raises CannotJudge when the gold does not parse or either side could hang sympy. A prediction
    that does not parse is wrong.
    """
    if clean(gold) and clean(prediction) == clean(gold):
        return 1.0
    for side, text in (("gold answer", gold), ("prediction", prediction)):
        if reason := danger(text):
            raise CannotJudge(f"{side} holds {reason}")
    wanted = _parse(gold)
    if not wanted:
        raise CannotJudge(f"gold answer {gold!r} is no expression that math-verify can read")
    given = _parse(prediction)
    if not given:
        return 0.0
    import math_verify

    return float(math_verify.verify(wanted, given, timeout_seconds=None))
