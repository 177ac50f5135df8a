"""A math_verify of a few lines that hangs, dies and grows on demand, and is imported at once."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """
import os, resource, signal, sys, time


def parse(text, **options):
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
        return parse(text, **options)
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
                return []
            raise
    return [text.strip("$").replace(" ", "").split("=")[-1]]


def verify(gold, target, **options):
    return gold == target
"""


def write_fake_math(folder: Path, source: str = SOURCE) -> Path:
    """The folder, with the module in it."""
    folder.mkdir(exist_ok=True)
    (folder / "math_verify.py").write_text(source)
    return folder
