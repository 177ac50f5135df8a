"""Starting vLLM in the training process: its environment, its options, what the model is."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from internvl.errors import UserError

# Read by vLLM when it is imported. The engine must live in this process (weights are handed over
# as tensors); the others are defaults that the user's environment may override.
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
PREFILL_TOKENS = 4096  # prompt tokens a step, or one whole prompt where that is longer
ENCODER_TOKENS = 8192  # vLLM's own budget on a GPU of less than 70 GiB: of 31 tiles and a thumbnail


def describe(model: Path) -> tuple[dict[str, tuple[int, ...]], bool, Any]:
    """Names and shapes of transformers' parameters, whether lm_head is tied, the LLM's config."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from internvl.conversion.heads import has_own_head

    config = AutoConfig.from_pretrained(str(model))
    if config.tie_word_embeddings and has_own_head(model):
        config.tie_word_embeddings = False  # vLLM does not tie it either
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    return shapes, "lm_head.weight" not in shapes, config.text_config


def _import_vllm() -> tuple[Any, bool]:
    """vLLM's `LLM` class, imported under our settings, and whether it runs on a CPU."""
    os.environ.update(FORCED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported: {error}. Install it, or use the transformers backend"
        ) from None
    return LLM, current_platform.is_cpu()


def lora_rank(asked: int) -> int:
    """The smallest rank that vLLM has adapters of and that is enough."""
    ranks = (8, 16, 32, 64, 128, 256, 320, 512)
    if asked > ranks[-1]:
        raise UserError(f"an adapter of rank {asked}: vLLM takes up to {ranks[-1]}; sync it merged")
    return next(rank for rank in ranks if rank >= asked)


def start_engine(options: dict[str, Any], max_image_tokens: int) -> tuple[Any, bool, bool]:
    """Start the engine; returns it, whether it runs on a CPU, and whether it made a group."""
    import torch

    llm_class, on_cpu = _import_vllm()
    if options["dtype"] == "auto":
        options["dtype"] = "float32" if on_cpu else "bfloat16"
    if on_cpu:
        if "gpu_memory_utilization" in options:
            raise UserError(
                "gpu_memory_utilization was given, but vLLM runs on a CPU here: "
                "set VLLM_CPU_KVCACHE_SPACE (GiB) instead"
            )
        options["enable_chunked_prefill"] = False
        options["enforce_eager"] = True
        options["max_num_batched_tokens"] = max(PREFILL_TOKENS, options["max_model_len"])
        if options.get("enable_sleep_mode"):
            raise UserError("sleep mode gives a GPU's memory back, and vLLM runs on a CPU here")
    elif max_image_tokens > ENCODER_TOKENS:
        # an image is encoded in one step: one that is over this budget would never be
        options["max_num_batched_tokens"] = max_image_tokens
    had_group = torch.distributed.is_initialized()
    set_num_threads = torch.set_num_threads
    with warnings.catch_warnings():
        # vLLM touches a deprecated name of torch while it starts; nobody here can act on it.
        warnings.simplefilter("ignore", FutureWarning)
        llm = llm_class(
            **options,
            generation_config="vllm",  # not the checkpoint's: all sampling options come from us
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            limit_mm_per_prompt={"video": 0},
            use_tqdm_on_load=False,
        )
    # vLLM on a CPU replaces this function by one that does nothing, for the whole process.
    torch.set_num_threads = set_num_threads
    return llm, on_cpu, not had_group
