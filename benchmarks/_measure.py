"""Clocks, memory and the facts of the machine that the training benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

Steps = Sequence[Sequence[int]]


class TwoSides(Protocol):
    """Ours and TRL's, on one device; a variant is one of them with its settings."""

    device: str

    def prepare(self, variant: str) -> None:
        """Whatever a variant holds before its first step."""

    def collate(self, variant: str, indices: Sequence[int]) -> Any:
        """A step's batch."""

    def step(self, variant: str, inputs: Any) -> None:
        """One optimizer step."""

    def flops(self, variant: str, indices: Sequence[int]) -> float:
        """Operations of one step."""


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


def take_turns(sides: TwoSides, variants: Sequence[str], steps: Steps) -> dict[str, Any]:
    """Seconds of every variant at every step, in turns, and of collation; a warm-up is not kept."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    collation: dict[str, list[float]] = {"ours": [], "trl": []}
    for number, indices in enumerate([steps[0], *steps]):
        for name in variants if number % 2 else reversed(variants):
            sides.prepare(name)
            batch, made = seconds(partial(sides.collate, name, indices), "cpu")
            _, took = seconds(partial(sides.step, name, batch), sides.device)
            if number:
                spent[name].append(took)
                if name in collation:
                    collation[name].append(made)
            print(f"step {number}/{len(steps)} {name:14}{took:8.2f} s", file=sys.stderr)
    return {"steps": spent, "collation": collation}


def memory_of(sides: TwoSides, variant: str, steps: Steps) -> float:
    """MB over what this process held before its first step."""
    sides.prepare(variant)
    batches = [sides.collate(variant, steps[0])]
    memory = Memory(sides.device)
    for indices in steps:
        batches[:] = [sides.collate(variant, indices)]
        sides.step(variant, batches[0])
    return memory.growth()


def compared(
    sides: TwoSides, taken: Mapping[str, Any], memory: Mapping[str, float], steps: Steps
) -> dict[str, Any]:
    """What every benchmark of two sides tells: ratios, the FLOP model's beside them, medians."""
    spent = taken["steps"]
    sums = {name: sum(each) for name, each in spent.items()}
    flops = {name: sum(sides.flops(name, indices) for indices in steps) for name in spent}
    return {
        "speedup": round(sums["trl"] / sums["ours"], 3),
        "flop_model": round(flops["trl"] / flops["ours"], 3),
        "speedup_gc": round(sums["trl_gc"] / sums["ours_gc"], 3),
        "flop_model_gc": round(flops["trl_gc"] / flops["ours_gc"], 3),
        "memory_ratio": round(memory["ours"] / memory["trl"], 3),
        "memory_ratio_gc": round(memory["ours_gc"] / memory["trl_gc"], 3),
        "seconds_a_step": {n: round(statistics.median(s), 3) for n, s in spent.items()},
        "ratio_to_ours": {n: round(s / sums["ours"], 3) for n, s in sums.items()},
        "flop_ratio_to_ours": {n: round(f / flops["ours"], 3) for n, f in flops.items()},
        "gflop_a_step": {n: round(f / len(steps) / 1e9, 1) for n, f in flops.items()},
        "gflop_a_second": {n: round(flops[n] / sums[n] / 1e9, 1) for n in sums},
        "memory_mb": {n: round(grown) for n, grown in memory.items()},
        "collation_seconds": {
            n: round(statistics.median(s), 4) for n, s in taken["collation"].items()
        },
    }


def run_benchmark(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Path], dict[str, Any] | None],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Measure in a folder of its own and tell it as `--json` and `--write-docs` ask.

    run: returns the result, or None where it has printed what was asked for.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.device == "cpu":
        torch.set_num_threads(1)  # waiting threads would be counted
    with tempfile.TemporaryDirectory() as made:
        result = run(args, args.folder or Path(made))
    if result is None:
        return
    for name, value in result.items():
        print(f"{name:24}{value}")
    if args.write_docs:
        write(result)
    if args.json:
        print(json.dumps(result))
