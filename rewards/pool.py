"""Judging that cannot hang: slow comparisons run in processes with a clock that kills them.

    tasks -> plan -> fast matchers, here -> slow ones (math), in processes -> verdicts in order

Rule matchers are linear in the length of what they compare and run in the caller's process. Only a
slow matcher goes to a process, one comparison at a time each, so that it is certain which one hung:
that one costs its limit, gets a timeout, and nothing else waits for it. Processes are started when
a comparison needs one and are subprocesses (rewards/processes.py), so a pool works in a plain
script without a __main__ guard, in a notebook, in a data loader's worker, in any thread and beside
CUDA. A forked copy of the owner never touches its parent's processes and starts its own.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from types import TracebackType

from rewards.match import MATCHERS
from rewards.processes import Counters, Job, Process
from rewards.reasons import CannotJudge
from rewards.verdict import (
    Comparison,
    Plan,
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
MEMORY_LIMIT = 2**30  # bytes that a process may map beyond what it starts with
MAX_CACHED_LENGTH = 2_000  # characters of prediction and gold
MAX_AHEAD = 10_000  # tasks that `map` may be ahead of what it has yielded,
MAX_AHEAD_LENGTH = 2**24  # and characters of their answers
MAX_FAILED_STARTS = 3
_TICK = 0.1  # seconds after which a wait looks around
_LOOK_EVERY = 4  # tasks judged here between two looks at the processes


class Cache:
    """The results last used, by comparison: at most `size` of them.

    Two generations, the older of which is dropped whole, so that no lock is needed: between half of
    `size` and all of it is kept.
    """

    def __init__(self, size: int):
        self.half = size // 2
        self.new: dict[Comparison, Result] = {}
        self.old: dict[Comparison, Result] = {}
        self.hits = 0

    def get(self, key: Comparison) -> Result | None:
        """The result, or None where it is not known."""
        found = self.new.get(key)
        if found is None:
            found = self.old.get(key)
            if found is None:
                return None
            self.put(key, found)
        self.hits += 1
        return found

    def put(self, key: Comparison, result: Result) -> None:
        """Remember a result."""
        if len(self.new) >= self.half:
            self.old, self.new = self.new, {}
        self.new[key] = result

    def takes(self, key: Comparison) -> bool:
        """Whether results of this comparison are kept: there is a cache and the texts are short."""
        return self.half > 0 and len(key.prediction) + len(key.gold) <= MAX_CACHED_LENGTH


class _Run:
    """A task under way: its plan, the results so far, and the job that it waits for, if any."""

    __slots__ = ("accepted", "job", "plan", "results", "verdict")

    def __init__(self, plan: Plan):
        self.plan = plan
        self.results: list[Result] = []
        self.accepted = False
        self.job: Job | None = None
        self.verdict: Verdict | None = None

    def add(self, result: Result) -> None:
        """Take in the result of the next comparison."""
        comparison = self.plan.comparisons[len(self.results)]
        self.results.append(result)
        self.accepted = self.accepted or self.plan.accepts(comparison, result)

    def next(self) -> Comparison | None:
        """The next comparison that is needed, None when the verdict is certain."""
        done = len(self.results)
        if done == len(self.plan.comparisons):
            return None
        comparison = self.plan.comparisons[done]
        if self.accepted and (MATCHERS[comparison.matcher].slow or self.results[-1].score == 1.0):
            return None
        return comparison

    def leave(self) -> None:
        """Wait for nothing any more (without a lock: the garbage collector may call this)."""
        if self.job is not None:
            self.job.waiters.discard(id(self))


class VerifierPool:
    """Judges tasks, slow comparisons in up to `workers` processes; use it in a `with` statement.

    limit: seconds of one slow comparison; then its verdict is a timeout. cache_size: results kept,
    timeouts too; 0 for none. memory_limit: bytes that a process may map beyond what it starts with
    (about 70 MB); a comparison that needs more cannot be judged. counters: what the processes did.
    Any number of threads may use one pool. Raises ValueError for arguments that make no sense and,
    once closed, for any use; RuntimeError where no process can be started.
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
        self.memory_limit = memory_limit
        self.counters = Counters()
        self.cache = Cache(cache_size)
        self._closed = False
        self._failed_starts = 0
        self._queue: deque[Job] = deque()
        self._in_flight: dict[Comparison, Job] = {}
        self._processes: list[Process] = []
        self._state = threading.Condition(threading.Lock())
        self._polling = False  # a thread waits for the processes, on behalf of all
        self._finalizer = weakref.finalize(self, _end_all, self._processes)  # at exit, too
        _POOLS.add(self)

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
        with self._state:
            self._closed = True
            self._finalizer()
            self._state.notify_all()

    @property
    def process_ids(self) -> list[int]:
        """The processes that there are now: each outer one and the child that judges in it."""
        running = [process for process in self._processes if not process.ended]
        children = [process.child for process in running if process.child is not None]
        return [process.popen.pid for process in running] + children

    def judge(self, task: Task) -> Verdict:
        """The verdict of one task."""
        self._check_open()
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
        self._check_open()
        return self._map(iter(tasks))

    def _map(self, tasks: Iterator[Task]) -> Iterator[Verdict]:
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
                    task = next(tasks, None)
                    more = task is not None
                    if task is None:
                        continue
                    run = _Run(plan_comparisons(task))
                    window.append(run)
                    length += len(run.plan.found.text or "")
                    if self._advance(run) is None:
                        running.append(run)
                    turn += 1
                    if not running or turn % _LOOK_EVERY:
                        continue
                    self._look()
                running = [run for run in running if self._advance(run) is None]
        finally:
            for run in window:
                run.leave()

    def _advance(self, run: _Run) -> Verdict | None:
        """Carry a task on as far as it goes without waiting; its verdict, None where it waits."""
        if run.job is not None:
            if run.job.result is None:
                return None
            run.add(run.job.result)
            run.job = None
        while (comparison := run.next()) is not None:
            result = self._decide_here(comparison)
            if result is None:
                run.job = self._submit(comparison, id(run))
                return None
            run.add(result)
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

    # What follows holds the lock `_state`, or takes it.

    def _submit(self, comparison: Comparison, waiter: int) -> Job:
        """Queue a comparison, or join the job that already runs the same one."""
        with self._state:
            kept = self.cache.takes(comparison)
            job = self._in_flight.get(comparison) if kept else None
            if job is None:
                job = Job(comparison)
                self._queue.append(job)
                if kept:
                    self._in_flight[comparison] = job
            job.waiters.add(waiter)
            try:
                self._hand_out()
            except BaseException:
                job.waiters.discard(waiter)
                raise
            return job

    def _wait(self, runs: Sequence[_Run]) -> None:
        """Wait until one of the tasks' jobs has its result."""
        jobs = [run.job for run in runs if run.job is not None]
        with self._state:
            while all(job.result is None for job in jobs):
                self._check_open()
                if self._polling:
                    self._state.wait(_TICK)
                else:
                    self._step(_TICK)

    def _look(self) -> None:
        """Take results and hand out work without waiting, unless another thread is at it."""
        if not self._state.acquire(blocking=False):
            return
        try:
            self._check_open()
            if not self._polling:
                self._step(0)
        finally:
            self._state.release()

    def _step(self, timeout: float) -> None:
        """Hand out work, wait at most `timeout` for results, and take them in."""
        self._hand_out()
        if timeout:
            self._poll(timeout)
            self._check_open()
        for process in self._processes:
            for job in process.receive():
                self._settle(job)
            for job in process.expire(time.monotonic()):
                self._settle(job)
        self._hand_out()

    def _poll(self, timeout: float) -> None:
        """Wait, without the lock, until a process has something to say or its time is over."""
        deadlines = [process.deadline for process in self._processes if not process.idle]
        until = min([*deadlines, time.monotonic() + timeout]) - time.monotonic()
        poller = select.poll()
        for process in self._processes:
            poller.register(process.socket, select.POLLIN)
        self._polling = True
        self._state.release()
        try:
            poller.poll(max(0, ceil(until * 1000)))
        finally:
            self._state.acquire()
            self._polling = False
            self._state.notify_all()

    def _hand_out(self) -> None:
        """Give queued jobs to idle processes; start processes as long as there are too few."""
        for process in self._processes:
            if not self._next_job():
                break
            if process.idle:
                process.receive()  # it may have died since
            if process.idle:
                process.hand(self._queue.popleft())
        for process in [process for process in self._processes if process.ended]:
            self._processes.remove(process)
            self._failed_starts = 0 if process.generation else self._failed_starts + 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._failed_starts = 0
                raise RuntimeError(
                    f"a verifier process ended {MAX_FAILED_STARTS} times before it was ready; its "
                    "standard error says why, or it was killed (memory, a limit on processes)"
                )
        if not self._next_job():
            return
        coming = sum(process.job is None for process in self._processes)
        for _ in range(min(len(self._queue) - coming, self.workers - len(self._processes))):
            self._processes.append(Process(self.limit, self.memory_limit, self.counters))

    def _next_job(self) -> bool:
        """Whether a job is queued, after dropping those in front that nobody waits for any more."""
        while self._queue and not self._queue[0].waiters:
            self._in_flight.pop(self._queue.popleft().comparison, None)
        return bool(self._queue)

    def _settle(self, job: Job) -> None:
        """Remember a job's result, but not that a process died: others may have killed it."""
        assert job.result is not None
        self._in_flight.pop(job.comparison, None)
        if not job.lost and self.cache.takes(job.comparison):
            self.cache.put(job.comparison, job.result)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the VerifierPool is closed; make another")

    def _after_fork(self) -> None:
        """In a forked copy: forget the parent's processes, and queue again what they were doing."""
        for process in self._processes:
            if process.job is not None:
                self._queue.appendleft(process.job)
            process.forget()
        self._processes.clear()
        self._polling = False
        self._state = threading.Condition(threading.Lock())  # another thread may have held it


def _decide_early(comparison: Comparison) -> Result | None:
    early = MATCHERS[comparison.matcher].early
    if early is None:
        return None
    try:
        score = early(comparison.prediction, comparison.gold, comparison.options)
    except CannotJudge as error:
        return Result(None, str(error))
    return None if score is None else Result(score)


def _end_all(processes: list[Process]) -> None:
    while processes:
        processes.pop().end()


def _forget_all() -> None:
    for pool in list(_POOLS):
        pool._after_fork()


_POOLS: weakref.WeakSet[VerifierPool] = weakref.WeakSet()
if os.name == "posix":
    os.register_at_fork(after_in_child=_forget_all)
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
