"""Verdicts that are likely wrong: rules over one completion, its verdict and other matchers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.markup import clean
from rewards.match import MATCHERS
from rewards.match.quantities import read_number
from rewards.match.texts import normalise
from rewards.verdict import (
    GROUNDING,
    Comparison,
    Outcome,
    Task,
    Verdict,
    choose_matcher,
    digits_of,
)

KINDS = {
    "changed": "Stored verdicts that differ from today's",
    "false negative": "Likely false negatives: rejected, though right",
    "false positive": "Likely false positives: accepted, though wrong",
    "not judged": "Not judged",
    "cut off": "Cut off before an answer",
}
# How likely a wrong verdict is a mistake when another matcher accepts. Judgement, not measurement:
# it ranks what a person looks at first.
_WEIGHTS = {
    "exact": 0.95, "choice": 0.9, "number": 0.9, "math": 0.85, "vqa": 0.8, "list": 0.7,
    "anls": 0.5, "relaxed": 0.15,
}  # fmt: skip
_ALIKE = 0.9  # ANLS that is a slip of the pen
_MOST_GOLDS = 10  # more are not looked at
_LONGEST = 500  # characters of an answer; longer ones are no short answers
_SIGNS = re.compile(r"[<>≤≥=^_/*\\√±!|+~:]|-(?=\d)")
_SEVERAL = re.compile(r"\b(?:or|and|not|either|neither|versus|vs)\b|[或和与不]|,\s", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps)\b|或者?|也许", re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.){0,2000}'|\"(?:[^\"\\]|\\.){0,2000}\"")
_LETTER = re.compile(r"[(\[]?[A-Za-z][)\]]?\.?")


@dataclass(frozen=True)
class Finding:
    """Why a verdict is looked at: one of `KINDS`, a pattern that others share, how likely a mistake
    it is, and the gold answer that it is about.
    """

    kind: str
    pattern: str
    likelihood: float
    gold: str


def find(
    record: Mapping[str, Any], task: Task, verdict: Verdict, stored: str | None = None
) -> list[Finding]:
    """What is to be said of a verdict, by rules that cost no more than matching does."""
    found = []
    if stored is not None and stored != verdict.outcome:
        pattern = f"stored as {_words(stored)}, now {_words(verdict.outcome)} by {verdict.matcher}"
        found.append(Finding("changed", pattern, 1.0, _gold(task)))
    outcome = verdict.outcome
    if outcome in (Outcome.CANNOT_JUDGE, Outcome.TIMEOUT):
        found.append(Finding("not judged", reason_pattern(verdict), 1.0, _gold(task)))
    elif outcome == Outcome.NO_ANSWER:
        found += _no_answer(record, task)
    elif len(verdict.extracted or "") > _LONGEST:
        pass
    elif outcome == Outcome.WRONG:
        found += _false_negative(task, verdict)
    else:
        found += _false_positive(task, verdict)
    return found


def wants_math(task: Task, verdict: Verdict) -> bool:
    """Whether mathematics, which is slow, may say something else of a wrong verdict."""
    text = verdict.extracted or ""
    if verdict.outcome != Outcome.WRONG or "math" in used_matchers(task) or len(text) > _LONGEST:
        return False
    if not any(map(str.isdigit, text)) and not _SIGNS.search(text):
        return False
    forms = {choose_matcher(gold, None) for gold in task.answers[:_MOST_GOLDS]}
    # two numbers are no matter for mathematics: the matcher number has read both
    return "math" in forms or ("number" in forms and read_number(text) is None)


def math_finding(task: Task, verdict: Verdict) -> Finding:
    """The finding that mathematics accepts what was rejected."""
    return Finding(
        "false negative", f"wrong by {verdict.matcher}, math accepts", _WEIGHTS["math"], _gold(task)
    )


def reason_pattern(verdict: Verdict) -> str:
    """Why something was not judged, without the texts that differ from row to row.

    >>> from rewards import verify
    >>> reason_pattern(verify("Final answer: 9", "nine of them", matcher="number"))
    'cannot judge by number: gold answer … is not a number'
    """
    reason = _QUOTED.sub("…", (verdict.reason or "no reason given")[:4000])
    reason = re.sub(r"\d[\d,.]*", "N", reason) if len(reason) > 20 else reason
    return f"{_words(verdict.outcome)} by {verdict.matcher}: {reason[:200]}"


def used_matchers(task: Task) -> set[str]:
    """The matchers that were asked about a task."""
    return set(task.matchers) or {choose_matcher(gold, task.options) for gold in task.answers}


def _words(outcome: object) -> str:
    return str(outcome).replace("_", " ")


def _gold(task: Task) -> str:
    return " | ".join(task.answers[:_MOST_GOLDS])


# -- rejected ----------------------------------------------------------------------------------


def _false_negative(task: Task, verdict: Verdict) -> list[Finding]:
    """The best reason to think that a wrong verdict is a mistake."""
    used, answer = used_matchers(task), verdict.extracted or ""
    found = []
    for gold in task.answers[:_MOST_GOLDS]:
        if len(gold) > _LONGEST or used & set(GROUNDING):
            continue
        for name, weight in _WEIGHTS.items():
            if name not in used and _accepts(name, answer, gold, task):
                if name in ("vqa", "anls", "list") and _signs(answer) != _signs(gold):
                    weight = 0.2  # "x < 3" and "x > 3" differ by what these leave out
                pattern = f"wrong by {verdict.matcher}, {name} accepts"
                found.append(Finding("false negative", pattern, weight, gold))
        found += _contained(task, verdict, answer, gold)
    return [max(found, key=lambda one: one.likelihood)] if found else []


def _accepts(name: str, answer: str, gold: str, task: Task) -> bool:
    if MATCHERS[name].slow:
        return False
    options = task.options if name == "choice" else None
    score = Comparison(name, answer, gold, options).run().score
    if name == "anls":
        return score is not None and score >= _ALIKE and digits_of(answer) == digits_of(gold)
    return score is not None and score >= MATCHERS[name].least


def _contained(task: Task, verdict: Verdict, answer: str, gold: str) -> list[Finding]:
    """Gold in the answer, or the answer in the gold, as whole words."""
    inner, outer = normalise(gold), normalise(answer)
    pattern = "the gold answer stands in it"
    if len(inner) > len(outer):
        inner, outer = outer, inner
        pattern = "the answer stands in the gold one"
    # an option's letter is also a word ("a", "i")
    if inner == outer or _LETTER.fullmatch(inner) or not has_words(outer, inner):
        return []
    rest = outer.replace(inner, " ", 1)
    likelihood = 0.1 if _SEVERAL.search(rest) else 0.3 + 0.35 * len(inner) / len(outer)
    pattern = f"wrong by {verdict.matcher}, though {pattern}"
    return [Finding("false negative", pattern, likelihood, gold)]


def has_words(text: str, words: str) -> bool:
    """Whether words stand in a text as whole words, and a number as a whole number.

    >>> has_words("5 apples", "5"), has_words("15", "5"), has_words("5.5", "5")
    (True, False, False)
    >>> has_words("5^2", "5")
    False
    """
    position = text.find(words) if words else -1
    for _ in range(100):
        if position < 0:
            return False
        before, after = text[max(0, position - 2) : position], text[position + len(words) :][:2]
        if not (_goes_on(before[::-1], words[0]) or _goes_on(after, words[-1])):
            return True
        position = text.find(words, position + 1)
    return False


def _goes_on(near: str, edge: str) -> bool:
    """Whether a word or a number goes on past its edge; `near` reads away from it."""
    if not near or not (edge.isalnum() and edge.isascii()):
        return False
    if (near[0].isalnum() and near[0].isascii()) or near[0] in "^*":
        return True
    return edge.isdigit() and near[0] in ".,/-" and (near[0] == "-" or near[1:2].isdigit())


def _no_answer(record: Mapping[str, Any], task: Task) -> list[Finding]:
    """An answer that nobody found."""
    if record.get("finish_reason") == "length":
        return [Finding("cut off", "no final answer, and no room for one", 0.3, _gold(task))]
    lines = [line for line in task.completion[-4000:].splitlines() if line.strip()][-3:]
    for distance, line in enumerate(reversed(lines)):
        shown = normalise(line)
        for gold in task.answers[:_MOST_GOLDS]:
            wanted = normalise(gold)
            if _LETTER.fullmatch(clean(gold)):
                letter = clean(gold).strip("()[].").upper()
                # a capital by itself; "A" and "I" are words too
                there = re.search(rf"(?<![A-Za-z]){letter}(?!\s[a-z]|[A-Za-z'])", line) is not None
            else:
                there = len(gold) <= _LONGEST and has_words(shown, wanted)
            if there:
                place = "the last line" if distance == 0 else "the last three lines"
                likelihood = 0.6 if distance == 0 else 0.4
                pattern = f"no answer found, though the gold answer stands in {place}"
                return [Finding("false negative", pattern, likelihood, gold)]
    return []


# -- accepted ----------------------------------------------------------------------------------


def _false_positive(task: Task, verdict: Verdict) -> list[Finding]:
    """The best reason to think that a correct verdict is a mistake."""
    answer, name = verdict.extracted or "", verdict.matcher
    golds = [gold for gold in task.answers[:_MOST_GOLDS] if len(gold) <= _LONGEST]
    if name in GROUNDING or any(normalise(gold) == normalise(answer) for gold in golds):
        return []
    found = []
    for gold in golds:
        scored = Comparison(name, answer, gold, task.options if name == "choice" else None)
        if not MATCHERS[name].slow:
            score = scored.run().score
            if score is None or score < (task.least or MATCHERS[name].least):
                continue  # another gold answer was met
        found += _doubts(task, name, answer, gold, verdict.score)
    return [max(found, key=lambda one: one.likelihood)] if found else []


def _doubts(task: Task, name: str, answer: str, gold: str, score: float | None) -> list[Finding]:
    """What speaks against a match of an answer and a gold answer that are not the same text."""
    doubts: list[tuple[float, str]] = []
    given, wanted = read_number(answer), read_number(gold)
    if _HEDGE.search(answer) and not _HEDGE.search(gold):
        doubts.append((0.7, "the answer hedges"))
    if given and wanted and Comparison("number", answer, gold).run().score == 0.0:
        whole = given.value.denominator == wanted.value.denominator == 1
        likely = (0.4 if whole else 0.2) if name == "relaxed" else 0.8
        doubts.append((likely, "number reads another number"))
    if name == "anls" and score is not None and score < 1.0:
        if digits_of(answer) != digits_of(gold):
            doubts.append((0.9, "other digits"))
        else:
            doubts.append((0.15, "spelled alike") if score >= 0.8 else (0.5, "not that alike"))
    if name in ("vqa", "list") and _signs(answer) != _signs(gold):
        doubts.append((0.6, "other signs"))
    chosen = Comparison("choice", answer, gold, task.options)
    if task.options and name != "choice" and chosen.run().score == 0.0:
        doubts.append((0.7, "choice reads another option"))
    return [
        Finding("false positive", f"correct by {name}, {why}", likely, gold)
        for likely, why in doubts
    ]


def _signs(text: str) -> list[str]:
    """The signs of a formula, which normalisation of words drops; a closing stop is none."""
    return _SIGNS.findall(clean(text))
