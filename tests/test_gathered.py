"""Sharded weights, gathered one whole tensor at a time (FSDP2, two gloo ranks)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gathered_ranks import lora_model
from safetensors.torch import load_file

from internvl.checkpoint import full_weights, load_model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_shards_give_the_weights_of_one_process(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """By the same names, on every rank; a LoRA is merged in passing, its base untouched."""
    script = Path(__file__).with_name("gathered_ranks.py")
    words = [sys.executable, str(script), str(tiny_model), str(tmp_path), kind]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    model = lora_model(tiny_model) if kind == "lora" else load_model(tiny_model)
    expected = {name: weight.detach() for name, weight in full_weights(model)}
    for rank in range(2):
        gathered = load_file(tmp_path / f"rank{rank}.safetensors")
        assert gathered.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.allclose(gathered[name], weight, atol=1e-7, rtol=0), name
