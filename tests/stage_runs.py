"""Training stages in processes of their own, to be killed and started again.

A process is forked from a server that has imported torch and the stages once, so it is fresh, has
one thread and costs about two seconds. What kills it is a real SIGKILL; where it strikes is said by
a `Kill`, which is set up in the child: nothing in the product knows of it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rl.phases import PHASES

PRELOAD = ["torch", "sft.trainer", "mpo.trainer", "rl.trainer", "internvl.hf_sampler"]
PRELOAD += ["training.cli", "training.stage"]
SECONDS = 300  # a run takes about two on an idle machine; more is a hang
# not compared: timings, and what transformers counts over a process's own steps
NOT_COMPARED = ("_runtime", "_per_second", "train_loss", *(f"time/{p}" for p in PHASES))
Kill = Callable[[Path], None]  # called with output_dir before the stage starts


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9: killed) and what it printed."""

    code: int
    text: str


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class InStep:
    """Dies within step number `step`, after the backward pass and before the optimizer's step."""

    step: int

    def __call__(self, output_dir: Path) -> None:
        from training.trainer import PackedTrainer

        original = PackedTrainer.training_step

        def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(trainer, *args, **kwargs)
            if trainer.state.global_step + 1 == self.step:
                _die()
            return loss

        PackedTrainer.training_step = training_step  # type: ignore[method-assign]


@dataclass(frozen=True)
class InSave:
    """Dies in the save of step `step`: all is written but the optimizer's state, or the marker."""

    step: int
    before: str = "marker"  # or "optimizer"

    def __call__(self, output_dir: Path) -> None:
        from training import checkpoints
        from training.trainer import PackedTrainer

        owner: Any = checkpoints if self.before == "marker" else PackedTrainer
        name = "mark_complete" if self.before == "marker" else "_save_optimizer_and_scheduler"
        original = getattr(owner, name)

        def save(*args: Any, **kwargs: Any) -> Any:
            if any(str(argument).endswith(f"checkpoint-{self.step}") for argument in args):
                _die()
            return original(*args, **kwargs)

        setattr(owner, name, save)


@dataclass(frozen=True)
class InResult:
    """Dies after the last step's checkpoint, when the result is about to be written."""

    def __call__(self, output_dir: Path) -> None:
        from training.trainer import PackedTrainer

        original = PackedTrainer.save_model

        def save_model(trainer: Any, folder: str | None = None, *args: Any, **kwargs: Any) -> None:
            if folder is None:
                _die()
            original(trainer, folder, *args, **kwargs)

        PackedTrainer.save_model = save_model  # type: ignore[method-assign]


@dataclass(frozen=True)
class AtFileOperation:
    """Dies at the `number`-th time that Python touches a file of the run."""

    number: int

    def __call__(self, output_dir: Path) -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(
                args[0]
            ).startswith(str(output_dir)):
                count += 1
                if count == self.number:
                    _die()

        sys.addaudithook(hook)


def parity(asked: Any) -> Any:
    """Verdicts that give an untrained model's rollouts some spread: is the length even?"""
    from rewards import Outcome, Verdict

    even = [len(completion) % 2 == 0 for _, completion in asked]
    outcomes = [Outcome.CORRECT if right else Outcome.WRONG for right in even]
    return [Verdict(o, None, "exact", float(o == "correct"), False) for o in outcomes]


def _child(
    stage: str, config: Path, output_dir: Path, log: Path, kill: Kill | None, by_parity: bool
) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    from internvl.errors import cli_guard
    from rl import trainer
    from rl.rewarding import Rewarder

    torch.set_num_threads(1)

    class ByParity(Rewarder):
        def __init__(self, rows: Any, terms: Any, verify: Any, timeout: float) -> None:
            super().__init__(rows, terms, parity, timeout)

    if by_parity:
        trainer.Rewarder = ByParity  # type: ignore[misc]
    if kill is not None:
        kill(output_dir)
    sys.argv = [stage, "--config", str(config)]
    cli_guard(importlib.import_module(f"{stage}.__main__").main)


@dataclass
class StageRun:
    """One stage with its options, in an output folder of its own.

    by_parity: whether the online stage judges by `parity`, and not by the rules.
    """

    stage: str
    options: dict[str, Any]
    by_parity: bool = True

    @property
    def folder(self) -> Path:
        return Path(self.options["output_dir"])

    def start(self, kill: Kill | None = None, *, seconds: float | None = None) -> Ended:
        """Run until the end, or until `kill` strikes, or until a SIGKILL after `seconds`."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        config = self.folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(self.options))
        log = self.folder.with_suffix(".log")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        words = (self.stage, config, self.folder, log, kill, self.by_parity)
        process = context.Process(target=_child, args=words)
        process.start()
        process.join(SECONDS if seconds is None else seconds)
        hung = process.is_alive() and seconds is None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()
        text = log.read_text() if log.exists() else ""
        assert not hung, f"{self.stage} hung; it printed:\n{text}"
        assert process.exitcode is not None
        return Ended(process.exitcode, text)

    def finish(self) -> Ended:
        """Run to the end, which must be a good one."""
        ended = self.start()
        assert ended.code == 0, ended.text
        return ended

    def weights(self) -> bytes:
        """The bytes of the result's weight file."""
        (file,) = self.folder.glob("*model.safetensors")
        return file.read_bytes()

    def logged(self) -> list[dict[str, float]]:
        """Every logged value that must not depend on kills, step by step."""
        state = json.loads((self.folder / "trainer_state.json").read_text())
        return [
            {name: value for name, value in entry.items() if not name.endswith(NOT_COMPARED)}
            for entry in state["log_history"]
        ]
