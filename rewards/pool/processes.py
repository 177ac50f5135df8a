"""A verifier process as its owner sees it: start, hand one comparison, kill, take results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

from rewards.verdict import Comparison, Result

START_LIMIT = 120.0  # seconds until a process must be ready (sympy from a slow disk)
# where the owner lets SIGPIPE kill, as command-line tools do, a dead process must not be its end
_NO_SIGNAL = socket.MSG_NOSIGNAL if sys.platform == "linux" else 0
_START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from rewards.pool.worker import serve; serve(given['limit'], given['memory_limit'])"
)


@dataclass(eq=False, slots=True)
class Job:
    """A comparison that is to be run in a process; result is None until it is known.

    lost: the process that ran it died. waiters: the tasks that want to know.
    """

    comparison: Comparison
    result: Result | None = None
    lost: bool = False
    waiters: set[int] = field(default_factory=set)


@dataclass
class Counters:
    """What a pool's processes did so far."""

    starts: int = 0  # processes started, with their import of sympy
    compared: int = 0  # comparisons handed to them
    timeouts: int = 0
    deaths: int = 0  # children or processes that died by themselves
    recycled: int = 0  # children replaced because of their age or memory


@dataclass(eq=False)
class Process:
    """A process that judges one comparison at a time.

    It is idle when it is ready and has no job. Its clock is this side's: `deadline` belongs to the
    job, or to the start while it is not ready.
    ended: it is over, and another must be started. Raises RuntimeError where none can be started.
    """

    limit: float
    memory_limit: int
    counters: Counters
    job: Job | None = None
    ready: bool = False
    ended: bool = False
    generation: int = 0
    child: int | None = None  # the judging child's process id
    deadline: float = 0.0
    _number: int = 0
    _rest: bytes = b""
    _owner: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if os.name != "posix":
            raise RuntimeError(
                "math answers are judged in forked processes: Linux or macOS is needed, "
                f"this is {os.name}"
            )
        if not sys.executable:
            raise RuntimeError("sys.executable is not set: no verifier process can be started")
        # "" is wherever the process is now
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        given = {"path": path, "limit": self.limit, "memory_limit": self.memory_limit}
        self.socket, other = socket.socketpair()
        with other:
            # no multiprocessing: it runs the main script again and refuses daemonic parents.
            # A session of its own: no Ctrl-C from the terminal, and a group that is killed whole.
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(given)],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.deadline = time.monotonic() + START_LIMIT
        self.counters.starts += 1

    @property
    def idle(self) -> bool:
        """Whether a job can be handed to it."""
        return self.ready and self.job is None and not self.ended

    def hand(self, job: Job) -> None:
        """Let it run a comparison; its time starts now."""
        self.job = job
        self._number += 1
        c = job.comparison
        request = {
            "id": self._number,
            "comparison": [c.matcher, c.prediction, c.gold, c.options],
        }
        self.deadline = time.monotonic() + self.limit
        self.counters.compared += 1
        self._send(json.dumps(request))

    def receive(self) -> list[Job]:
        """Take what has come, without waiting: the jobs that have a result now.

        Raises RuntimeError when the process says that it cannot start.
        """
        done = []
        while not self.ended:
            try:
                chunk = self.socket.recv(2**16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                chunk = b""
            if not chunk:
                done += self._died(self.end())
                break
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                done += self._take(json.loads(line))
        return done

    def expire(self, now: float) -> list[Job]:
        """Kill what is past its deadline: the job that has a (timeout) result now."""
        if self.ended or now < self.deadline or (self.ready and self.job is None):
            return []
        if not self.ready:
            self.end()
            return []
        self.ready = False  # until the next child is there
        self.deadline = now + START_LIMIT
        self._send("kill")
        return self._time_out()

    def end(self) -> int:
        """Kill the process and its child, and wait for it; its exit code."""
        self.ended = True
        self.socket.close()
        if self._owner != os.getpid():
            return 0  # a forked copy: the process is its parent's
        if self.popen.returncode is None:  # not waited for, so the group's number is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        return self.popen.wait()

    def forget(self) -> None:
        """In a forked copy of the owner: let go of the process, which belongs to the original."""
        self.ended = True
        self.socket.close()
        self.popen.returncode = 0  # not ours to wait for

    def _send(self, what: str) -> None:
        with contextlib.suppress(ConnectionError):  # its socket's end says so when it is read
            self.socket.sendall(f"{self.generation} {what}\n".encode(), _NO_SIGNAL)

    def _take(self, message: dict[str, object]) -> list[Job]:
        if "error" in message:
            self.end()
            raise RuntimeError(f"the verifier process cannot start: {message['error']}")
        if "ready" in message:
            return self._take_ready(message)
        if self.job is None or message["id"] != self._number:
            return []  # of a job that is over: its time ran out as it was done
        if message["last"]:  # the child ends to give its memory back
            self.ready = False
            self.deadline = time.monotonic() + START_LIMIT
            self.counters.recycled += 1
        score, reason = message["score"], message["reason"]
        assert score is None or isinstance(score, float)
        assert reason is None or isinstance(reason, str)
        return self._finish(Result(score, reason))

    def _take_ready(self, message: dict[str, object]) -> list[Job]:
        assert isinstance(message["ready"], int) and isinstance(message["pid"], int)
        self.ready, self.generation, self.child = True, message["ready"], message["pid"]
        ended = message["ended"]
        if self.job is None or ended is None:
            return []
        if ended == -signal.SIGALRM:  # nobody looked, and the child's own alarm was faster
            return self._time_out()
        assert isinstance(ended, int)
        return self._died(ended)

    def _time_out(self) -> list[Job]:
        self.counters.timeouts += 1
        return self._finish(Result(None, f"ran past its limit of {self.limit:g} s", timeout=True))

    def _died(self, code: int) -> list[Job]:
        self.counters.deaths += 1
        if self.job is None:
            return []
        self.job.lost = True
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._finish(Result(None, f"the verifier process died ({how})"))

    def _finish(self, result: Result) -> list[Job]:
        assert self.job is not None
        job, self.job = self.job, None
        job.result = result
        return [job]
