"""Backend `segments`: scaled_dot_product_attention on segments of like length. Runs anywhere.

Segments of like length are computed together by one call (padding exists inside that call only,
and is never read back), so no mask over the whole row is ever built: a dense one costs T^2. It is
the reference that the other backends are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvl.attention.layout import AttentionLayout, Segment

MAX_PADDING = 1.5  # a call may compute at most this many times the scores that are needed
MAX_SCORES = 2**24  # scores of one head in one call, a bound on its mask


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
class SegmentCalls:
    """The calls of a row of T tokens, and where each position's output lies.

    gather: [T], the index of a position's output in the calls' outputs laid end to end.
    """

    calls: list[AttentionCall]
    gather: Tensor


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
    prefix = torch.tensor([[s.prefix] for s in segments])
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


def segment_calls(layout: AttentionLayout) -> SegmentCalls:
    """The layout as calls, with indices and masks on its device."""
    calls = []
    gather = torch.full((layout.length,), -1)
    offset = 0
    for members in _share_calls(layout.segments):
        call = _build_call(members)
        width = call.queries.shape[1]
        for number, segment in enumerate(members):
            first = offset + number * width
            gather[segment.start : segment.end] = torch.arange(first, first + segment.queries)
        offset += call.queries.numel()
        mask = None if call.mask is None else call.mask.to(layout.device)
        calls.append(
            AttentionCall(call.queries.to(layout.device), call.keys.to(layout.device), mask)
        )
    return SegmentCalls(calls, gather.to(layout.device))


def _heads(states: Tensor, index: Tensor, heads: int) -> Tensor:
    """[T, h, D] gathered at [B, L] -> [B, heads, L, D], key-value heads repeated."""
    taken = states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:])
    if taken.shape[2] != heads:
        taken = taken.repeat_interleave(heads // taken.shape[2], dim=2)
    return taken.transpose(1, 2)


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None, dropout: float
) -> Tensor:
    """q: [T, H, D]; k, v: [T, h, D]. Returns [T, H, D]."""
    heads = q.shape[1]
    prepared = layout.prepared(segment_calls)
    outputs = []
    for call in prepared.calls:
        out = scaled_dot_product_attention(
            _heads(q, call.queries, heads),
            _heads(k, call.keys, heads),
            _heads(v, call.keys, heads),
            attn_mask=call.mask,
            dropout_p=dropout,
            is_causal=call.mask is None,
            scale=scale,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, prepared.gather)
