"""The option `attention_backend`: refused before a model is loaded where it cannot be honoured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from internvl.attention import Case, check_backend, check_language_model
from internvl.checkpoint import DTYPES
from internvl.folders import require_hf_layout
from internvl.model import InternVLForConditionalGeneration
from training.arguments import PackedTrainingArguments

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_attention(args: PackedTrainingArguments, text_config: Any, dtype: torch.dtype) -> None:
    """Raise `UserError` for a language model that cannot be packed, or not by this backend.

    dtype: of the weights; autocast goes before it.
    """
    heads = text_config.num_attention_heads
    case = Case(
        args.device.type,
        _AUTOCAST.get(args.mixed_precision, dtype),
        heads,
        text_config.num_key_value_heads,
        getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        getattr(text_config, "attention_dropout", 0.0) or 0.0,
    )
    check_language_model(text_config)
    check_backend(args.attention_backend, case)


def check_checkpoint_attention(
    args: PackedTrainingArguments, folder: str | Path, dtype: str
) -> None:
    """`check_attention` of a checkpoint that is not loaded yet; dtype: as `load_model` takes it."""
    require_hf_layout(Path(folder))
    config = AutoConfig.from_pretrained(str(folder))
    check_attention(args, config.text_config, DTYPES.get(dtype, torch.float32))


def use_attention(model: InternVLForConditionalGeneration, args: PackedTrainingArguments) -> None:
    """Check the option against the model that is there, and set it."""
    check_attention(args, model.config.text_config, model.dtype)
    model.attention_backend = args.attention_backend
