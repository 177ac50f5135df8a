"""Many requests to many servers: shared out by load, tried again, and no server is waited for.

    jobs --> one queue --> workers, `concurrency` of them a server --ask--> answers as they are done

A free worker takes the next job, so a server that is twice as fast gets twice as many. A server
that does not answer is taken out: its jobs go back to the front of the queue for the others, and it
is looked at again after 1, 2, 4 ... 60 seconds. A job that servers answer with something unusable
several times stops the run, naming the server: the fault is not the network's then. So does a
time without any server that is longer than `patience`.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from internvl.errors import DataError, UserError

Job = TypeVar("Job")
Answered = TypeVar("Answered")
Told = TypeVar("Told")

ATTEMPTS = 5  # of a job that is answered with something unusable
LONGEST_PAUSE = 60.0  # seconds before a server is looked at again
LONGEST_END = 1.0  # seconds that an early stop waits for workers; the others end by themselves


class Unreachable(Exception):
    """A server that does not answer now; its job is not to blame."""


class Unusable(Exception):
    """An answer that is of no use: not JSON, an internal error, nothing in time."""


@dataclass
class Server:
    """One server and how it does.

    url: as it was given. facts: what `look` found out about it. reason: why it is out, None while
    it is in. out_since, retry_at: when it was taken out (the first time after its last answer), and
    when it is looked at again (time.monotonic). failures: since its last answer. served: whether it
    has answered a job since it came in. looking: whether a worker looks at it now.
    """

    url: str
    facts: Any = None
    reason: str | None = None
    retry_at: float = 0.0
    out_since: float = 0.0
    failures: int = 0
    served: bool = False
    looking: bool = False


@dataclass
class _Task(Generic[Job]):
    number: int
    job: Job
    attempts: int = 0


@dataclass
class ServerPool(Generic[Job, Answered]):
    """Servers that are asked by `ask(server, job)` and looked at by `look(url)`.

    look: finds out whether a server is there and what it serves; raises `Unreachable`, or
    `UserError` where it is of no use at all. ask: raises `Unreachable`, `Unusable`, `DataError` for
    a job that no server could answer, `UserError` to stop everything.
    interrupt: closes the connections where a run is stopped early; an answer that a worker waits
    for is not listened to, but the server may still make it until this process ends.
    concurrency: jobs at a time and server. patience: seconds to go on while no server answers.
    pause: seconds before a server that was taken out is looked at again, doubled each time.
    """

    urls: Sequence[str]
    look: Callable[[str], Any]
    ask: Callable[[Server, Job], Answered]
    interrupt: Callable[[], None]
    concurrency: int
    patience: float = 300.0
    pause: float = 1.0
    servers: list[Server] = field(init=False)

    def __post_init__(self) -> None:
        self.servers = [Server(url) for url in self.urls]
        lock = threading.RLock()
        self._work_there = threading.Condition(lock)  # for workers of servers that are in
        self._out = threading.Condition(lock)  # for those of servers that are out
        for server in self.servers:
            try:
                server.facts = self.look(server.url)
            except Unreachable as error:
                self._take_out(server, str(error), tell=True)
        if all(server.reason for server in self.servers):
            raise UserError(f"no server answers: {self._reasons()}")

    def run(
        self, jobs: Iterable[Job], *, ahead: int | None = None
    ) -> Generator[tuple[int, Answered | DataError]]:
        """Yield (number of the job, its answer) as they are done; see `StreamSampler.stream`."""
        state = _Run[Job, Answered]()
        for server in self.servers:  # what happened before this run says little of now
            server.failures, server.out_since = 0, time.monotonic()
            server.retry_at = min(server.retry_at, server.out_since)
        threads = [
            threading.Thread(target=self._work, args=(server, state), daemon=True)
            for server in self.servers
            for _ in range(self.concurrency)
        ]
        for thread in threads:
            thread.start()
        numbered = enumerate(jobs)
        upcoming = next(numbered, None)
        try:
            while upcoming or state.open:
                # as many as there are workers, so that none waits while an answer is put away
                while upcoming and len(state.open) < 2 * len(threads):
                    if ahead and state.open and upcoming[0] - next(iter(state.open)) >= ahead:
                        break
                    self._add(_Task(*upcoming), state)
                    upcoming = next(numbered, None)
                try:
                    number, answer = state.done.get(timeout=0.2)
                except queue.Empty:
                    self._check_patience()
                    continue
                if isinstance(answer, BaseException) and not isinstance(answer, DataError):
                    raise answer
                del state.open[number]
                yield number, answer
        finally:
            self._stop(state)
            end = time.monotonic() + LONGEST_END
            for thread in threads:
                thread.join(timeout=max(0.0, end - time.monotonic()))

    def each(self, do: Callable[[Server], Told]) -> dict[str, Told]:
        """What `do` tells of every server that is in, by URL, all at once.

        One for which it fails is taken out. Where none is in, they are looked at again for as long
        as `patience`; then `UserError`.
        """
        since = time.monotonic()
        while True:
            for server in self.servers:
                if server.reason is not None and time.monotonic() >= server.retry_at:
                    self._look_now(server)
            inside = [server for server in self.servers if server.reason is None]
            told: dict[str, Told] = {}
            with ThreadPoolExecutor(max(1, len(inside))) as threads:
                asked = [(server, threads.submit(do, server)) for server in inside]
            for server, answer in asked:
                try:
                    told[server.url] = answer.result()
                except (Unreachable, Unusable) as error:
                    self._take_out(server, str(error), tell=True)
            if told:
                return told
            if time.monotonic() - since > self.patience:
                raise UserError(
                    f"no server has answered for {self.patience:g} s: {self._reasons()}. Start the "
                    "same command again to go on"
                )
            time.sleep(min(self.pause, 0.2))

    def _look_now(self, server: Server) -> None:
        """Look at a server that is out, while no run is on."""
        server.looking = True
        try:
            facts = self.look(server.url)
        except Unreachable as error:
            self._take_out(server, str(error))
            return
        finally:
            server.looking = False
        server.facts, server.reason, server.served = facts, None, False
        _tell(f"{server.url} answers again")

    def _add(self, task: _Task[Job], state: _Run[Job, Answered]) -> None:
        with self._work_there:
            state.open[task.number] = None
            state.todo.append(task)
            self._work_there.notify()

    def _stop(self, state: _Run[Job, Answered]) -> None:
        with self._work_there:
            state.stopped = True
            self._work_there.notify_all()
            self._out.notify_all()
        if state.open:  # an error or an interrupt: nothing runs on
            self.interrupt()

    def _work(self, server: Server, state: _Run[Job, Answered]) -> None:
        """A worker's life: jobs for one server, until the run stops."""
        while (task := self._next_task(server, state)) is not None:
            try:
                answer: Any = self.ask(server, task.job)
                server.served, server.failures = True, 0
            except DataError as error:
                answer = error
            except (Unreachable, Unusable) as error:
                if state.stopped:  # it was interrupted: that says nothing of the server
                    return
                task.attempts += isinstance(error, Unusable)
                if task.attempts < ATTEMPTS:
                    self._give_back(server, task, state, str(error))
                    continue
                answer = UserError(
                    f"{server.url}: {error}. That was the answer at attempt {task.attempts}; "
                    "mend the server, then start the same command again to go on"
                )
            except BaseException as error:  # the run raises it: a thread must not die unheard
                answer = error
            if isinstance(answer, BaseException) and not isinstance(answer, DataError):
                state.stopped = True
            state.done.put((task.number, answer))

    def _next_task(self, server: Server, state: _Run[Job, Answered]) -> _Task[Job] | None:
        """The next job for a server that is in; None when the run has stopped."""
        with self._work_there:
            while not state.stopped:
                if server.reason is None:
                    if state.todo:
                        return state.todo.popleft()
                    self._work_there.wait()
                    continue
                if state.todo:  # this worker may have been told in place of one that can
                    self._work_there.notify()
                wait = server.retry_at - time.monotonic()
                if wait > 0 or server.looking:
                    self._out.wait(max(wait, 0.05))
                    continue
                server.looking = True
                self._work_there.release()
                try:
                    self._look_again(server, state)
                finally:
                    self._work_there.acquire()
                    server.looking = False
        return None

    def _look_again(self, server: Server, state: _Run[Job, Answered]) -> None:
        try:
            facts = self.look(server.url)
        except Unreachable as error:
            self._take_out(server, str(error))
            return
        except UserError as error:
            state.done.put((-1, error))
            facts = server.facts
        with self._work_there:
            server.facts, server.reason, server.served = facts, None, False
            self._out.notify_all()
        _tell(f"{server.url} answers again")

    def _give_back(
        self, server: Server, task: _Task[Job], state: _Run[Job, Answered], reason: str
    ) -> None:
        with self._work_there:
            state.todo.appendleft(task)
            self._work_there.notify()
            first = server.reason is None
        self._take_out(server, reason, tell=first)

    def _take_out(self, server: Server, reason: str, *, tell: bool = False) -> None:
        with self._work_there:
            if server.reason is None or server.looking:  # not once for each of its workers
                pause = min(self.pause * 2**server.failures, LONGEST_PAUSE)
                if not server.failures:  # it may come in and fail again before it answers a job
                    server.out_since = time.monotonic()
                server.retry_at = time.monotonic() + pause
                server.failures += 1
            server.reason = reason
        if tell:
            _tell(f"{server.url} is taken out and tried again later: {reason}")

    def _check_patience(self) -> None:
        """Raise `UserError` when no server has answered for too long."""
        if all(server.reason for server in self.servers):
            since = max(server.out_since for server in self.servers)
            if time.monotonic() - since > self.patience:
                raise UserError(
                    f"no server has answered for {self.patience:g} s: {self._reasons()}. What was "
                    "sampled is kept; start the same command again to go on"
                )

    def _reasons(self) -> str:
        return "; ".join(f"{server.url}: {server.reason}" for server in self.servers)


class _Run(Generic[Job, Answered]):
    """What the workers of one run share."""

    def __init__(self) -> None:
        self.todo: deque[_Task[Job]] = deque()
        self.open: dict[int, None] = {}  # numbers without an answer, the oldest first
        self.done: queue.SimpleQueue[tuple[int, Answered | BaseException]] = queue.SimpleQueue()
        self.stopped = False


def _tell(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)  # above a progress bar
