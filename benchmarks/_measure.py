"""Clocks, memory and the facts of the machine that the training benchmarks share."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def seconds(action: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What an action gives and takes: CPU seconds of this process, or a GPU's by the clock."""
    if device == "cpu":
        start = time.process_time()
        result = action()
        return result, time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def optimizer_step(trainer: Any, model: Any, optimizer: Any, inputs: Any) -> None:
    """A trainer's training_step, then clipping and the optimizer, as transformers' loop does."""
    trainer.training_step(model, inputs, None)
    trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def grown_alone(script: str, arguments: Sequence[str]) -> float:
    """The number that a benchmark prints last when it is run with these arguments, alone."""
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


class Memory:
    """The growth of memory over what was held when this began, in MB.

    On a CPU the process's resident memory (its peak is set back first), on a GPU what torch
    allocated there.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
            self.start = _status("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 1e6

    def growth(self) -> float:
        """MB at the peak since the beginning, less those of the beginning."""
        peak = _status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
        return peak - self.start


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {name}")


def facts(device: str) -> dict[str, str]:
    """Commit, versions and the machine, without its name."""
    import transformers
    import trl

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    if device == "cuda":
        machine, clock = torch.cuda.get_device_name(), "seconds by the clock, synchronised"
    else:
        machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} thread used"
        clock = "CPU seconds (user + system)"
    return {
        "commit": commit or "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": platform.python_version(),
        "machine": f"{machine}, {platform.machine()}",
        "clock": clock,
    }
