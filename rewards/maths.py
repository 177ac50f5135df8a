r"""Mathematical equality by math-verify (its own verdict: https://github.com/huggingface/Math-Verify).

math-verify guards itself with SIGALRM, which works in a main thread only and is switched off here.
Sympy can take for ever on a hostile expression ("9**9**9**9"), so `verify` and `VerifierPool` run
`match_math` in a process that they kill when its time is over (rewards/pool.py).
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from rewards.markup import clean
from rewards.reasons import CannotJudge

MAX_LENGTH = 2_000  # characters; no answer is longer, and regexes of math-verify are not linear
_ARITHMETIC = re.compile(r"[0-9.+*/() -]*")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def decide_early(prediction: str, gold: str, options: object = None) -> float | None:
    """The score where it is plain without sympy, or None: equal texts, and two whole numbers.

    Linear in the texts' length. Raises CannotJudge for a text of over `MAX_LENGTH` characters.

    >>> decide_early("$x+1$", "x+1"), decide_early("7", "8"), decide_early("x+1", "1+x")
    (1.0, 0.0, None)
    """
    given, wanted = clean(prediction), clean(gold)
    if wanted and given == wanted:
        return 1.0
    for side, text in (("gold answer", wanted), ("prediction", given)):
        if len(text) > MAX_LENGTH:
            raise CannotJudge(f"{side} of {len(text):,} characters (limit {MAX_LENGTH:,})")
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(wanted):
        return float(int(given) == int(wanted))
    return None


class _TimeoutWarning(logging.Filter):
    """math-verify warns that its timeouts are off; that is the point here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Timeout is disabled" not in str(record.msg)


@lru_cache(maxsize=1024)  # a question's rollouts share its gold answer
def _parse(text: str) -> list[Any]:
    """What math-verify reads in an answer: as LaTeX first, then as plain text; [] for nothing."""
    import math_verify  # 0.7 s with sympy: only a run that needs it pays

    for name in ("math_verify.parser", "math_verify.grader"):
        logger = logging.getLogger(name)
        if not any(isinstance(item, _TimeoutWarning) for item in logger.filters):
            logger.addFilter(_TimeoutWarning())
    plain = clean(text)
    forms = [f"${plain.replace('**', '^')}$", plain]  # in LaTeX "9**2" would be 9 and a remainder
    if "**" in plain and _ARITHMETIC.fullmatch(plain):
        forms.reverse()  # there a tower of powers is read from the right
    for form in forms:
        # no_fallback: what does not parse must not come back as a string
        found: list[Any] = math_verify.parse(
            form, fallback_mode="no_fallback", parsing_timeout=None
        )
        if found:
            return found
    return []


def match_math(prediction: str, gold: str, options: object = None) -> float:
    r"""1.0 when both are mathematically equal: "\frac{1}{2}" and "0.5", "x=3" and "3".

    It has no clock of its own and may run for ever; `verify` and `VerifierPool` guard it with one.
    Raises CannotJudge when the gold does not parse, or for a text of over `MAX_LENGTH` characters.
    A prediction that does not parse is wrong.
    """
    early = decide_early(prediction, gold)
    if early is not None:
        return early
    wanted = _parse(gold)
    if not wanted:
        raise CannotJudge(f"gold answer {gold!r} is no expression that math-verify can read")
    given = _parse(prediction)
    if not given:
        return 0.0
    import math_verify

    return float(math_verify.verify(wanted, given, timeout_seconds=None))
