"""Verdicts by rule, and by a judge where a question names one: one seam for all commands.

A question names the judge with "matcher": "judge", or beside rules: ["math", "judge"]. Rules come
first, because they are free and always say the same: what they call correct is correct ("judge"
alone is tried by `exact`), and a completion without an answer needs no judge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rewards.datasets import DatasetTable
from rewards.judge import Judge, JudgeQuestion
from rewards.pool import VerifierPool
from rewards.verdict import Outcome, Task, Verdict, request_fault, task_of
from rewards.votes import Votes, vote_classes

JUDGE = "judge"
ASK_WHEN = ("named", "cannot_judge")
_AT_ONCE = 2048  # verdicts that are looked at together
_LEFT_ALONE = (Outcome.CORRECT, Outcome.NO_ANSWER)


def names_judge(record: Mapping[str, Any]) -> bool:
    """Whether a question asks to be judged by the judge."""
    return _by_rule(record)[1]


def _by_rule(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The record as the rules read it, and whether it names the judge."""
    asked = record.get("matcher")
    names = list(asked) if isinstance(asked, list | tuple) else [asked]
    if JUDGE not in names:
        return record, False
    rules = [name for name in names if name != JUDGE]
    return {**record, "matcher": rules or ["exact"]}, True


def without_judge(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A question as the rules alone read it."""
    return _by_rule(record)[0]


def judging_fault(
    record: Mapping[str, Any],
    *,
    has_judge: bool,
    unanswered: bool = False,
    table: DatasetTable | None = None,
) -> str | None:
    """What keeps a question's completions from being judged as it asks for, or None.

    unanswered, table: see `request_fault`; this is the one for commands that may have a judge.

    >>> judging_fault({"matcher": "judge"}, has_judge=False)
    "matcher 'judge' needs a judge: give judge_base_url and judge_model"
    """
    by_rule, named = _by_rule(record)
    if named and not has_judge:
        return "matcher 'judge' needs a judge: give judge_base_url and judge_model"
    return request_fault(by_rule, unanswered=unanswered, table=table)


def judge_records(
    asked: Iterable[tuple[Mapping[str, Any], str]],
    pool: VerifierPool,
    judge: Judge | None = None,
    *,
    ask_when: str = "named",
    style: str = "auto",
    table: DatasetTable | None = None,
) -> Iterator[Verdict]:
    """The verdicts of (question's record, completion), in order.

    ask_when: "named": the judge is asked only about questions that name it; "cannot_judge": also
    where the rules can say neither right nor wrong. What the rules call wrong stays wrong: a judge
    that is talked into it must not turn a rule over. A judge that fails makes cannot_judge, with
    the reason "judge: ..". style, table: see `task_of`.
    Raises ValueError for a question that names the judge where there is none, and as `task_of`.
    """
    if ask_when not in ASK_WHEN:
        raise ValueError(f"ask_when is {ask_when!r}; one of: {', '.join(ASK_WHEN)}")
    waiting: deque[_Asked] = deque()  # handed to the pool, which keeps the order

    def tasks() -> Iterator[Task]:
        for record, completion in asked:
            by_rule, named = _by_rule(record)
            if named and judge is None:
                raise ValueError(judging_fault(record, has_judge=False))
            task = task_of(by_rule, completion, style=style, table=table)
            if judge is not None:
                waiting.append(_Asked(record, task, named))
            yield task

    verdicts = iter(pool.map(tasks()))
    if judge is None:
        yield from verdicts
        return
    while part := list(islice(verdicts, _AT_ONCE)):
        pairs = [(waiting.popleft(), verdict) for verdict in part]
        yield from _by_judge(pairs, judge, open_ones_too=ask_when == "cannot_judge")


@dataclass(frozen=True)
class Verifier:
    """How a command judges completions (`judge_records`); its end closes pool and judge."""

    pool: VerifierPool
    judge: Judge | None = None
    ask_when: str = "named"
    style: str = "auto"
    table: DatasetTable | None = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()
        if self.judge is not None:
            self.judge.close()

    def fault(self, record: Mapping[str, Any], *, unanswered: bool = False) -> str | None:
        """See `judging_fault`."""
        return judging_fault(
            record, has_judge=self.judge is not None, unanswered=unanswered, table=self.table
        )

    def verdicts(self, asked: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[Verdict]:
        """The verdicts of (question's record, completion), in order."""
        return judge_records(
            *(asked, self.pool, self.judge),
            ask_when=self.ask_when,
            style=self.style,
            table=self.table,
        )

    def votes(
        self, asked: Iterable[tuple[Mapping[str, Any], Sequence[str | None]]]
    ) -> Iterator[Votes]:
        """Which extracted answers of a question are the same, of (its record, answers), in order.

        See `vote_classes`; a judge is not asked.
        """
        tasks = (
            (task_of(_by_rule(record)[0], "", style=self.style, table=self.table), answers)
            for record, answers in asked
        )
        return vote_classes(tasks, self.pool)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a verdict is of. named: the question names the judge."""

    record: Mapping[str, Any]
    task: Task
    named: bool


def _by_judge(
    pairs: Sequence[tuple[_Asked, Verdict]], judge: Judge, *, open_ones_too: bool
) -> list[Verdict]:
    """The verdicts, those that are the judge's affair with what it says of them."""
    verdicts = [verdict for _, verdict in pairs]
    places, questions = [], []
    for place, (asked, verdict) in enumerate(pairs):
        if not any(gold.strip() for gold in asked.task.answers):
            continue  # a question without a gold answer
        open_one = open_ones_too and verdict.outcome == Outcome.CANNOT_JUDGE
        if open_one or (asked.named and verdict.outcome not in _LEFT_ALONE):
            places.append(place)
            questions.append(_question(asked, verdict))
    for place, judgement in zip(places, judge.ask(questions), strict=True):
        verdicts[place] = by_judge(verdicts[place], judgement.correct, judgement.reason)
    return verdicts


def _question(asked: _Asked, verdict: Verdict) -> JudgeQuestion:
    assert verdict.extracted is not None  # only no_answer has none
    record, task = asked.record, asked.task
    # those that its text lists itself are in the text
    options = None if record.get("options") is None else task.options
    text = str(record.get("question", ""))
    return JudgeQuestion(text, task.answers, verdict.extracted, options)


def by_judge(verdict: Verdict, correct: bool | None, reason: str | None) -> Verdict:
    """A verdict with what a judge says in the place of what the rules said."""
    outcome = Outcome.CANNOT_JUDGE
    if correct is not None:
        outcome = Outcome.CORRECT if correct else Outcome.WRONG
    score = None if correct is None else float(correct)
    return verdict._replace(outcome=outcome, matcher=JUDGE, score=score, reason=reason)
