"""How a verdict came about, step by step: a structure; rewards/explain/text.py prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from rewards.datasets import DatasetEntry, DatasetTable
from rewards.explain.readings import read_as
from rewards.extract import Extraction
from rewards.match import MATCHERS
from rewards.pool import VerifierPool, shared_pool
from rewards.verdict import (
    GROUNDING,
    Comparison,
    Outcome,
    Plan,
    Task,
    Verdict,
    choose_matcher,
    digits_of,
    entry_of,
    plan_comparisons,
    task_of,
)

REWARDS = {Outcome.CORRECT: 1.0, Outcome.WRONG: 0.0, Outcome.NO_ANSWER: 0.0}  # None: not judged
_PROBE = "\ufffc"  # stands in nobody's answer
_MOST_PLACES = 40  # places of a completion that are tried, from the last on


@dataclass(frozen=True)
class Step:
    """One gold answer under one matcher.

    gold_read, answer_read: both sides as the matcher reads them. least: the score that it asks
    for. accepted: whether it is a match. note: what the score does not say.
    """

    matcher: str
    gold: str
    gold_read: str
    answer_read: str
    outcome: str
    score: float | None
    least: float
    accepted: bool
    note: str | None = None


@dataclass(frozen=True)
class Opinion:
    """What a matcher that was not asked for would have said, by its own least score."""

    matcher: str
    outcome: str
    score: float | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """How the verdict of one completion came about.

    span: where in the completion the final answer stands, None where it cannot be told.
    matcher_from, options_from: in words. steps: the comparisons that were asked for. others: what
    each other matcher would have said.
    """

    completion: str
    style: str
    question: str | None
    answers: tuple[str, ...]
    extraction: Extraction
    span: tuple[int, int] | None
    matcher_from: str
    options: tuple[str, ...] | None
    options_from: str
    steps: tuple[Step, ...]
    others: tuple[Opinion, ...]
    verdict: Verdict
    reward: float | None

    def as_dict(self) -> dict[str, Any]:
        """The explanation as JSON; the fault of the extraction among its fields."""
        return {**asdict(self), "verdict": self.verdict._asdict()}


def explain(
    record: Mapping[str, Any],
    completion: str,
    *,
    style: str = "auto",
    table: DatasetTable | None = None,
    pool: VerifierPool | None = None,
) -> Explanation:
    """Judge a completion of a question's record (`task_of`) and say how.

    pool: what judges, None for the one of `verify`. Raises ValueError for an unknown matcher or
    style, or an answer that is none.
    """
    task = task_of(record, completion, style=style, table=table)
    plan = plan_comparisons(task)
    # every matcher is asked about the text that the verdict is about
    grounded = plan.matcher in GROUNDING and style == "auto"
    task = replace(task, style="box" if grounded else style)
    pool = pool or shared_pool()
    verdict = pool.judge(task)
    comparisons = dict.fromkeys(plan.comparisons)  # ten annotators often say the same
    steps = tuple(_step(pool, task, plan, comparison) for comparison in comparisons)
    used = {step.matcher for step in steps}
    others = tuple(_other(pool, task, name) for name in MATCHERS if steps and name not in used)
    return Explanation(
        completion=completion,
        style=style,
        question=question if isinstance(question := record.get("question"), str) else None,
        answers=task.answers,
        extraction=plan.found,
        span=find_span(task, plan.found.text),
        matcher_from=_matcher_from(record, task, entry_of(record, table)),
        options=task.options,
        options_from=_options_from(record, task),
        steps=steps,
        others=others,
        verdict=verdict,
        reward=REWARDS.get(verdict.outcome),
    )


def _step(pool: VerifierPool, task: Task, plan: Plan, comparison: Comparison) -> Step:
    """One comparison of a plan, made and read."""
    name, gold = comparison.matcher, comparison.gold
    told = pool.judge(replace(task, answers=(gold,), matchers=(name,)))
    accepted = told.outcome == Outcome.CORRECT
    least = MATCHERS[name].least if plan.least is None else plan.least
    note = told.reason
    if not accepted and told.score is not None and told.score >= least:
        ours, theirs = digits_of(comparison.prediction), digits_of(gold)
        note = f"alike enough, but with other digits: {ours or 'none'}, not {theirs or 'none'}"
    sides = [
        "nothing: it ran out of time"  # and would again
        if told.outcome == Outcome.TIMEOUT
        else read_as(name, side, comparison.options, limit=pool.limit)
        for side in (gold, comparison.prediction)
    ]
    return Step(
        matcher=name,
        gold=gold,
        gold_read=sides[0],
        answer_read=sides[1],
        outcome=str(told.outcome),
        score=told.score,
        least=least,
        accepted=accepted,
        note=note,
    )


def _other(pool: VerifierPool, task: Task, name: str) -> Opinion:
    told = pool.judge(replace(task, matchers=(name,), least=None, same_digits=False))
    return Opinion(name, str(told.outcome), told.score, told.reason)


def find_span(task: Task, text: str | None) -> tuple[int, int] | None:
    """Where the text that was extracted stands: the last place that matters to the extraction.

    A place matters when the extraction finds something else once other text stands there. None
    where the answer was put together from pieces, or stands too often to try.
    """
    if not text:
        return None
    completion, end = task.completion, len(task.completion)
    for _ in range(_MOST_PLACES):
        start = completion.rfind(text, 0, end)
        if start < 0:
            return None
        probed = f"{completion[:start]}{_PROBE}{completion[start + len(text) :]}"
        if plan_comparisons(replace(task, completion=probed)).found.text != text:
            return start, start + len(text)
        end = start + len(text) - 1
    return None


def _matcher_from(record: Mapping[str, Any], task: Task, entry: DatasetEntry | None) -> str:
    """Why these matchers, in words."""
    if entry is not None:
        name = str(record["dataset"])
        pattern = next(p for p in entry.patterns if fnmatchcase(name.casefold(), p.casefold()))
        least = "" if entry.least is None else f" from {entry.least:g} on"
        digits = " with the same digits" if entry.same_digits else ""
        return (
            f"{_listed(task.matchers)}{least}{digits}: data set {name!r} fits {pattern!r}, entry "
            f"{entry.number} of {entry.file.rpartition('/')[2]} ({entry.why})"
        )
    if task.matchers:
        return f"{_listed(task.matchers)}: named with the question"
    told = f"the table has nothing for data set {record['dataset']!r}; " if (
        isinstance(record.get("dataset"), str)
    ) else ""  # fmt: skip
    chosen = {gold: choose_matcher(gold, task.options) for gold in task.answers}
    by = "the options" if task.options else "the gold answer's form"
    if len(set(chosen.values())) == 1:
        return f"{next(iter(chosen.values()))}: {told}chosen by {by}"
    each = ", ".join(f"{name} for {gold!r}" for gold, name in chosen.items())
    return f"{each}: {told}chosen by {by}"


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)} (in that order)"


def _options_from(record: Mapping[str, Any], task: Task) -> str:
    """Where the options come from, in words."""
    if task.options is None:
        return "none given, and none listed by the question"
    return "given" if record.get("options") is not None else "listed by the question"
