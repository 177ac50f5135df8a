"""Whole runs by accelerate's own FSDP2 and DeepSpeed, on two gloo processes, against one process.

Six steps with uneven micro-batches, a rank without any, a save in the middle of an epoch, and a
kill. What accelerate is made to believe, see sharded_ranks.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sharded_ranks import ROWS, WORLD, run_case
from trainer_cases import write_images

EPOCHS, STEPS, SAVED = 3, 6, 3
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"
)
BACKENDS = ["fsdp2", *(pytest.param(f"zero{n}", marks=needs_deepspeed) for n in (2, 3))]
ADAPTED = "an adapter on lm_head is not supported"
REFUSED = {
    "fsdp2": [ADAPTED, "SHARDED_STATE_DICT", "fsdp_version is 1", "loading must be false"],
    "zero2": [ADAPTED],
    "zero3": [ADAPTED, "ZeRO-3 would save no weights", "zero3_init_flag must be false"],
}
# of each backend what docs/training.md says was run
RUN = {
    "fsdp2": ["sft", "mpo", "lora", "rl", "bf16"],
    "zero2": ["sft", "rl"],
    "zero3": ["sft", "mpo", "lora"],
}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded")]


def start(backend: str, model: Path, folder: Path, cases: list[str]) -> tuple[int, str]:
    """Run the two ranks; returns their exit status and what they said."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        *([sys.executable, str(root / "tests/sharded_ranks.py"), backend, model, folder, *cases],),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    return ended.returncode, ended.stdout


def seen_of(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module", params=BACKENDS)
def started(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The backend, and a folder where every case has run; in the last one the ranks were killed."""
    folder = tmp_path_factory.mktemp(request.param)
    write_images(folder, ROWS)
    _, said = start(request.param, tiny_model, folder, [*RUN[request.param], "refusals", "killed"])
    assert "signal SIGKILL" in said, said
    return request.param, folder


@pytest.mark.parametrize("name", ["sft", "mpo", "lora", "rl"])
def test_a_sharded_run_is_one_process(
    name: str, started: tuple[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Losses, norms, what is saved; the vision tower is frozen in RL, and kept features are not."""
    backend, folder = started
    if name not in RUN[backend]:
        pytest.skip(f"{name} was not run by {backend}")
    one = run_case(name, 1, tiny_model, folder, tmp_path / "one")
    ranks = seen_of(folder, name)
    for rank in ranks:
        assert rank["kind"] == ("FSDP" if backend == "fsdp2" else "DEEPSPEED")
        assert len(rank["losses"]) == len(rank["norms"]) == STEPS
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-6)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert rank["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5)
    if name != "rl":
        assert ranks[0]["microbatches"] != ranks[1]["microbatches"]
        assert ranks[1]["microbatches"].count(0) == EPOCHS  # fillers alone
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    ours, theirs = (load_file(place / file) for place in (folder / name, tmp_path / "one"))
    assert sorted(ours) == sorted(theirs)
    for key, weight in theirs.items():
        assert (ours[key] - weight).abs().max() < 1e-5, key
    if name == "lora":
        return
    begun = load_file(tiny_model / file)
    learned = {key for key, weight in theirs.items() if not torch.equal(weight, begun[key])}
    frozen = {key for key in theirs if name == "rl" and "vision_tower" in key}
    assert learned == theirs.keys() - frozen
    transformers.InternVLForConditionalGeneration.from_pretrained(folder / name)


def test_bf16_rounds_no_result(started: tuple[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """Neither V2PE's positions, which the model would refuse, nor the log-probabilities."""
    backend, folder = started
    if "bf16" not in RUN[backend]:
        pytest.skip(f"bf16 was not run by {backend}")
    one = run_case("bf16", 1, tiny_model, folder, tmp_path)
    for rank in seen_of(folder, "bf16"):
        assert rank["losses"] == pytest.approx(one["losses"], rel=5e-3)
        for loss in rank["losses"]:
            assert float(torch.tensor(loss).bfloat16()) != loss


def same(one: Any, other: Any) -> bool:
    """Whether two states hold the same numbers, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "all"):  # numpy
        return bool((one == other).all())
    if hasattr(one, "__dict__") and not isinstance(one, type):  # DeepSpeed's loss scaler
        return type(one) is type(other) and same(vars(one), vars(other))
    return bool(one == other)


def test_what_would_go_wrong_is_refused(started: tuple[str, Path]) -> None:
    backend, folder = started
    for said in seen_of(folder, "refusals"):
        assert len(said) == len(REFUSED[backend])
        for line, expected in zip(said, REFUSED[backend], strict=True):
            assert expected in line


def test_a_killed_run_goes_on_to_the_bit(started: tuple[str, Path], tiny_model: Path) -> None:
    backend, folder = started
    whole, killed = folder / "sft", folder / "killed"
    assert (killed / f"checkpoint-{SAVED}" / "complete.json").exists()
    assert not (killed / f"checkpoint-{STEPS}").exists()
    status, said = start(backend, tiny_model, folder, ["killed"])
    assert status == 0, said
    assert f"going on from {killed}/checkpoint-{SAVED}" in said
    for rank, before in zip(seen_of(folder, "killed"), seen_of(folder, "sft"), strict=True):
        assert rank["losses"] == before["losses"][SAVED:]
        assert rank["norms"] == before["norms"]  # the log goes on, too
    for place in (".", f"checkpoint-{STEPS}"):
        one, other = (load_file(f / place / "model.safetensors") for f in (whole, killed))
        assert same(one, other), place
    files = sorted(
        file.relative_to(whole)
        for file in (whole / f"checkpoint-{STEPS}").rglob("*")
        if file.suffix in (".pt", ".pth", ".bin") and file.name != "training_args.bin"
    )
    assert len(files) >= 2 + WORLD  # optimizer, scheduler, and each rank's random numbers
    for file in files:
        one, other = (torch.load(f / file, weights_only=False) for f in (whole, killed))
        assert same(one, other), file
