"""Rows of any shape, the dense mask that defines them, and kernels as their documents say."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvl.attention import Segment
from internvl.attention.layout import VarlenIndices

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# examples of a row: (tokens of the prompt, tokens of each completion)
EXAMPLES = st.lists(
    st.tuples(st.integers(0, 20), st.lists(st.integers(1, 12), min_size=1, max_size=5)),
    min_size=1,
    max_size=3,
)


def row_of(examples: list[tuple[int, list[int]]]) -> tuple[list[Segment], Tensor]:
    """The row's segments, and who sees whom: bool [T, T], from the definition."""
    length = sum(prompt + sum(completions) for prompt, completions in examples)
    sees = torch.zeros(length, length, dtype=torch.bool)
    segments, here = [], 0
    for prompt, completions in examples:
        start, here = here, here + prompt
        sees[start:here, start:here] = torch.ones(prompt, prompt).tril().bool()
        for branch, size in enumerate(completions):
            first, here = here, here + size
            sees[first:here, start : start + prompt] = True
            sees[first:here, first:here] = torch.ones(size, size).tril().bool()
            if branch == 0:
                segments.append(Segment(0, 0, start, here))
            else:
                segments.append(Segment(start, start + prompt, first, here))
    return segments, sees


def random_states(length: int) -> list[Tensor]:
    """q, k, v and a weight of the output: [T, heads, width] in float64."""
    generator = torch.Generator().manual_seed(length)
    states = [
        torch.randn(length, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]
    return [*(state.requires_grad_() for state in states[:3]), states[3]]


def dense(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> Tensor:
    """Attention under a mask over the whole row; q: [T, H, D], k and v: [T, h, D]."""
    q, k, v = (state.transpose(0, 1)[None] for state in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _sequences(at: VarlenIndices) -> list[tuple[slice, slice]]:
    """From cu_seqlens alone, as a kernel reads them."""
    q, k = at.cu_seqlens_q.tolist(), at.cu_seqlens_k.tolist()
    assert max(b - a for a, b in pairwise(q)) == at.max_seqlen_q
    assert max(b - a for a, b in pairwise(k)) == at.max_seqlen_k
    pairs = [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]
    assert at.spans == [(one.start, one.stop, two.start, two.stop) for one, two in pairs]
    return pairs


def _mask(queries: int, keys: int, causal: bool) -> Tensor:
    """Causal at the bottom right: query i sees keys 0 .. keys - queries + i."""
    mask = torch.ones(queries, keys, dtype=torch.bool)
    return mask.tril(keys - queries) if causal else mask


def seen_by_layout(at: VarlenIndices, queries: Tensor, causal: bool, length: int) -> Tensor:
    """How often each position of the row sees each: [T, T]; queries: their places in the row."""
    keys = torch.arange(length) if at.key_index is None else at.key_index
    seen = torch.zeros(length, length, dtype=torch.int)
    for q, k in _sequences(at):
        mask = _mask(q.stop - q.start, k.stop - k.start, causal)
        seen[queries[q][:, None], keys[k][None]] += mask.int()
    return seen


class PlainKernel:
    """Flash attention's contract in plain torch: the forward, and algorithm 4 backward."""

    def _scores(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Scaled and masked [H, n, m], and the keys with their heads repeated."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        return scores.masked_fill(~_mask(len(q), len(k), causal), -torch.inf), k

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for i, j in _sequences(at):
            scores, _ = self._scores(q[i], k[j], scale, causal)
            values = v[j].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            lse[:, i] = scores.logsumexp(-1)
            out[i] = torch.einsum("hij,jhd->ihd", (scores - lse[:, i, None]).exp(), values)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        at: VarlenIndices, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, j in _sequences(at):
            scores, keys = self._scores(q[i], k[j], scale, causal)
            values = v[j].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            p = (scores - lse[:, i, None]).exp()
            dp = torch.einsum("ihd,jhd->hij", grad[i], values)
            ds = p * (dp - (grad[i] * out[i]).sum(-1).T[..., None]) * scale
            dq[i] = torch.einsum("hij,jhd->ihd", ds, keys)
            for total, each in (
                (dk, torch.einsum("hij,ihd->jhd", ds, q[i])),
                (dv, torch.einsum("hij,ihd->jhd", p, grad[i])),
            ):
                total[j] += each.unflatten(1, (k.shape[1], -1)).sum(2)
        return dq, dk, dv


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, at: VarlenIndices, scale: float | None) -> Tensor:
    """flash_attn_varlen_func with causal=True, in plain torch, autograd through it."""
    assert scale is not None
    shared = q.shape[1] // k.shape[1]
    outputs = []
    for i, j in _sequences(at):
        keys, values = (state[j].repeat_interleave(shared, dim=1) for state in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[i], keys) * scale
        scores = scores.masked_fill(~_mask(len(q[i]), len(keys), True), -torch.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
    return torch.cat(outputs)
