"""What a run will take of memory, told before it starts, and refused where it cannot fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from torch import nn

from internvl.errors import UserError
from internvl.memory import GIB, Memory, State, Work, estimate
from internvl.parts import PARTS
from training.arguments import PackedTrainingArguments
from training.parts import Count

# bytes of optimizer states for each trained number, by words in the name of optim; the first wins
_MOMENTS = (
    (("8bit", "4bit"), 2.0),
    (("adafactor",), 0.1),
    (("sgd",), 0.0),
    (("ademamix",), 12.0),
    (("lion", "adagrad", "rmsprop", "muon"), 4.0),
)
_ADAM = 8.0


@dataclass(frozen=True)
class Room:
    """Bytes of a memory: all of it, and what is free now."""

    total: int
    free: int


def optimizer_bytes(optim: str) -> float:
    """Bytes of optimizer states for each trained number; two float32 moments where unknown."""
    for words, size in _MOMENTS:
        if any(word in optim for word in words):
            return size
    return _ADAM


def shards(args: PackedTrainingArguments) -> tuple[int, int, int]:
    """Over how many devices weights, gradients and optimizer states are cut up."""
    world = args.world_size
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return world, world, world
    plugin = getattr(args, "deepspeed_plugin", None)
    stage = 0 if plugin is None else plugin.zero_stage
    return (world if stage >= 3 else 1, world if stage >= 2 else 1, world if stage >= 1 else 1)


def state_of(model: nn.Module, args: PackedTrainingArguments) -> State:
    """What the model, its gradients and the optimizer hold; DDP keeps gradients twice (buckets)."""
    parameters = list(model.parameters())
    number = sum(p.numel() for p in parameters if p.requires_grad)
    trained = _trained_bytes(model)
    size = trained / max(1, number)
    cut = shards(args)
    return State(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        parameters=sum(p.numel() for p in parameters),
        trained=number,
        gradient=size * (2 if args.world_size > 1 and cut == (1, 1, 1) else 1),
        moments=optimizer_bytes(args.optim.value),
        reference=trained * args.copies_of_trained.device,
        shards=cut,
    )


def _trained_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def work_of(config: Any, args: PackedTrainingArguments, counts: dict[str, Count]) -> Work:
    """A full micro-batch; where no limit of tiles is given, half of its tokens are visual."""
    tokens = args.max_tokens_per_microbatch
    tiles = max(1, tokens // (2 * config.image_seq_length))
    return Work(
        tokens=tokens,
        tiles=min(tiles, args.max_tiles_per_microbatch or tiles),
        checkpointing=args.gradient_checkpointing,
        vision=counts[PARTS[0]].trained > 0,
        bf16=args.bf16,
        entropy=args.scores_entropy,
        gpu=args.device.type != "cpu",
    )


def loader_bytes(config: Any, args: PackedTrainingArguments) -> int:
    """Bytes of the uint8 tiles of the steps that the data loader has ready.

    Each of its workers is two steps ahead.
    """
    height, width = config.vision_config.image_size
    steps = 1 + 2 * args.dataloader_num_workers
    return int(steps * args.tiles_of_a_step(config.image_seq_length) * 3 * height * width)


def device_room(device: torch.device) -> Room | None:
    """The memory of the training device; None where it cannot be told."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, free)
    return host_room() if device.type == "cpu" else None


def host_room() -> Room | None:
    """The memory of this machine; None where it cannot be told (no /proc)."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    sizes = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Room(*sizes)


def report_memory(
    model: nn.Module, args: PackedTrainingArguments, counts: dict[str, Count]
) -> Sequence[str]:
    """The lines to print: the device's memory, the host's, and a warning where one is short.

    The model has been loaded on the host, and a sampler's engine is there if the stage has one:
    what they take is no longer free. Raises `UserError` where weights, gradients and optimizer
    alone are more than the device has.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = base.config
    state = state_of(model, args)
    need = estimate(config, state, work_of(config, args, counts))
    room = device_room(args.device)
    lines = [_device_line(need, room)]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ready = loader_bytes(config, args)
    on_host = args.device.type == "cpu"
    loaded = 0 if on_host else state.weights
    start = args.copies_of_trained.host * _trained_bytes(model) / state.shards[0]
    host = local * (ready + max(loaded, start))
    kept = f" (then {_gib(start)} of the start)" if start else ""
    lines.append(
        f"host memory, estimated: {_gib(host)} GiB = {local} processes x ({_gib(loaded)} weights "
        f"while they load{kept} + {_gib(ready)} tiles of steps ahead){_of(host_room())}"
    )
    if room is None:
        return lines
    if need.state > room.total:
        raise UserError(
            f"weights, gradients and optimizer take {_gib(need.state)} GiB of the device's "
            f"{_gib(room.total)} GiB: {_LESS_STATE}"
        )
    # on the CPU the weights are in their place already, and all the host holds is the device's
    more = need.total - state.weights + host if on_host else need.total
    if more > room.free:
        lines.append(
            f"WARNING: about {_gib(more)} GiB are needed and {_gib(room.free)} GiB "
            f"are free: lower max_tokens_per_microbatch ({args.max_tokens_per_microbatch}), set "
            f"gradient_checkpointing, or {_LESS_STATE}"
        )
    return lines


_LESS_STATE = (
    "train by LoRA (use_peft), freeze parts, take an optim of 8 bits, or shard over more devices "
    "(FSDP2, ZeRO)"
)


def _device_line(need: Memory, room: Room | None) -> str:
    shares = [("weights", need.weights), ("gradients", need.gradients)]
    shares += [("optimizer", need.optimizer), ("activations", need.activations + need.logits)]
    told = " + ".join(f"{_gib(size)} {name}" for name, size in shares)
    return f"device memory, estimated: {_gib(need.total)} GiB = {told}{_of(room)}"


def _of(room: Room | None) -> str:
    if room is None:
        return ""
    return f"; {_gib(room.free)} of {_gib(room.total)} GiB are free"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"
