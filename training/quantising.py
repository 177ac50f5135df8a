"""QLoRA (arXiv 2305.14314): the language model's linear layers held in 4 bits under an adapter.

The vision tower, the projector, the embeddings and the head stay as they are: they are small, and
an image's features are what everything else reads. Only bitsandbytes is known here, and only by
its name: transformers loads through it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from internvl.errors import UserError

# paths of the modules that stay as they are
WHOLE = ("model.vision_tower", "model.multi_modal_projector", "lm_head")


def check_four_bit(asked: bool, use_peft: bool, dtype: str) -> None:
    """Raise `UserError` where a 4-bit base was asked for and cannot be."""
    if not asked:
        return
    if not use_peft:
        raise UserError("load_in_4bit needs use_peft: weights in 4 bits cannot be trained")
    if dtype == "float16":
        raise UserError("load_in_4bit computes in dtype: give bfloat16 or float32, not float16")
    if not is_bitsandbytes_available():
        raise UserError("load_in_4bit needs the package bitsandbytes (the extra 'qlora')")


def four_bit(*, kind: str, nested: bool, dtype: torch.dtype) -> Any:
    """The configuration that transformers loads a 4-bit base by.

    kind: "nf4" or "fp4". nested: the scales are quantised, too. dtype: of the rest, and of what
    is computed.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards storage of the compute type only (accelerate leaves bytes out)
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=list(WHOLE),
    )
