"""Judging that cannot hang: slow comparisons run in processes with a clock that kills them.

    tasks -> plan -> fast matchers, here -> slow ones (math), in processes -> verdicts in order

Rule matchers are linear in the length of what they compare and run in the caller's process. Only a
slow matcher goes to a process, one comparison at a time each, so that it is certain which one hung:
that one costs its limit, gets a timeout, and nothing else waits for it. Processes are started when
a comparison needs one and are subprocesses (rewards/pool/processes.py), so a pool works in a plain
script without a __main__ guard, in a notebook, in a data loader's worker, in any thread and beside
CUDA. A forked copy of the owner never touches its parent's processes and starts its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from rewards.extract import Extraction
from rewards.match import MATCHERS, CannotJudge
from rewards.pool.dispatch import Cache, Dispatcher
from rewards.pool.processes import Counters, Job
from rewards.verdict import (
    Comparison,
    Plan,
    Result,
    Task,
    Verdict,
    conclude,
    gold_answers,
    matcher_names,
    option_texts,
    plan_comparisons,
)

DEFAULT_LIMIT = 5.0  # seconds of one comparison
CACHE_SIZE = 100_000  # results
MEMORY_LIMIT = 2**30  # bytes that a process may map beyond what it starts with
MAX_AHEAD = 10_000  # tasks that `map` may be ahead of what it has yielded,
MAX_AHEAD_LENGTH = 2**24  # and characters of their answers
_LOOK_EVERY = 4  # tasks judged here between two looks at the processes


class _Run:
    """A task under way: its plan, the results so far, and the job that it waits for, if any."""

    __slots__ = ("accepted", "job", "plan", "results", "verdict")

    def __init__(self, plan: Plan):
        self.plan = plan
        self.results: list[Result] = []
        self.accepted = False
        self.job: Job | None = None
        self.verdict: Verdict | None = None

    def next(self) -> Comparison | None:
        """The next comparison that is needed, None when the verdict is certain."""
        comparisons, done = self.plan.comparisons, len(self.results)
        if done == len(comparisons):
            return None
        if done:
            last = self.results[-1]
            self.accepted = self.accepted or self.plan.accepts(comparisons[done - 1], last)
            if self.accepted and (MATCHERS[comparisons[done].matcher].slow or last.score == 1.0):
                return None
        return comparisons[done]

    def leave(self) -> None:
        """Wait for nothing any more (without a lock: the garbage collector may call this)."""
        if self.job is not None:
            self.job.waiters.discard(id(self))


class VerifierPool:
    """Judges tasks, slow comparisons in up to `workers` processes; use it in a `with` statement.

    limit: seconds of one slow comparison; then its verdict is a timeout. cache_size: results kept,
    timeouts too; 0 for none. memory_limit: bytes that a process may map beyond what it starts with
    (about 70 MB); a comparison that needs more cannot be judged. Any number of threads may use one
    pool. Raises ValueError for arguments that make no sense and, once closed, for any use;
    RuntimeError where no process can be started.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        limit: float = DEFAULT_LIMIT,
        cache_size: int = CACHE_SIZE,
        memory_limit: int = MEMORY_LIMIT,
    ):
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least 1 is needed")
        if not 0 < limit <= 3600:
            raise ValueError(f"limit is {limit} s; it must be over 0 and at most 3600")
        if cache_size < 0 or cache_size == 1:
            raise ValueError(f"cache_size is {cache_size}; give 0 (no cache) or at least 2")
        if memory_limit < 2**26:
            raise ValueError(f"memory_limit is {memory_limit} bytes; at least 64 MiB are needed")
        self.workers = workers
        self.limit = limit
        self.cache = Cache(cache_size)
        self._dispatcher = Dispatcher(workers, limit, memory_limit, self.cache)

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
        """End the processes; whoever still waits for a verdict gets an error."""
        self._dispatcher.close()

    @property
    def counters(self) -> Counters:
        """What the processes did so far."""
        return self._dispatcher.counters

    @property
    def process_ids(self) -> list[int]:
        """The processes that there are now: each outer one and the child that judges in it."""
        running = [process for process in self._dispatcher.processes if not process.ended]
        children = [process.child for process in running if process.child is not None]
        return [process.popen.pid for process in running] + children

    def judge(self, task: Task) -> Verdict:
        """The verdict of one task."""
        self._dispatcher.check_open()
        run = _Run(plan_comparisons(task))
        try:
            while (verdict := self._advance(run)) is None:
                self._wait([run])
        finally:
            run.leave()
        return verdict

    def map(self, tasks: Iterable[Task]) -> Iterator[Verdict]:
        """The verdicts of tasks, in their order; memory is bounded however many there are.

        Tasks are taken ahead while slow comparisons run: at most `MAX_AHEAD`, and no more than
        keeps the processes busy.
        """
        self._dispatcher.check_open()
        return self._map(map(plan_comparisons, tasks))

    def compare(self, asked: Iterable[Sequence[Comparison]]) -> Iterator[Verdict]:
        """The verdicts of comparisons of texts as they are, in order; nothing is extracted.

        asked: of each verdict its comparisons, at least one, of which one match is enough; the
        first is of the text that the verdict calls extracted.
        """
        self._dispatcher.check_open()
        return self._map(map(_plan, asked))

    def _map(self, plans: Iterator[Plan]) -> Iterator[Verdict]:
        window: deque[_Run] = deque()  # begun and not yielded, in order
        running: list[_Run] = []  # those of them that wait for a process
        length = turn = 0
        try:
            more = True
            while more or window:
                while window and (verdict := window[0].verdict) is not None:
                    length -= len(window.popleft().plan.found.text or "")
                    yield verdict
                full = len(window) >= MAX_AHEAD or length > MAX_AHEAD_LENGTH
                if running and (not more or full or len(running) >= 3 * self.workers):
                    self._wait(running)
                elif more:
                    plan = next(plans, None)
                    more = plan is not None
                    if plan is None:
                        continue
                    run = _Run(plan)
                    verdict = self._advance(run)
                    if verdict is not None and not window:
                        yield verdict
                        continue
                    window.append(run)
                    length += len(run.plan.found.text or "")
                    if verdict is None:
                        running.append(run)
                    turn += 1
                    if not running or turn % _LOOK_EVERY:
                        continue
                    self._dispatcher.look()
                running = [run for run in running if self._advance(run) is None]
        finally:
            for run in window:
                run.leave()

    def _wait(self, runs: Sequence[_Run]) -> None:
        """Wait until one of the tasks can be carried on."""
        self._dispatcher.wait([run.job for run in runs if run.job is not None])

    def _advance(self, run: _Run) -> Verdict | None:
        """Carry a task on as far as it goes without waiting; its verdict, None where it waits."""
        if run.job is not None:
            if run.job.result is None:
                return None
            run.results.append(run.job.result)
            run.job = None
        while (comparison := run.next()) is not None:
            result = self._decide_here(comparison)
            if result is None:
                run.job = self._dispatcher.submit(comparison, id(run))
                return None
            run.results.append(result)
        run.verdict = conclude(run.plan, run.results)
        return run.verdict

    def _decide_here(self, comparison: Comparison) -> Result | None:
        """The result of a comparison that is known or fast, None where a process must run it."""
        kept = self.cache.takes(comparison)
        if kept and (known := self.cache.get(comparison)) is not None:
            return known
        matcher = MATCHERS[comparison.matcher]
        if not matcher.slow:
            result = comparison.run()
        elif (early := _decide_early(comparison)) is not None:
            result = early
        else:
            return None
        if kept:
            self.cache.put(comparison, result)
        return result


