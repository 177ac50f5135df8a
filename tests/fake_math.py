"""A math matcher of a few lines that hangs, dies and grows on demand, here and in the processes.

It stands where the real one does and not behind it, so that no rule about expressions decides
first, and a process is there at once, without sympy.
"""

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rewards.match import MATCHERS

ROOT = Path(__file__).resolve().parent.parent
# Python imports a module of this name at its start, so every process has it that the test starts
SOURCE = '''
import os, resource, signal, sys, time

from rewards.match import MATCHERS, Matcher


def match(prediction, gold, options=None):
    """Equal after the last "=" is equal; a word in the prediction or the gold does what it says."""
    text = prediction + " " + gold
    if "FAKE_START" in os.environ and "raise" in os.environ["FAKE_START"]:
        raise ImportError("no antlr here")
    if "FAKE_START" in os.environ:
        os._exit(7)
    if "noisy" in text:
        print(text, flush=True)
        print(text, file=sys.stderr, flush=True)
    if "hang" in text:
        time.sleep(600)
    if "stop" in text:
        while True:
            signal.pause()
    if "segfault" in text:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "leave" in text:
        os._exit(3)
    if "deep" in text:
        return match(prediction, gold)
    if "raise" in text:
        raise KeyError(text)
    if "grow" in text:
        held = bytearray(100 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    if "memory" in text:
        held = []
        try:
            while True:
                held.append(bytearray(2**20))
        except MemoryError:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            del held
            open(os.environ["PEAK_FILE"], "w").write(str(peak))
            if "swallow" in text:
                return 0.0
            raise
    return float(prediction.split("=")[-1].strip() == gold.split("=")[-1].strip())


MATCHERS["math"] = Matcher(match, slow=True)
'''


@contextlib.contextmanager
def fake_math(folder: Path) -> Iterator[None]:
    """Let "math" be the fake in this process and in those that are started meanwhile."""
    (folder / "sitecustomize.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("fake_math_matcher", folder / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    real, path = MATCHERS["math"], os.environ.get("PYTHONPATH")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    try:
        yield
    finally:
        MATCHERS["math"] = real
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def is_gone(pid: int) -> bool:
    """Whether a process has ended (it may be waited for by nobody)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    """Fail unless all processes end in time."""
    end = time.monotonic() + seconds
    while not all(map(is_gone, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert [pid for pid in pids if not is_gone(pid)] == []
