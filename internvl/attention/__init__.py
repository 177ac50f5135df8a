"""Attention over a packed row in which completions share their prompt.

One entry in transformers' AttentionInterface, `shared_prefix`, with a layout argument that says
which positions see which (layout.py), and several ways to compute it behind it (backends.py);
choice.py says which one does. docs/attention.md has the whole picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from internvl.attention.backends import BACKENDS, Backend, Case
from internvl.attention.choice import (
    AUTO,
    backend_names,
    check_backend,
    check_language_model,
    choose,
    forget_choices,
)
from internvl.attention.layout import AttentionLayout, Segment, build_layout
from internvl.errors import UserError

__all__ = [
    "AUTO",
    "BACKENDS",
    "SHARED_PREFIX",
    "AttentionLayout",
    "Backend",
    "Case",
    "Segment",
    "backend_names",
    "build_layout",
    "check_backend",
    "check_language_model",
    "choose",
    "forget_choices",
    "shared_prefix_attention",
]

SHARED_PREFIX = "shared_prefix"
# what some language models hand to their attention, and no backend does
_NOT_DONE = {
    "sliding_window": "sliding-window attention",
    "s_aux": "attention sinks",
    "softcap": "capped attention scores",
    "position_bias": "attention with a position bias",
}


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | None = None,
    attention_backend: str = AUTO,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, in transformers' calling convention.

    query: [1, H, T, D]; key, value: [1, h, T, D] with h dividing H. Returns [1, T, H, D].
    attention_backend: one of `backend_names()`. Raises `UserError` for what a shared prefix does
    not have (sliding windows, sinks, capped scores), and for a backend that cannot run here.
    """
    if layout is None:
        raise UserError(f"attention {SHARED_PREFIX!r} needs a layout: call the model with packed=")
    for name, what in _NOT_DONE.items():
        if kwargs.get(name) is not None:
            raise UserError(f"a language model with {what} cannot share prefixes")
    device = query.device
    if torch.is_autocast_enabled(device.type):  # as it does for SDPA; Qwen3's norms give float32
        kind = torch.get_autocast_dtype(device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    case = Case(
        device.type, q.dtype, q.shape[1], k.shape[1], q.shape[2], dropout, torch.is_grad_enabled()
    )
    backend = choose(attention_backend, case, layout, device)
    return backend.attend(q, k, v, layout, scaling, dropout)[None], None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
