"""Attention over a packed row in which completions share their prompt.

One entry in transformers' AttentionInterface, `shared_prefix`. The row is cut into segments; the
queries of a segment see a prefix (the prompt) and, causally, the segment itself:

    prompt + first completion:   q = k = [start, end)
    every other completion:      q = [start, end), k = [prefix_start, prefix_end) + [start, end)

Segments of like length are computed together by one scaled_dot_product_attention call (padding
exists inside that call only, and is never read back), so no mask over the whole row is ever built:
a dense one costs T^2 (1.35x slower at 4 pairs a row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from internvl.errors import UserError

SHARED_PREFIX = "shared_prefix"
MAX_PADDING = 1.5  # a call may compute at most this many times the scores that are needed
MAX_SCORES = 2**24  # scores of one head in one call, a bound on its mask


@dataclass(frozen=True)
class Segment:
    """Queries [start, end) that see [prefix_start, prefix_end) and themselves, causally."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int

    @property
    def queries(self) -> int:
        """Number of query positions."""
        return self.end - self.start

    @property
    def keys(self) -> int:
        """Number of key positions."""
        return self.prefix_end - self.prefix_start + self.queries


@dataclass
class AttentionCall:
    """Segments computed together.

    queries: [B, Lq] positions in the row, keys: [B, Lk], both padded with position 0; mask: bool
    [B, 1, Lq, Lk], True where a query sees a key, or None for one plain causal segment.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass
class AttentionLayout:
    """How a row of T tokens is attended: the calls, and where each position's output lies.

    gather: [T], the index of a position's output in the calls' outputs laid end to end.
    """

    calls: list[AttentionCall]
    gather: Tensor

    def on(self, device: torch.device) -> AttentionLayout:
        """The same layout with its indices and masks on `device`."""
        calls = [
            AttentionCall(
                call.queries.to(device),
                call.keys.to(device),
                None if call.mask is None else call.mask.to(device),
            )
            for call in self.calls
        ]
        return AttentionLayout(calls, self.gather.to(device))


def _share_calls(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments of like length together, within the bounds on padding and size."""
    calls: list[list[Segment]] = []
    needed = 0
    for segment in sorted(segments, key=lambda s: (s.queries, s.keys, s.start)):
        if calls:
            members = [*calls[-1], segment]
            area = max(s.queries for s in members) * max(s.keys for s in members) * len(members)
            wanted = needed + segment.queries * segment.keys
            if area <= MAX_PADDING * wanted and area <= MAX_SCORES:
                calls[-1] = members
                needed = wanted
                continue
        calls.append([segment])
        needed = segment.queries * segment.keys
    return calls


def _build_call(segments: Sequence[Segment]) -> AttentionCall:
    queries = max(s.queries for s in segments)
    keys = max(s.keys for s in segments)
    q_offsets, k_offsets = torch.arange(queries), torch.arange(keys)
    start = torch.tensor([[s.start] for s in segments])
    q_length = torch.tensor([[s.queries] for s in segments])
    prefix_start = torch.tensor([[s.prefix_start] for s in segments])
    prefix = torch.tensor([[s.prefix_end - s.prefix_start] for s in segments])
    in_query = q_offsets < q_length
    in_prefix = k_offsets < prefix
    in_keys = k_offsets < prefix + q_length
    q_index = torch.where(in_query, start + q_offsets, 0)
    k_index = torch.where(in_prefix, prefix_start + k_offsets, start + k_offsets - prefix)
    k_index = torch.where(in_keys, k_index, 0)
    if len(segments) == 1 and int(prefix) == 0:
        return AttentionCall(q_index, k_index, None)
    # key j is seen by query i when it lies in the prefix or is not after i; a padded query sees
    # what the causal rule gives it (never nothing, so no NaN), and its output is not read
    mask = k_offsets[None, None, :] <= (prefix + q_offsets)[:, :, None]
    mask = mask & (in_keys[:, None, :] | ~in_query[:, :, None])
    return AttentionCall(q_index, k_index, mask[:, None])


def build_layout(segments: Sequence[Segment], length: int) -> AttentionLayout:
    """The layout of a row of `length` tokens whose segments cover each position exactly once."""
    calls = []
    gather = torch.full((length,), -1)
    offset = 0
    for members in _share_calls(segments):
        call = _build_call(members)
        width = call.queries.shape[1]
        for number, segment in enumerate(members):
            first = offset + number * width
            gather[segment.start : segment.end] = torch.arange(first, first + segment.queries)
        offset += call.queries.numel()
        calls.append(call)
    assert int(gather.min()) >= 0, "the segments do not cover the row"
    return AttentionLayout(calls, gather)


def _heads(states: Tensor, index: Tensor, heads: int) -> Tensor:
    """[T, h, D] gathered at [B, L] -> [B, heads, L, D], key-value heads repeated."""
    taken = states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:])
    if taken.shape[2] != heads:
        taken = taken.repeat_interleave(heads // taken.shape[2], dim=2)
    return taken.transpose(1, 2)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, in transformers' calling convention.

    query: [1, H, T, D]; key, value: [1, h, T, D] with h dividing H. Returns [1, T, H, D].
    Raises `UserError` for sliding windows, which a shared prefix does not have.
    """
    if layout is None:
        raise UserError(f"attention {SHARED_PREFIX!r} needs a layout: call the model with packed=")
    if sliding_window is not None:
        raise UserError("a language model with sliding-window attention cannot share prefixes")
    heads = query.shape[1]
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = []
    for call in layout.calls:
        out = scaled_dot_product_attention(
            _heads(q, call.queries, heads),
            _heads(k, call.keys, heads),
            _heads(v, call.keys, heads),
            attn_mask=call.mask,
            dropout_p=dropout,
            is_causal=call.mask is None,
            scale=scaling,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, layout.gather)[None], None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
