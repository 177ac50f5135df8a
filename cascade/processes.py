"""Ending a process with all that it started; how many cores and devices there are."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

GRACE = 30.0  # seconds from the request to end until the end


def end_tree(pid: int, is_gone: Callable[[], bool]) -> None:
    """Ask a process and its descendants to end; what is there after GRACE seconds is killed.

    is_gone: whether the process itself has been waited for. Launchers (accelerate's) do not hand
    a signal on, so each descendant gets its own.
    """
    found = [pid, *descendants(pid)]
    for number in found:
        _signal(number, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and not (is_gone() and not any(map(_lives, found[1:]))):
        time.sleep(0.05)
    for number in found:
        if number != pid or not is_gone():
            _signal(number, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and those that they started."""
    parents = _parents()
    found, look = list[int](), [pid]
    while look:
        above = look.pop()
        children = [child for child, parent in parents.items() if parent == above]
        found += children
        look += children
    return found


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether processes would find an NVIDIA device; asked of the system, torch is not loaded."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and bool(glob.glob("/dev/nvidia[0-9]*"))


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _lives(pid: int) -> bool:
    """Whether it runs; one that has ended and is waited for by nobody does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"


def _parents() -> dict[int, int]:
    """{process: its parent} of the machine, from /proc or else from ps."""
    if Path("/proc/self/stat").exists():
        found = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    text = Path(f"/proc/{name}/stat").read_text(errors="replace")
                    found[int(name)] = int(text.rpartition(")")[2].split()[1])
        return found
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, check=True)
    return {int(a): int(b) for a, b in (line.split() for line in listed.stdout.splitlines())}
