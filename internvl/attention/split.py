"""Backend `split`: a completion's attention in two parts, to its prompt and to itself, merged.

    to the prompt   all completions of a prompt as one sequence of queries, no mask, no copies
    to itself       causal, each prompt and each completion a sequence of its own
    together        l = log(exp l1 + exp l2);  out = exp(l1 - l) out1 + exp(l2 - l) out2

where l1, l2 are the log-sum-exps of the scores. (Cascade inference, flashinfer.ai/2024/02/02;
Hydragen, arXiv 2402.05099, section 3.1.) The backward of flash attention (arXiv 2205.14135,
algorithm 4) recomputes probabilities as exp(score - l) and takes rowsum(grad * out): given the
merged l and out it is exact for each part, and the parts' gradients add up. So every score is
computed once, a prompt's keys are read once for all completions, and nothing is padded.

Kernels: on a CPU torch's own flash attention (run here); on CUDA the kernels beneath
torch.nn.attention.varlen (from torch 2.12; not run here).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from internvl.attention.layout import AttentionLayout, SplitIndices, VarlenIndices, split_indices


class Kernel(Protocol):
    """Attention of several sequences, and its backward from outputs that may be merged ones.

    q, out, grad: [Tq, H, D]; k, v: [Tk, h, D]; lse: [H, Tq], the log-sum-exps of scaled scores.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        at: VarlenIndices, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""


class CpuKernel:
    """torch's flash attention for CPUs, sequence after sequence; key heads are not repeated."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [Tq, H, D] and lse [H, Tq]."""
        groups = k.shape[1]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
        out_of, lse_of = _grouped(out, groups), lse.unflatten(0, (groups, -1))
        q_of, k_of, v_of = _grouped(q, groups), _repeated(k, q), _repeated(v, q)
        for q0, q1, k0, k1 in at.spans:
            one, its_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_of[:, :, q0:q1], k_of[:, :, k0:k1], v_of[:, :, k0:k1], 0.0, causal, scale=scale
            )
            out_of[:, :, q0:q1] = one
            lse_of[:, :, q0:q1] = its_lse
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        at: VarlenIndices, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        groups = k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        q_of, k_of, v_of = _grouped(q, groups), _repeated(k, q), _repeated(v, q)
        grad_of, out_of, dq_of = (_grouped(states, groups) for states in (grad, out, dq))
        lse_of = lse.unflatten(0, (groups, -1))
        for q0, q1, k0, k1 in at.spans:
            of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(grad_of[:, :, q0:q1], q_of[:, :, q0:q1], k_of[:, :, k0:k1], v_of[:, :, k0:k1]),
                *(out_of[:, :, q0:q1], lse_of[:, :, q0:q1], 0.0, causal),
                scale=scale,
            )
            dq_of[:, :, q0:q1] = of_q
            dk[k0:k1] = of_k.sum(1).transpose(0, 1)
            dv[k0:k1] = of_v.sum(1).transpose(0, 1)
        return dq, dk, dv


def _grouped(states: Tensor, groups: int) -> Tensor:
    """[T, H, D] -> [h, H/h, T, D], a view: a key head and the query heads that share it."""
    return states.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _repeated(states: Tensor, q: Tensor) -> Tensor:
    """[T, h, D] -> [h, H/h, T, D], a view with a stride of 0."""
    shared = q.shape[1] // states.shape[1]
    return states.transpose(0, 1)[:, None].expand(-1, shared, -1, -1)


class CudaKernel:
    """The kernels of torch.nn.attention.varlen, all sequences in one call. Not run here."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [Tq, H, D] and lse [H, Tq]."""
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        out, lse = varlen_attn(
            *(q, k, v, at.cu_seqlens_q, at.cu_seqlens_k, at.max_seqlen_q, at.max_seqlen_k),
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=True,
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        at: VarlenIndices, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, by the operator that varlen_attn registers as its backward."""
        import torch.nn.attention.varlen  # registers the operator

        return torch.ops.torch_attn._varlen_attn_backward(
            *(grad.contiguous(), q, k, v, out, lse.contiguous()),
            *(at.cu_seqlens_q, at.cu_seqlens_k, at.max_seqlen_q, at.max_seqlen_k, causal),
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            scale,
            [-1, 0] if causal else [-1, -1],
        )


class _Split(torch.autograd.Function):
    """The two parts, merged; and backward through both from the merged output."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: SplitIndices, scale: float, kernel: Kernel
    ) -> Tensor:
        out, lse = kernel.forward(q, k, v, at.own, True, scale)
        if at.prefix is not None:
            there = at.prefix.key_index
            assert there is not None
            keys, values = k.index_select(0, there), v.index_select(0, there)
            queries = q.index_select(0, at.queries)
            prefix_out, prefix_lse = kernel.forward(queries, keys, values, at.prefix, False, scale)
            own_lse = lse.index_select(1, at.queries)
            merged = torch.logaddexp(own_lse, prefix_lse)
            weight = (prefix_lse - merged).exp().T[..., None]
            own_out = out.index_select(0, at.queries).to(weight.dtype)
            mixed = torch.lerp(own_out, prefix_out.to(weight.dtype), weight)
            out.index_copy_(0, at.queries, mixed.to(out.dtype))
            lse.index_copy_(1, at.queries, merged)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.at, ctx.scale, ctx.kernel = at, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        at, scale, kernel = ctx.at, ctx.scale, ctx.kernel
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, at.own, True, scale)
        if at.prefix is not None:
            there = at.prefix.key_index
            grad, queries, out = (s.index_select(0, at.queries) for s in (grad, q, out))
            keys, values = k.index_select(0, there), v.index_select(0, there)
            lse = lse.index_select(1, at.queries)
            more = kernel.backward(grad, queries, keys, values, out, lse, at.prefix, False, scale)
            for total, part, index in zip(
                (dq, dk, dv), more, (at.queries, there, there), strict=True
            ):
                total.index_add_(0, index, part)  # no index twice: nothing depends on an order
        return dq, dk, dv, None, None, None


KERNELS: dict[str, Kernel] = {"cpu": CpuKernel(), "cuda": CudaKernel()}


def attend_split(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None, dropout: float
) -> Tensor:
    """q: [T, H, D]; k, v: [T, h, D]. Returns [T, H, D]."""
    assert dropout == 0.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel = KERNELS[q.device.type]
    return _Split.apply(q, k, v, layout.prepared(split_indices), scale, kernel)
