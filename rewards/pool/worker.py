"""What runs in a verifier process: an outer one with sympy loaded, and the child that it forks.

    pool (parent) <- socket, lines -> outer: forwards, forks, waits <- socketpair -> child: judges

The child may hang, run out of memory or crash; the outer never runs sympy on data, so it can always
kill the child and fork the next in milliseconds, without a new import. A line to the outer is
`GENERATION {"id": .., "comparison": [..]}` or `GENERATION kill`, dropped when that child is gone.
A line back is {"ready": generation, "ended": exit code of the one before, "pid": ..}, a result
{"id", "score", "reason", "last"}, or {"error": why the process cannot start}.
The end of either socket ends both processes; nothing here decides what a timeout is except as a
backup: the kernel kills a child that runs a second past its limit (its parents may be gone).
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator

from rewards.verdict import Comparison, Result

GRACE = 1.0  # seconds past the limit until the kernel kills a child that nobody killed
RECURSION_LIMIT = 3_000  # sympy recurses; deeper than Python's 1,000, well within 8 MiB of stack
MAX_COMPARISONS = 20_000  # of one child: caches inside sympy grow
_MIB = 2**20
# what a fresh child should not have to load or learn again: lazily imported parts, parser tables
_WARM_UP = (
    ("\\frac{\\sqrt{3}}{2}+1", "\\sqrt{3}/2 + 1.0"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\{1,2\\}", "(1, 2]"),
    ("0.75", "\\frac{3}{4}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x \\le 2\\pi"),
    ("\\sin^2 x + \\log_{2} y", "2^{-3} \\cdot |a|"),
    ("x^2 + 1", "x^2 + \\sqrt{3}/2"),
    ("\\frac{1}{1+\\frac{1}{x}}", "\\sin x"),
    ("\\sum_{k=1}^{3} k^2", "3! + x"),
    ("\\int_0^1 x dx", "2x"),
    ("x = 3", "3y"),
)


class Lines:
    """The complete lines of a socket."""

    def __init__(self, link: socket.socket):
        self.link = link
        self.rest = b""

    def read(self) -> list[bytes] | None:
        """Receive once: the lines that are complete now, None at the end of the stream."""
        try:
            chunk = self.link.recv(_MIB)
        except ConnectionError:
            return None
        if not chunk:
            return None
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        return lines

    def __iter__(self) -> Iterator[bytes]:
        while (lines := self.read()) is not None:
            yield from lines


def serve(limit: float, memory_limit: int) -> None:
    """Be the outer process; the socket to the parent is file 0."""
    with socket.socket(fileno=os.dup(0)) as parent:
        _serve(parent, limit, memory_limit)


def _serve(parent: socket.socket, limit: float, memory_limit: int) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a mask survives exec
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    try:
        _warm_up()
    except ImportError as error:
        parent.sendall(_line({"error": f"{type(error).__name__}: {error}"}))
        return
    gc.freeze()  # the children share these pages
    requests = Lines(parent)
    generation, ended = 0, None
    while True:
        generation += 1
        link, other = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                parent.close()
                link.close()
                _judge(other, limit, memory_limit)
                code = 0
            finally:
                os._exit(code)  # nothing of the outer's is run or finalised twice
        other.close()
        parent.sendall(_line({"ready": generation, "ended": ended, "pid": pid}))
        goes_on = _forward(requests, Lines(link), pid, generation)
        if not goes_on:
            os.kill(pid, signal.SIGKILL)
        link.close()
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not goes_on:
            return


def _warm_up() -> None:
    for prediction, gold in _WARM_UP:
        Comparison("math", prediction, gold).run()


def _line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"  # ASCII: lone surrogates survive


def _forward(requests: Lines, results: Lines, pid: int, generation: int) -> bool:
    """Carry lines between parent and child until the child ends (True) or the parent (False)."""
    poller = select.poll()
    for lines in (requests, results):
        poller.register(lines.link, select.POLLIN)
    try:
        while True:
            ready = {number for number, _ in poller.poll()}
            if results.link.fileno() in ready:
                if (found := results.read()) is None:
                    return True
                for line in found:
                    requests.link.sendall(line + b"\n")
            if requests.link.fileno() in ready:
                if (asked := requests.read()) is None:
                    return False
                for line in asked:
                    to, _, what = line.partition(b" ")
                    if int(to) != generation:
                        continue  # meant for a child that has died since
                    if what == b"kill":
                        os.kill(pid, signal.SIGKILL)
                    else:
                        _send_to_child(results.link, what)
    except ConnectionError:  # the parent is gone
        return False


def _send_to_child(link: socket.socket, line: bytes) -> None:
    try:
        link.sendall(line + b"\n")
    except ConnectionError:
        return  # it died just now; its socket's end is read next


def _judge(link: socket.socket, limit: float, memory_limit: int) -> None:
    """Be the child: judge what comes, until there is no more or too much memory is taken."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):  # parsers print and warn
        os.dup2(nothing, standard)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel kills, whatever holds the GIL
    sys.setrecursionlimit(RECURSION_LIMIT)
    gc.set_threshold(50_000, 20, 100)  # a comparison makes many objects and few cycles
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory_limit)
    start = _peak_memory()
    for count, line in enumerate(Lines(link), start=1):
        request = json.loads(line)
        name, prediction, gold, options = request["comparison"]
        comparison = Comparison(name, prediction, gold, options and tuple(options))
        signal.setitimer(signal.ITIMER_REAL, limit + GRACE)
        result = _compare(comparison, memory_limit, start)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = _peak_memory() - start
        last = grown > memory_limit // 4 or count >= MAX_COMPARISONS
        answer = {"id": request["id"], "score": result.score, "reason": result.reason, "last": last}
        try:
            link.sendall(_line(answer))
        except ConnectionError:
            return
        if last:
            return


def _compare(comparison: Comparison, memory_limit: int, start: int) -> Result:
    """A comparison's result; what goes wrong inside the matcher is a reason, not a crash."""
    try:
        result = comparison.run()
    except MemoryError:
        return Result(None, _too_much(memory_limit))
    except RecursionError:
        return Result(None, f"{comparison.matcher}: the expression is nested too deep")
    except Exception as error:
        # not its message, which may hold an expression that takes for ever to print
        return Result(None, f"{comparison.matcher}: {type(error).__name__} inside the matcher")
    # libraries swallow a MemoryError and go on with half an expression
    if not result.score and _peak_memory() - start > memory_limit // 2:
        return Result(None, _too_much(memory_limit))
    return result


def _too_much(memory_limit: int) -> str:
    return f"the comparison took too much memory (limit {memory_limit // _MIB} MiB)"


def _limit_memory(memory_limit: int) -> None:
    """Let this process map at most `memory_limit` bytes more than it has now."""
    mapped = _peak_memory()
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = mapped + memory_limit
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _peak_memory() -> int:
    """The most memory that this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
