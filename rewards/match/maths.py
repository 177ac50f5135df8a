r"""Mathematical equality by math-verify (its own verdict: https://github.com/huggingface/Math-Verify).

What needs no algebra is decided without it (expressions.py): equal texts, plain numbers,
words. The rest is handed to math-verify's LaTeX parser, whole: never to its search for expressions
inside a text, which reads "3 or 4" as 4 and evaluates arithmetic as Python.

math-verify guards itself with SIGALRM, which works in a main thread only and is switched off here.
Sympy can take for ever on a hostile expression ("9**9**9**9"), so `verify` and `VerifierPool` run
`match_math` in a process that they kill when its time is over (rewards/pool/pool.py).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from rewards.markup import clean
from rewards.match.expressions import (
    as_latex,
    is_words,
    kind_of_list,
    read_amount,
    read_ratio,
    same_amount,
    same_words,
)
from rewards.match.reasons import CannotJudge
from rewards.match.units import units_differ

MAX_LENGTH = 2_000  # characters; no answer is longer, and regexes of math-verify are not linear


def decide_early(prediction: str, gold: str, options: object = None) -> float | None:
    """The score where it is plain without sympy, or None: equal texts, plain numbers, words.

    Linear in the texts' length. Raises CannotJudge for a blank gold or one of over `MAX_LENGTH`
    characters; a prediction so long is wrong.

    >>> decide_early("$x+1$", "x+1"), decide_early("7", "8"), decide_early("x+1", "1+x")
    (1.0, 0.0, None)
    """
    given, wanted = clean(prediction), clean(gold) or gold.strip()
    if not wanted:
        raise CannotJudge("gold answer is empty")
    if given == wanted or prediction.strip() == wanted:
        return 1.0
    if len(wanted) > MAX_LENGTH:
        raise CannotJudge(f"gold answer of {len(wanted):,} characters (limit {MAX_LENGTH:,})")
    if len(given) > MAX_LENGTH or not given:
        return 0.0
    if (wanted_amount := read_amount(wanted)) is not None:
        if (given_amount := read_amount(given)) is not None:
            return float(same_amount(given_amount, wanted_amount))
        return 0.0 if is_words(given) else None
    if is_words(wanted):
        return float(same_words(given, wanted))
    if (ratio := read_ratio(wanted)) is not None:
        return float(read_ratio(given) == ratio)
    return None


class _TimeoutWarning(logging.Filter):
    """math-verify warns that its timeouts are off; that is the point here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Timeout is disabled" not in str(record.msg)


@lru_cache(maxsize=1)
def _latex_only() -> tuple[Any, ...]:
    """How math-verify is to read: LaTeX alone, and no unit taken off (it takes "2m" for 2)."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig  # 0.7 s with sympy: only a run that needs it

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(_TimeoutWarning())
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return (LatexExtractionConfig(normalization_config=rules, boxed_match_priority=-1),)


@lru_cache(maxsize=1024)  # a question's rollouts share its gold answer
def _parse_latex(latex: str) -> list[Any]:
    """The expression that math-verify reads in LaTeX, in a list; [] for nothing."""
    import math_verify

    # no_fallback: what does not parse must not come back as a string
    found: list[Any] = math_verify.parse(
        f"${latex}$", _latex_only(), fallback_mode="no_fallback", parsing_timeout=None
    )
    return found


def parse_expressions(text: str) -> list[Any]:
    """What an answer is read as, [] for prose or what does not parse."""
    ready = as_latex(text)
    return [] if ready is None else _parse_latex(ready[0])


def match_math(prediction: str, gold: str, options: object = None) -> float:
    r"""1.0 when both are mathematically equal: "\frac{1}{2}" and "0.5", "x=3" and "3".

    Units may be missing on one side, but must not contradict. Rounded numbers are wrong below six
    decimals. It has no clock of its own and may run for ever; `verify` and `VerifierPool` guard it
    with one. Raises CannotJudge when the gold does not parse, is blank, or has over `MAX_LENGTH`
    characters. A prediction that does not parse is wrong.
    """
    early = decide_early(prediction, gold)
    if early is not None:
        return early
    wanted = as_latex(gold)
    wanted_parsed = [] if wanted is None else _parse_latex(wanted[0])
    if wanted is None or not wanted_parsed:
        raise CannotJudge(f"gold answer {gold[:60]!r} is no expression that math-verify can read")
    given = as_latex(prediction)
    if given is None or units_differ(given[1], wanted[1]):
        return 0.0
    if given[0] == wanted[0]:
        return 1.0
    if {kind_of_list(given[0]), kind_of_list(wanted[0])} == {"set", "tuple"}:
        return 0.0
    given_parsed = _parse_latex(given[0])
    if not given_parsed:
        return 0.0
    import math_verify

    # "x <= 3" is also the interval, whichever of them is gold
    same = math_verify.verify(
        wanted_parsed, given_parsed, timeout_seconds=None, allow_set_relation_comp=True
    )
    return float(same)
