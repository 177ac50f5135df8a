"""What each stage will take of this machine's memory, by the one estimate there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.doctor.environment import gib
from cascade.doctor.facts import Facts, Launch
from cascade.doctor.findings import Finding, error, ok, warning
from cascade.recipe import StageSpec
from internvl.memory import GIB, Memory, State, Work, count_lora, estimate
from internvl.parts import PARTS

if TYPE_CHECKING:
    from transformers import InternVLConfig

_VLLM_SHARE = 0.9  # of a GPU, where nothing is said
_CPU_CACHE = GIB  # vLLM's cache of keys and values on a CPU (VLLM_CPU_KVCACHE_SPACE)
# bytes of optimizer states a trained number, by words in the name of optim; as a run counts them
_MOMENTS = (
    (("8bit", "4bit"), 2.0),
    (("adafactor",), 0.1),
    (("sgd",), 0.0),
    (("ademamix",), 12.0),
    (("lion", "adagrad", "rmsprop", "muon"), 4.0),
)
_CURE = (
    "use_peft: true, gradient_checkpointing: true, a smaller max_tokens_per_microbatch, or more "
    "devices with launch: {config_file: fsdp2.yaml}"
)


@dataclass(frozen=True)
class Device:
    """Where training runs: its memory and what is free of it, in bytes."""

    total: int
    free: int
    gpu: bool


def this_device() -> Device | None:
    """The smallest GPU, or this machine's memory; None where it cannot be told (no /proc)."""
    import torch

    if torch.cuda.is_available():
        rooms = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
        free, total = min(rooms)
        return Device(total, free, gpu=True)
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Device(total, free, gpu=False)


def check_memory(
    facts: Facts,
    spec: StageSpec,
    config: InternVLConfig,
    parameters: Mapping[str, int],
    device: Device,
) -> list[Finding]:
    """One training stage's estimate against a device's memory; parameters: by part."""
    launch = facts.launch(spec)
    need = estimate_stage(facts, spec, config, parameters, launch, device)
    on_cpu = 1 if device.gpu else launch.here
    total = need.total * on_cpu
    parts = {
        "weights": need.weights,
        "gradients": need.gradients,
        "optimizer": need.optimizer,
        "activations": need.activations + need.logits,
        "engine": need.engine,
    }
    told = " + ".join(f"{gib(size)} {name}" for name, size in parts.items() if size)
    told = f"{gib(total)} GiB = {told}" + (f", {on_cpu} processes" if on_cpu > 1 else "")
    place = "GPU memory" if device.gpu else "this machine's memory"
    told += f"; {place}: {gib(device.free)} of {gib(device.total)} GiB are free"
    where = f"stages.{spec.name}"
    if need.state * on_cpu + need.engine * on_cpu > device.total:
        return [error("memory.stage", told, where, cure=_CURE)]
    if total > device.free:
        return [warning("memory.stage", told, where, cure=_CURE)]
    return [ok("memory.stage", told, where)]


def estimate_stage(
    facts: Facts,
    spec: StageSpec,
    config: InternVLConfig,
    parameters: Mapping[str, int],
    launch: Launch,
    device: Device,
) -> Memory:
    """The memory of one process of a training stage; parameters: by part."""

    def option(name: str) -> Any:
        return facts.option(spec, name)

    number = sum(parameters.values())
    size = 4 if option("dtype") == "float32" else 2
    if option("use_peft"):
        adapters = count_lora(config, int(option("lora_r")))
        base = 0.55 * number if option("load_in_4bit") else size * number
        trained, weights, size, number = adapters, base + 4 * adapters, 4, number + adapters
    else:
        frozen = zip(PARTS, ("freeze_vit", "freeze_projector", "freeze_llm"), strict=True)
        trained = sum(parameters[part] for part, name in frozen if not option(name))
        weights = size * number
    live = spec.kind == "mpo" and not option("precompute_ref_log_probs")
    cut = launch.processes if launch.sharded else 1
    state = State(
        weights=weights,
        parameters=number,
        trained=trained,
        gradient=size * (2 if launch.processes > 1 and not launch.sharded else 1),
        moments=moments(str(option("optim"))),
        reference=size * trained if live else 0,
        shards=(cut, cut, cut),
    )
    tokens = int(option("max_tokens_per_microbatch"))
    tiles = max(1, tokens // (2 * config.image_seq_length))
    work = Work(
        tokens=tokens,
        tiles=min(tiles, option("max_tiles_per_microbatch") or tiles),
        checkpointing=bool(option("gradient_checkpointing")),
        vision=not option("freeze_vit") and not option("use_peft"),
        bf16=bool(option("bf16")),
        entropy=spec.kind == "rl",
        gpu=device.gpu,
    )
    return estimate(config, state, work, _engine(facts, spec, sum(parameters.values()), device))


def _engine(facts: Facts, spec: StageSpec, parameters: int, device: Device) -> float:
    """What a sampler in the training process holds."""
    if spec.kind != "rl" or facts.option(spec, "sampler") == "server":
        return 0
    if spec.options.get("server"):
        return 0
    if not device.gpu:
        return 4 * parameters + _CPU_CACHE
    if facts.option(spec, "sampler") == "transformers":
        return 2 * parameters
    share = facts.option(spec, "vllm_gpu_memory_utilization") or _VLLM_SHARE
    return float(share) * device.total


def moments(optim: str) -> float:
    """Bytes of optimizer states for each trained number; two float32 moments where unknown."""
    return next((size for words, size in _MOMENTS if any(word in optim for word in words)), 8.0)


def disk_bytes(facts: Facts, spec: StageSpec, parameters: int, trained: int) -> int:
    """Bytes that a training stage leaves on disk: its result, and the checkpoints it keeps.

    Of a stage that never says how many are kept, three are counted.
    """
    weights = (4 if facts.option(spec, "dtype") == "float32" else 2) * parameters
    if facts.option(spec, "use_peft"):
        weights = 4 * trained
    kept = 0
    if facts.option(spec, "save_strategy") != "no":
        states = 0 if facts.option(spec, "save_only_model") else moments("adam") * trained
        kept = int(weights + states) * ((facts.option(spec, "save_total_limit") or 2) + 1)
    merged = 4 * parameters if facts.option(spec, "use_peft") else 0
    return weights + kept + merged
