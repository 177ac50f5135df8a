"""One completion against its gold answer: extraction, then a matcher, then a `Verdict`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rewards.extract import extract
from rewards.match import MATCHERS, get_matcher
from rewards.quantities import read_number
from rewards.reasons import CannotJudge

_CAPITAL = re.compile(r"\(?[A-Z]\)?\.?")


class Outcome(StrEnum):
    """How a verdict came out; equal to its own string.

    no_answer: the completion has no final answer. cannot_judge: the gold answer means nothing to
    its matcher, or the matcher cannot decide. timeout: a matcher ran past its limit (only a pool
    with a clock gives it). The last two are neither right nor wrong and are never in a pair.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    CANNOT_JUDGE = "cannot_judge"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Verdict:
    """What became of one completion.

    extracted: the final answer, None without one. matcher: which matcher decided (or would have).
    score: in [0, 1], None when it cannot be judged. format_ok: the prompt's style was followed.
    reason: why it cannot be judged, else None.
    """

    outcome: Outcome
    extracted: str | None
    matcher: str
    score: float | None
    format_ok: bool
    reason: str | None = None


def choose_matcher(gold: str, options: Sequence[str] | None = None) -> str:
    """The matcher for a gold answer when none is named.

    choice when there are options or the gold is one capital letter, number when the gold is a
    number (with a known unit or none), otherwise exact.

    >>> choose_matcher("B"), choose_matcher("12 cm"), choose_matcher("3 Doors Down")
    ('choice', 'number', 'exact')
    """
    if options or _CAPITAL.fullmatch(gold.strip()):
        return "choice"
    return "number" if read_number(gold, known_units=True) is not None else "exact"


def request_fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the "matcher" or the "options" that a question asks for, or None.

    >>> request_fault({"matcher": "psychic"})
    "matcher 'psychic' is unknown; one of: exact, vqa, choice, number, relaxed, anls, math"
    """
    matcher, options = record.get("matcher"), record.get("options")
    if matcher is not None and matcher not in MATCHERS:
        return f"matcher {matcher!r} is unknown; one of: {', '.join(MATCHERS)}"
    if options is not None and not (
        isinstance(options, list) and all(isinstance(item, str) for item in options)
    ):
        return "field 'options' is not a list of strings"
    return None


def verify(
    completion: str,
    answer: str | Sequence[str],
    *,
    matcher: str | None = None,
    options: Sequence[str] | None = None,
    style: str = "auto",
) -> Verdict:
    """Judge one completion against its gold answer, or against the best of several.

    matcher: one of `MATCHERS`; None chooses by the gold answer (`choose_matcher`). options: the
    texts of a multiple-choice question, in order. style: one of `extract.STYLES`.
    Raises ValueError for an unknown matcher or style, or an empty list of answers.

    >>> verify("The answer must be 5. Final answer: 15", "5").outcome
    <Outcome.WRONG: 'wrong'>
    >>> verify("I cannot tell.", "5").outcome == "no_answer"
    True
    """
    golds = [answer] if isinstance(answer, str) else list(answer)
    if not golds:
        raise ValueError("answer is an empty list; give at least one gold answer")
    names = [matcher or choose_matcher(gold, options) for gold in golds]
    for name in names:
        get_matcher(name)
    found = extract(completion, style)
    if found.text is None:
        return Verdict(Outcome.NO_ANSWER, None, names[0], 0.0, found.format_ok)
    best: tuple[float, str] | None = None
    reason = None
    for gold, name in zip(golds, names, strict=True):
        try:
            score = MATCHERS[name](found.text, gold, options)
        except CannotJudge as error:
            reason = reason or str(error)
            continue
        if best is None or score > best[0]:
            best = (score, name)
        if score == 1.0:
            break
    if best is None:
        outcome = Outcome.CANNOT_JUDGE
        return Verdict(outcome, found.text, names[0], None, found.format_ok, reason)
    outcome = Outcome.CORRECT if best[0] > 0 else Outcome.WRONG
    return Verdict(outcome, found.text, best[1], best[0], found.format_ok)
