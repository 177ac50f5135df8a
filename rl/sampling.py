"""Opens the sampler that the options ask for."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import distributed as dist
from torch import nn

from internvl.adapters import WEIGHTS, adapter_settings
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.sampler import StreamSampler, choose_backend, open_sampler
from rl.config import RLConfig
from training.cli import ModelArguments

Kind = Literal["server", "vllm", "transformers"]
_NO_DROPOUT = (
    "what is dropped out would be in the ratio to the old log-probabilities, and in the gap to the "
    "sampler, which drop nothing out"
)


def switch_off_dropout(model: nn.Module) -> None:
    """Nothing is dropped out of an adapter that an earlier stage trained so.

    Raises `UserError` for dropout in the model itself, which its config.json asks for.
    """
    config = getattr(model, "config", None)
    if getattr(getattr(config, "text_config", None), "attention_dropout", 0.0):
        raise UserError(f"text_config.attention_dropout: {_NO_DROPOUT}; set it to 0 in config.json")
    dropping = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    own = [name for name in dropping if "lora_dropout" not in name]
    if own:
        raise UserError(
            f"the model drops out in {own[0]}: {_NO_DROPOUT}; set it to 0 in config.json"
        )
    if dropping:
        (share, *_) = {module.p for module in dropping.values()}
        print(f"lora_dropout {share:g} of the adapter is 0 in this stage: {_NO_DROPOUT}")
    for module in dropping.values():
        module.p = 0.0


def choose_sampler(args: RLConfig, model_args: ModelArguments, folder: Path) -> Kind:
    """Who will sample; nothing is loaded. Raises `UserError` for what cannot be honoured."""
    if model_args.lora_dropout:
        raise UserError(f"lora_dropout: {_NO_DROPOUT}; leave it at 0 in this stage")
    if args.uses_servers:
        kind: Kind = "server"
    else:
        asked = args.sampler if args.sampler in ("vllm", "transformers") else "auto"
        kind = choose_backend(folder, asked)  # type: ignore[arg-type]
    if args.lora_sync != "auto" and not model_args.use_peft:
        raise UserError("lora_sync is given, but there is no LoRA (use_peft)")
    if args.lora_sync == "adapter":
        if kind == "transformers":
            raise UserError("lora_sync is 'adapter', which transformers as a sampler cannot take")
        if fault := _adapter(model_args).whole_only:
            raise UserError(f"lora_sync is 'adapter', but {fault}: vLLM takes that only merged")
    if args.vllm_enable_sleep_mode and kind != "vllm":
        raise UserError("vllm_enable_sleep_mode is of vLLM in this process")
    return kind


class _Adapter(NamedTuple):
    """A run's LoRA: its largest rank, and why vLLM cannot add it by itself (None: it can)."""

    rank: int
    whole_only: str | None


def _adapter(model_args: ModelArguments) -> _Adapter:
    """As the options ask for it, or as an earlier stage's adapter, which is trained on, is."""
    rank, whole_modules = model_args.lora_r, bool(model_args.lora_modules_to_save)
    llm_alone = not model_args.lora_target_modules and list(model_args.lora_parts) == ["llm"]
    other = False
    if model_args.goes_on:
        folder = Path(model_args.model_name_or_path)
        own = adapter_settings(folder)
        rank = max(own["r"], *(own.get("rank_pattern") or {}).values(), 0)
        whole_modules = bool(own.get("modules_to_save"))
        other = bool(own.get("use_dora") or own.get("lora_bias") or own.get("bias") != "none")
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            llm_alone = all(".language_model." in name for name in file.keys())  # noqa: SIM118
    whole_only = None
    if getattr(model_args, "load_in_4bit", False):
        whole_only = "the base is in 4 bits here and whole there"
    elif not llm_alone:
        whole_only = "the adapter is not of the language model alone"
    elif whole_modules:
        whole_only = "the adapter trains whole modules (lora_modules_to_save)"
    elif other:
        whole_only = "the adapter has DoRA or biases"
    return _Adapter(rank, whole_only)


def longest_prompt(rows: Iterable[Row], encoder: Encoder, args: RLConfig) -> int:
    """Tokens of the longest prompt; every rank looks at its share of the rows."""
    mine = [row for index, row in enumerate(rows) if index % args.world_size == args.process_index]
    longest = max((encoder.length(row, "question") for row in mine), default=1)
    if args.world_size == 1:
        return longest
    most = torch.tensor(longest, device=args.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def open_policy_sampler(
    args: RLConfig, model_args: ModelArguments, folder: Path, kind: Kind, longest: int, tile: int
) -> StreamSampler:
    """The sampler of a run on the checkpoint `folder`.

    longest: tokens of the longest prompt. tile: visual tokens of a tile.
    """
    adapter = _adapter(model_args) if model_args.use_peft else _Adapter(0, None)
    by_itself = model_args.use_peft and (
        args.lora_sync == "adapter"
        or (args.lora_sync == "auto" and kind == "vllm" and adapter.whole_only is None)
    )
    dtype: Any = "bfloat16" if args.bf16 else model_args.dtype
    if kind == "server":
        from internvl.server_sampler import open_servers
        from internvl.server_weights import SharedWeights

        weights = SharedWeights(
            Path(args.server_weights_dir or Path(args.output_dir or ".") / "weights"),
            dtype=dtype,
            timeout=args.server_timeout,
            run=_same_everywhere(uuid.uuid4().hex[:8]),
            lead=args.process_index == 0,
            adapters=by_itself,
        )
        return open_servers(
            *(folder, args.server or []),
            seed=args.seed,
            timeout=args.server_timeout,
            patience=args.server_patience,
            served_name=args.server_model,
            weights=weights,
        )
    return open_sampler(
        folder,
        backend=kind,
        seed=args.seed,
        max_model_len=longest + args.max_completion_length,
        dtype=dtype,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_image_tokens=min(longest, (args.max_tiles + 1) * tile),
        max_lora_rank=adapter.rank if by_itself else None,
        sleep_mode=args.vllm_enable_sleep_mode,
    )


def _same_everywhere(word: str) -> str:
    if not dist.is_initialized():
        return word
    told = [word]
    dist.broadcast_object_list(told, src=0)
    return told[0]
