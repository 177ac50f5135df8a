"""Two gloo ranks go on from their checkpoint to the weights of the run that was not stopped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"train_file": "sft.jsonl", "per_device_train_batch_size": 4, "num_train_epochs": 1},
    # weight decay moves the weights, though an untrained model's groups have no spread
    "rl": {
        "train_file": "rl.jsonl",
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "steps_per_generation": 3,
        "max_steps": 4,
        "max_completion_length": 6,
        "sampler": "transformers",
        "weight_decay": 0.1,
    },
}


def run(stage: str, model: Path, world: Path, output: Path) -> str:
    """A stage under torchrun on two processes; returns what they printed."""
    options = {
        "model_name_or_path": model,
        "image_root": world,
        "output_dir": output,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_steps": 2,
        "logging_steps": 1,
        "max_tokens_per_microbatch": 128,
        **STAGES[stage],
    }
    options["train_file"] = world / options["train_file"]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    ended = subprocess.run(
        [sys.executable, *launch, "-m", stage, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on(stage: str, tiny_model: Path, tiny_world: Path, tmp_path: Path) -> None:
    """As after a kill behind step 3: the last checkpoint and the result are not there."""
    output = tmp_path / "out"
    run(stage, tiny_model, tiny_world, output)
    result = output / "model.safetensors"
    weights = result.read_bytes()
    assert weights != (tiny_model / "model.safetensors").read_bytes()
    assert len(list((output / "checkpoint-2").glob("rng_state_*.pth"))) == 2
    result.unlink()
    shutil.rmtree(output / "checkpoint-4")
    assert f"going on from {output / 'checkpoint-2'}" in run(stage, tiny_model, tiny_world, output)
    assert result.read_bytes() == weights
