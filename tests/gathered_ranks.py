"""Run as a script: two gloo ranks shard a model and gather its weights one by one.

python tests/gathered_ranks.py MODEL OUT [lora]
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from internvl.checkpoint import full_weights, load_model


def lora_model(model: Path) -> torch.nn.Module:
    """The model with an adapter whose weights are drawn, and moves something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=r".*language_model\.layers\..*_proj")
    wrapped = get_peft_model(load_model(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped


def rank_main(rank: int, port: int, model: Path, out: Path, lora: bool) -> None:
    """One of the two ranks: every weight must come whole, and only one at a time."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sharded = lora_model(model) if lora else load_model(model)
    base = sharded.get_base_model() if lora else sharded
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in base.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    weights = {name: weight.clone() for name, weight in full_weights(sharded)}
    save_file(weights, out / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (port, Path(sys.argv[1]), Path(sys.argv[2]), "lora" in sys.argv)
    torch.multiprocessing.start_processes(rank_main, words, nprocs=2, start_method="fork")
