"""Which positions of a packed row see which, and the indices that kernels want to be told it in.

A row is cut into segments. The queries of a segment see a prefix (a prompt) and, causally, the
segment itself; the prompt and its first completion are one causal segment without a prefix:

    row        P P P P C C R R R | P' P' C'
    segments   [0, 6) alone   [6, 9) after prefix [0, 4)   [9, 12) alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Segment:
    """Queries [start, end) that see [prefix_start, prefix_end) and themselves, causally."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int

    @property
    def prefix(self) -> int:
        """Number of positions of the prefix."""
        return self.prefix_end - self.prefix_start

    @property
    def queries(self) -> int:
        """Number of query positions."""
        return self.end - self.start

    @property
    def keys(self) -> int:
        """Number of key positions."""
        return self.prefix + self.queries

    @property
    def scores(self) -> int:
        """Number of (query, key) pairs that see each other."""
        return self.queries * self.prefix + self.queries * (self.queries + 1) // 2


class AttentionLayout:
    """How a row of `length` tokens is attended: its segments in the order of the row.

    No dataclass: torch takes those apart in every module that it wraps, and what a backend has
    prepared (once a micro-batch, not once a layer) would be lost.
    """

    def __init__(
        self, segments: Sequence[Segment], length: int, device: torch.device | str = "cpu"
    ):
        self.segments = sorted((s for s in segments if s.queries), key=lambda s: s.start)
        self.length = length
        self.device = torch.device(device)
        self._prepared: dict[Any, Any] = {}
        ends = [0, *(segment.end for segment in self.segments)]
        starts = [*(segment.start for segment in self.segments), length]
        assert ends == starts, "the segments do not cover each position once"

    @property
    def scores(self) -> int:
        """Number of (query, key) pairs of one head: what no backend can leave out."""
        return sum(segment.scores for segment in self.segments)

    def on(self, device: torch.device) -> AttentionLayout:
        """The same layout for tensors on `device`."""
        same = device == self.device
        return self if same else AttentionLayout(self.segments, self.length, device)

    def prepared(self, make: Callable[[AttentionLayout], Prepared]) -> Prepared:
        """What `make` makes of this layout, made once."""
        if make not in self._prepared:
            self._prepared[make] = make(self)
        return self._prepared[make]


def build_layout(segments: Sequence[Segment], length: int) -> AttentionLayout:
    """The layout of a row of `length` tokens whose segments cover each position exactly once."""
    return AttentionLayout(segments, length)


@dataclass(frozen=True)
class VarlenIndices:
    """What a variable-length kernel is told of S sequences of queries and keys.

    cu_seqlens_q, cu_seqlens_k: int32 [S+1], where each sequence starts, and the end. key_index:
    [K], the row's position of each key, or None where the keys are the row. spans: for each
    sequence its (query start, query end, key start, key end), the same on the host.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: Tensor | None
    spans: list[tuple[int, int, int, int]]


def _indices(
    queries: Sequence[int], keys: Sequence[int], key_index: Tensor | None, device: torch.device
) -> VarlenIndices:
    """From the sequences' lengths."""
    q_ends, k_ends = list(accumulate(queries, initial=0)), list(accumulate(keys, initial=0))
    return VarlenIndices(
        torch.tensor(q_ends, dtype=torch.int32, device=device),
        torch.tensor(k_ends, dtype=torch.int32, device=device),
        max(queries),
        max(keys),
        key_index,
        list(zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)),
    )


def _ranges(bounds: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """[start, end) of each pair, laid end to end."""
    return torch.cat([torch.arange(start, end) for start, end in bounds]).to(device)


def varlen_indices(layout: AttentionLayout) -> VarlenIndices:
    """Each segment as one sequence: its own queries, and its prefix's keys before its own.

        row P C R     queries  P C | R     keys  P C | P R

    With causal masking aligned at the bottom right (the last query sees the last key, as flash-attn
    documents it from 2.1 on) that is the layout's attention, in one call. A prompt's keys and
    values are copied once for every completion but the first.
    """
    key_index = None
    if any(segment.prefix for segment in layout.segments):
        bounds = [
            bound
            for s in layout.segments
            for bound in ((s.prefix_start, s.prefix_end), (s.start, s.end))
        ]
        key_index = _ranges(bounds, layout.device)
    queries = [segment.queries for segment in layout.segments]
    keys = [segment.keys for segment in layout.segments]
    return _indices(queries, keys, key_index, layout.device)


@dataclass(frozen=True)
class SplitIndices:
    """A layout as two attentions whose results are merged: to oneself, and to a prompt.

    own: causal, the row cut into prompts and completions, queries = keys. prefix: not causal, all
    completions of a prompt as one sequence of queries [Q, at `queries` in the row] over the
    prompt's keys (at its key_index); None where no prompt is shared.
    """

    own: VarlenIndices
    prefix: VarlenIndices | None
    queries: Tensor


def split_indices(layout: AttentionLayout) -> SplitIndices:
    """The two attentions; no key is copied more than once, whatever the number of completions."""
    branches: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for segment in layout.segments:
        if segment.prefix:
            prefix = (segment.prefix_start, segment.prefix_end)
            branches.setdefault(prefix, []).append((segment.start, segment.end))
    ends = dict(branches.keys())  # of the shared prompts, by their starts
    own: list[int] = []
    for segment in layout.segments:
        # a shared prompt and its first completion: cut between them, so that all completions are
        # one sequence of queries over the prompt
        cut = ends.get(segment.start)
        if cut is not None and segment.start < cut < segment.end and not segment.prefix:
            branches[(segment.start, cut)].insert(0, (cut, segment.end))
            own += [cut - segment.start, segment.end - cut]
        else:
            own.append(segment.queries)
    prefix_part, queries = None, torch.zeros(0, dtype=torch.long, device=layout.device)
    if branches:
        queries = _ranges([bound for group in branches.values() for bound in group], layout.device)
        prefix_part = _indices(
            [sum(end - start for start, end in group) for group in branches.values()],
            [end - start for start, end in branches],
            _ranges(list(branches), layout.device),
            layout.device,
        )
    return SplitIndices(_indices(own, own, None, layout.device), prefix_part, queries)


def visible(layout: AttentionLayout) -> Tensor:
    """int32 [3, T]: each query's prefix start, prefix end and first own key.

    Query i sees key j where start <= j < end, or own <= j <= i.
    """
    lengths = torch.tensor([segment.queries for segment in layout.segments])
    bounds = torch.tensor(
        [(s.prefix_start, s.prefix_end, s.start) for s in layout.segments], dtype=torch.int32
    )
    return bounds.repeat_interleave(lengths, dim=0).T.contiguous().to(layout.device)
