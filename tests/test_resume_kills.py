"""MPO killed where it hurts: any step, any instant of a save, the reference pass; full and LoRA.

Beyond the weights and the logged values, the last checkpoint's optimizer, scheduler, random states
and the stage's own state (delta) must be those of the run that was not stopped.
"""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import InStep, Kill, StageRun, _die
from test_resume import assert_same_result
from test_resume import make as make
from test_resume import options as options
from test_resume import pairs as pairs

from training import checkpoints

KILLED = -signal.SIGKILL
STEPS = 8  # of the run
Make = Callable[..., StageRun]
LORA: dict[str, Any] = {"use_peft": True, "lora_dropout": 0.3, "dataloader_num_workers": 1}
FULL: dict[str, Any] = {"dataloader_num_workers": 2, "save_steps": 2}


@dataclass(frozen=True)
class AtSaveOperation:
    """Dies at the `number`-th time that Python touches a file of one step's checkpoint."""

    step: int
    number: int

    def __call__(self, output_dir: Path) -> None:
        count = 0
        folder = str(output_dir / f"checkpoint-{self.step}")

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                count += str(args[0]).startswith(folder)
                if count == self.number:
                    _die()

        sys.addaudithook(hook)


@dataclass(frozen=True)
class InReference:
    """Dies in the reference pass, when `chunks` of it are on the disk."""

    chunks: int

    def __call__(self, output_dir: Path) -> None:
        from mpo.reference_cache import ReferenceCache

        original, done = ReferenceCache.add, 0

        def add(cache: Any, *args: Any) -> None:
            nonlocal done
            if done == self.chunks:
                _die()
            done += 1
            original(cache, *args)

        setattr(ReferenceCache, "add", add)  # noqa: B010 (its type is another)


def plain(state: Any) -> Any:
    """A state that can be compared: tensors as bytes, other arrays as text."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    return state if isinstance(state, int | float | str | bytes | None) else repr(state)


def last_state(run: StageRun) -> dict[str, Any]:
    """All that a further step would depend on, of the last checkpoint."""
    folder = checkpoints.newest_complete(run.folder)
    assert folder is not None and checkpoints.step_of(folder) == STEPS
    found = {
        name: plain(torch.load(folder / name, map_location="cpu", weights_only=False))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    }
    return {**found, "stage": checkpoints.read_marker(folder)["stage"]}


def check(run: StageRun, reference: StageRun, *kills: Kill) -> str:
    """Kill, kill again, go on to the end; returns what the last start printed."""
    for kill in kills:
        assert run.start(kill).code == KILLED
    text = run.finish().text
    assert_same_result(run, reference)
    assert last_state(run) == last_state(reference)
    return text


@pytest.fixture(scope="session")
def references(
    options: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., StageRun]:
    """The runs without a kill, each made once."""
    runs: dict[str, StageRun] = {}

    def get(changes: dict[str, Any]) -> StageRun:
        name = json.dumps(changes, sort_keys=True)
        if name not in runs:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            runs[name] = StageRun("mpo", {**options["mpo"], "output_dir": str(folder), **changes})
            runs[name].finish()
        return runs[name]

    return get


@pytest.mark.slow
def test_lora_with_dropout_killed_at_a_drawn_step(
    make: Make, references: Callable[..., StageRun]
) -> None:
    """What is dropped is drawn by the random state, which the checkpoint must hold."""
    step = random.Random("quick").randint(5, STEPS)
    text = check(make("mpo", **LORA), references(LORA), InStep(step))
    assert f"checkpoint-{(step - 1) // 3 * 3}\n" in text


@pytest.mark.slow
def test_dropout_does_something(make: Make, references: Callable[..., StageRun]) -> None:
    """Else the random state would not be tried."""
    without = make("mpo", **{**LORA, "lora_dropout": 0.0})
    without.finish()
    assert without.weights() != references(LORA).weights()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("seed", range(4))
def test_killed_twice_at_drawn_steps(
    make: Make, references: Callable[..., StageRun], changes: dict[str, Any], seed: int
) -> None:
    draw = random.Random(seed)
    first = draw.randint(1, STEPS - 1)
    second = draw.randint(first, STEPS)
    check(make("mpo", **changes), references(changes), InStep(first), InStep(second))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("number", [1, 2, 4, 7, 11])
def test_killed_at_an_instant_of_a_save(
    make: Make, references: Callable[..., StageRun], changes: dict[str, Any], number: int
) -> None:
    check(make("mpo", **changes), references(changes), AtSaveOperation(6, number))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "LoRA"])
def test_killed_in_the_reference_pass(
    make: Make, references: Callable[..., StageRun], changes: dict[str, Any]
) -> None:
    """What was on the disk is not computed again, and the numbers are the same."""
    few = {**changes, "precompute_ref_batch_size": 4}
    run = make("mpo", **few)
    check(run, references(few), InReference(0), InReference(2), InReference(1), InStep(2))
