"""Opens the sampler that the options ask for."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist

from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.sampler import StreamSampler, choose_backend, open_sampler
from rl.config import RLConfig
from training.cli import ModelArguments

Kind = Literal["server", "vllm", "transformers"]


def choose_sampler(args: RLConfig, model_args: ModelArguments, folder: Path) -> Kind:
    """Who will sample; nothing is loaded. Raises `UserError` for what cannot be honoured."""
    if model_args.lora_dropout:
        raise UserError(
            "lora_dropout: what is dropped out would be in the ratio to the old log-probabilities, "
            "and in the gap to the sampler, which drop nothing out; leave it at 0 in this stage"
        )
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
        if fault := _whole_only(model_args):
            raise UserError(f"lora_sync is 'adapter', but {fault}: vLLM takes that only merged")
    if args.vllm_enable_sleep_mode and kind != "vllm":
        raise UserError("vllm_enable_sleep_mode is of vLLM in this process")
    return kind


def _whole_only(model_args: ModelArguments) -> str | None:
    """Why a LoRA cannot be added by vLLM itself, or None."""
    if getattr(model_args, "load_in_4bit", False):
        return "the base is in 4 bits here and whole there"
    if model_args.lora_target_modules or list(model_args.lora_parts) != ["llm"]:
        return "the adapter is not of the language model alone"
    if model_args.lora_modules_to_save:
        return "lora_modules_to_save trains whole modules"
    return None


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
    by_itself = model_args.use_peft and (
        args.lora_sync == "adapter"
        or (args.lora_sync == "auto" and kind == "vllm" and _whole_only(model_args) is None)
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
        max_lora_rank=model_args.lora_r if by_itself else None,
        sleep_mode=args.vllm_enable_sleep_mode,
    )


def _same_everywhere(word: str) -> str:
    if not dist.is_initialized():
        return word
    told = [word]
    dist.broadcast_object_list(told, src=0)
    return told[0]
