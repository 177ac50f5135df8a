"""An answer as a matcher reads it, for a person to look at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from rewards.display import quoted
from rewards.match import CannotJudge
from rewards.match.choices import match_choice, option_letter
from rewards.match.grounding import read_places
from rewards.match.lists import read_list
from rewards.match.quantities import read_number
from rewards.match.texts import normalise, normalise_vqa

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_START_UP = 20.0  # seconds in which a process has math-verify imported, even on a busy machine


def read_as(
    matcher: str, text: str, options: Sequence[str] | None = None, *, limit: float = 5.0
) -> str:
    """What a matcher takes a text for, in words.

    Mathematics is parsed in a process of its own that `limit` seconds end.

    >>> read_as("number", "$3.2 million"), read_as("vqa", "The two dogs!")
    ('3200000 $', "'2 dogs'")
    """
    if matcher == "vqa":
        return quoted(normalise_vqa(text) or normalise(text))
    if matcher == "choice":
        return _option(text, options)
    if matcher in ("number", "relaxed"):
        return (
            _number(text) if read_number(text) or matcher == "number" else quoted(normalise(text))
        )
    if matcher == "list":
        items = read_list(text)
        return f"{len(items)} item(s): {', '.join(quoted(normalise(item)) for item in items[:20])}"
    if matcher == "math":
        return _parsed(text, limit)
    if matcher in ("box", "point"):
        return _places(text)
    return quoted(normalise(text))


def _option(text: str, options: Sequence[str] | None) -> str:
    if not options:
        letter = option_letter(text)
        return f"option {letter}" if letter else "no single option letter"
    for letter, option in zip(_LETTERS, options, strict=False):
        try:
            if match_choice(text, letter, options) == 1.0:
                return f"option {letter}: {option}"
        except CannotJudge:  # a matcher of options may refuse some lists
            continue
    return f"no single one of the {len(options)} options"


def _number(text: str) -> str:
    found = read_number(text)
    if found is None:
        return "no number"
    return f"{_value(found.value)} {found.unit}".rstrip()


def _places(text: str) -> str:
    found = read_places(text)
    if found is None:
        return "no box and no point, or one that is malformed"
    named = [("box", box) for box in found.boxes] + [("point", point) for point in found.points]
    return ", ".join(f"{name} {' '.join(f'{at:g}' for at in place)}" for name, place in named)


def _value(value: Fraction) -> str:
    if value.denominator == 1:
        return f"{value.numerator}" if abs(value.numerator) < 10**30 else f"{float(value):.6g}"
    about = f"{float(value):.10g}"
    exact = Fraction(about) == value
    return about if exact else f"{value.numerator}/{value.denominator} (about {about})"


@lru_cache(maxsize=64)  # several gold answers are compared with one final answer
def _parsed(text: str, limit: float) -> str:
    """What math-verify reads, asked in a process that can be ended."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from rewards.explain.readings import _answer; _answer()"],
            input=json.dumps(text).encode("ascii"),
            capture_output=True,
            timeout=_START_UP + limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not parsed within {limit:g} s"
    if done.returncode:
        return f"not parsed (the parser's process ended with {done.returncode})"
    found: list[str] = json.loads(done.stdout)
    return " or ".join(found) if found else "no expression that math-verify can read"


def _answer() -> None:
    """The process of `_parsed`: a text on stdin, the expressions on stdout."""
    import resource

    from rewards.match.maths import parse_expressions

    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    found = [str(item) for item in parse_expressions(json.load(sys.stdin))]
    print(json.dumps(list(dict.fromkeys(found))))
