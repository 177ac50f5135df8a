"""Who runs which comparison: a queue, the processes, and any number of threads that wait.

There is no thread of its own (a fork would lose it). Whoever waits for a result serves all: one
thread at a time waits on the sockets, takes in every result and hands out what is queued, while the
others sleep; when it has its own result, the next takes over. So what one caller left running (a
generator that nobody goes on with) never keeps a process from the others.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from math import ceil

from rewards.pool.processes import Counters, Job, Process
from rewards.verdict import Comparison, Result

MAX_CACHED_LENGTH = 2_000  # characters of prediction and gold
MAX_FAILED_STARTS = 3
_TICK = 0.1  # seconds after which a wait looks around


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


class Dispatcher:
    """Runs comparisons in up to `workers` processes; any number of threads may use it.

    Raises ValueError once closed, RuntimeError where no process can be started.
    """

    def __init__(self, workers: int, limit: float, memory_limit: int, cache: Cache):
        self.workers = workers
        self.limit = limit
        self.memory_limit = memory_limit
        self.cache = cache
        self.counters = Counters()
        self.processes: list[Process] = []
        self._closed = False
        self._failed_starts = 0
        self._queue: deque[Job] = deque()
        self._in_flight: dict[Comparison, Job] = {}
        self._state = threading.Condition(threading.Lock())
        self._polling = False  # a thread waits for the processes, on behalf of all
        self._finalizer = weakref.finalize(self, _end_all, self.processes)  # at exit, too
        _DISPATCHERS.add(self)

    def close(self) -> None:
        """End the processes; whoever still waits for a result gets an error."""
        with self._state:
            self._closed = True
            self._finalizer()
            self._state.notify_all()

    def check_open(self) -> None:
        """Raise ValueError when it is closed."""
        if self._closed:
            raise ValueError("the VerifierPool is closed; make another")

    def submit(self, comparison: Comparison, waiter: int) -> Job:
        """Queue a comparison, or join the job that already runs the same one."""
        with self._state:
            self.check_open()
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

    def wait(self, jobs: Sequence[Job]) -> None:
        """Wait until one of the jobs has its result."""
        with self._state:
            while all(job.result is None for job in jobs):
                self.check_open()
                if self._polling:
                    self._state.wait(_TICK)
                else:
                    self._step(_TICK)

    def look(self) -> None:
        """Take results and hand out work without waiting, unless another thread is at it."""
        if not self._state.acquire(blocking=False):
            return
        try:
            self.check_open()
            if not self._polling:
                self._step(0)
        finally:
            self._state.release()

    def after_fork(self) -> None:
        """In a forked copy: forget the parent's processes, and queue again what they were doing."""
        for process in self.processes:
            if process.job is not None:
                self._queue.appendleft(process.job)
            process.forget()
        self.processes.clear()
        self._polling = False
        self._state = threading.Condition(threading.Lock())  # another thread may have held it

    # From here on the lock is held.

    def _step(self, timeout: float) -> None:
        """Hand out work, wait at most `timeout` for results, and take them in."""
        self._hand_out()
        if timeout:
            self._poll(timeout)
            self.check_open()
        for process in self.processes:
            for job in process.receive():
                self._settle(job)
            for job in process.expire(time.monotonic()):
                self._settle(job)
        self._hand_out()

    def _poll(self, timeout: float) -> None:
        """Wait, without the lock, until a process has something to say or its time is over."""
        deadlines = [process.deadline for process in self.processes if not process.idle]
        until = min([*deadlines, time.monotonic() + timeout]) - time.monotonic()
        poller = select.poll()
        for process in self.processes:
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
        for process in self.processes:
            if not self._next_job():
                break
            if process.idle:
                process.receive()  # it may have died since
            if process.idle:
                process.hand(self._queue.popleft())
        for process in [process for process in self.processes if process.ended]:
            self.processes.remove(process)
            self._failed_starts = 0 if process.generation else self._failed_starts + 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._failed_starts = 0
                raise RuntimeError(
                    f"a verifier process ended {MAX_FAILED_STARTS} times before it was ready; its "
                    "standard error says why, or it was killed (memory, a limit on processes)"
                )
        if not self._next_job():
            return
        coming = sum(process.job is None for process in self.processes)
        for _ in range(min(len(self._queue) - coming, self.workers - len(self.processes))):
            self.processes.append(Process(self.limit, self.memory_limit, self.counters))

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


def _end_all(processes: list[Process]) -> None:
    while processes:
        processes.pop().end()


def _forget_all() -> None:
    for dispatcher in list(_DISPATCHERS):
        dispatcher.after_fork()


_DISPATCHERS: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
if os.name == "posix":
    os.register_at_fork(after_in_child=_forget_all)
