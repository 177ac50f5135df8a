"""Backends `varlen` and `flash`: one call of a variable-length kernel, keys and values gathered.

`varlen` is torch.nn.attention.varlen (torch 2.11 and newer), `flash` the package flash-attn; both
get the same indices (`varlen_indices`), whose meaning is tested on the CPU against the documented
contract: query i of n over m keys sees keys 0 .. m - n + i. Neither kernel was run here. torch
does not document its alignment, but names its flash kernel's causal one "lower right"
(torch/nn/attention/bias.py); choice.py compares the result with `segments` before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from internvl.attention.layout import AttentionLayout, VarlenIndices, varlen_indices

# [Tq, H, D], [Tk, h, D], [Tk, h, D], indices, scale -> [Tq, H, D]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, VarlenIndices, float | None], Tensor]


class _Gather(torch.autograd.Function):
    """Rows at an index; backward adds up in float32, as a prompt's rows are taken many times."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = states.shape
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
        total = grad.new_zeros(ctx.shape, dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def gather(states: Tensor, index: Tensor) -> Tensor:
    """states [T, ...] at index [K] -> [K, ...]; its gradient is added up in float32."""
    return _Gather.apply(states, index)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None,
    kernel: VarlenKernel,
) -> Tensor:  # fmt: skip
    """q: [T, H, D]; k, v: [T, h, D]. Returns [T, H, D]."""
    at = layout.prepared(varlen_indices)
    if at.key_index is not None:
        k, v = gather(k, at.key_index), gather(v, at.key_index)
    return kernel(q, k, v, at, scale)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, scale: float | None) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn, causal. Not run here."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            shared = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    out = varlen_attn(
        *(q, k, v, at.cu_seqlens_q, at.cu_seqlens_k, at.max_seqlen_q, at.max_seqlen_k),
        scale=scale,
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, scale: float | None) -> Tensor:
    """flash_attn.flash_attn_varlen_func (2.1 or newer), causal. Not run here."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        *(q, k, v, at.cu_seqlens_q, at.cu_seqlens_k, at.max_seqlen_q, at.max_seqlen_k),
        softmax_scale=scale,
        causal=True,
    )
