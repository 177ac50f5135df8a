"""Judging in processes that can be killed (skeleton: everything runs in this process)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from rewards.match import MATCHERS
from rewards.verdict import (
    Result,
    Task,
    Verdict,
    conclude,
    gold_answers,
    matcher_names,
    plan_comparisons,
)

DEFAULT_LIMIT = 5.0  # seconds of one comparison
CACHE_SIZE = 100_000  # results


class VerifierPool:
    """Judges tasks; see the module."""

    def __init__(
        self,
        workers: int = 1,
        *,
        limit: float = DEFAULT_LIMIT,
        cache_size: int = CACHE_SIZE,
        memory_limit: int = 2**30,
    ):
        self.workers = workers
        self.limit = limit
        self.cache_size = cache_size
        self.memory_limit = memory_limit

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""

    def judge(self, task: Task) -> Verdict:
        """The verdict of one task."""
        plan = plan_comparisons(task)
        results: list[Result] = []
        for comparison in plan.comparisons:
            results.append(comparison.run())
            if plan.accepts(comparison, results[-1]) and not MATCHERS[comparison.matcher].slow:
                break
        return conclude(plan, results)

    def map(self, tasks: Iterable[Task]) -> Iterator[Verdict]:
        """The verdicts of tasks, in their order; memory is bounded however many there are."""
        return map(self.judge, tasks)


_SHARED = VerifierPool()


def shared_pool() -> VerifierPool:
    """The pool of this process that `verify` uses."""
    return _SHARED


def verify(
    completion: str,
    answer: str | float | Sequence[str],
    *,
    matcher: str | Sequence[str] | None = None,
    options: Sequence[str] | None = None,
    style: str = "auto",
) -> Verdict:
    """Judge one completion against its gold answer, or against the best of several.

    matcher: one of `MATCHERS`, or several of which one must accept; None chooses by the gold
    answer (`choose_matcher`). options: the texts of a multiple-choice question, in order. style:
    one of `extract.STYLES`.
    Raises ValueError for an unknown matcher or style, or an empty list of answers.

    >>> verify("The answer must be 5. Final answer: 15", "5").outcome
    <Outcome.WRONG: 'wrong'>
    >>> verify("I cannot tell.", "5").outcome == "no_answer"
    True
    """
    names = matcher_names(matcher)
    chosen = None if options is None else tuple(options)
    task = Task(completion, gold_answers(answer, names), names, chosen, style)
    return shared_pool().judge(task)
