"""The ways to compute shared-prefix attention, and what each of them cannot do.

segments  SDPA on segments of like length; anywhere, any dtype, dropout too: the reference
split     a prompt and oneself apart, merged; CPU and CUDA
varlen    torch.nn.attention.varlen, keys gathered; CUDA, 16 bits
flash     flash-attn, keys gathered; CUDA, 16 bits
flex      FlexAttention, compiled; CUDA (on a CPU its forward alone)
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from internvl.attention.flex import attend_flex
from internvl.attention.layout import AttentionLayout
from internvl.attention.segments import attend_segments
from internvl.attention.split import attend_split
from internvl.attention.varlen import VarlenKernel, attend_varlen, flash_varlen, torch_varlen

# q [T, H, D], k and v [T, h, D], layout, scale, dropout -> [T, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, AttentionLayout, float | None, float], Tensor]


@dataclass(frozen=True)
class Case:
    """What is to be computed; None where it is not known yet.

    device: "cpu", "cuda", ... dtype: of queries and keys, under autocast too. grad: whether
    gradients are wanted.
    """

    device: str
    dtype: torch.dtype | None = None
    heads: int | None = None
    key_heads: int | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    grad: bool = True


@dataclass(frozen=True)
class Backend:
    """A way to compute it.

    lack: why it cannot compute a case, or None.
    """

    name: str
    attend: Attend
    lack: Callable[[Case], str | None]


def _no_lack(case: Case) -> str | None:
    return None


def _compute_capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _lack_cuda(case: Case) -> str | None:
    if case.device != "cuda" or not torch.cuda.is_available():
        return "it needs a CUDA device"
    return None


def _lack_dropout(case: Case) -> str | None:
    return f"it has no attention_dropout (here {case.dropout:g})" if case.dropout else None


def _lack_flash_kernel(case: Case) -> str | None:
    """The limits of flash attention 2, which torch and flash-attn share."""
    if lack := _lack_cuda(case) or _lack_dropout(case):
        return lack
    if case.dtype not in (None, torch.bfloat16, torch.float16):
        kind = str(case.dtype).removeprefix("torch.")
        return f"its kernel takes bfloat16 and float16, not {kind} (bf16: true trains so)"
    if case.head_dim is not None and (case.head_dim > 256 or case.head_dim % 8):
        return f"its kernel takes heads of up to 256, in steps of 8, not of {case.head_dim}"
    if torch.version.hip is None and _compute_capability() < (8, 0):
        return "its kernel needs an Ampere GPU or a newer one"
    return None


def _varlen_options() -> frozenset[str]:
    """The arguments of torch's varlen_attn: which differ from 2.11 to 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _lack_split(case: Case) -> str | None:
    if case.device == "cpu":
        if case.dtype not in (None, *_CPU_FLASH):
            return f"its kernel does not take {str(case.dtype).removeprefix('torch.')}"
        return _lack_dropout(case)
    if lack := _lack_flash_kernel(case):
        return lack
    return None if "enable_gqa" in _varlen_options() else "it needs torch 2.12 or newer on CUDA"


_CPU_FLASH = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _lack_flash(case: Case) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return _lack_flash_kernel(case)


def _lack_flex(case: Case) -> str | None:
    if case.device == "cpu" and not case.grad:
        return _lack_dropout(case)
    if case.device == "cpu":
        return "FlexAttention has no backward on a CPU: it cannot train there"
    return _lack_cuda(case) or _lack_dropout(case)


def _varlen(kernel: VarlenKernel) -> Attend:
    """attend_varlen with a kernel; there is no dropout in it."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        assert dropout == 0.0
        return attend_varlen(q, k, v, layout, scale, kernel)

    return attend


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("segments", attend_segments, _no_lack),
        Backend("split", attend_split, _lack_split),
        Backend("varlen", _varlen(torch_varlen), _lack_flash_kernel),
        Backend("flash", _varlen(flash_varlen), _lack_flash),
        Backend("flex", attend_flex, _lack_flex),
    )
}