def _plan(comparisons: Sequence[Comparison]) -> Plan:
    """The plan of comparing a text that nothing has to be extracted from."""
    slow_last = sorted(comparisons, key=lambda comparison: MATCHERS[comparison.matcher].slow)
    first = comparisons[0]
    return Plan(Extraction(first.prediction, "short", True), first.matcher, tuple(slow_last))


def _decide_early(comparison: Comparison) -> Result | None:
    early = MATCHERS[comparison.matcher].early
    if early is None:
        return None
    try:
        score = early(comparison.prediction, comparison.gold, comparison.options)
    except CannotJudge as error:
        return Result(None, str(error))
    return None if score is None else Result(score)


_SHARED = VerifierPool()


def shared_pool() -> VerifierPool:
    """The pool of this process that `verify` uses: one process of its own, if any math needs it."""
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
    Raises ValueError for an unknown matcher or style, an empty list of answers, options or a
    completion that are no texts.

    >>> verify("The answer must be 5. Final answer: 15", "5").outcome
    <Outcome.WRONG: 'wrong'>
    >>> verify("I cannot tell.", "5").outcome == "no_answer"
    True
    """
    names = matcher_names(matcher)
    if not isinstance(completion, str):
        raise ValueError(f"completion {completion!r} is no text")
    task = Task(completion, gold_answers(answer, names), names, option_texts(options), style)
    return shared_pool().judge(task)
