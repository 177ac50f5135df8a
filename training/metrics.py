"""Means, deviations and maxima that are exact over micro-batches, ranks and logging steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass
class Metrics:
    """Sums with their counts, and maxima; merged exactly in any order.

    sums: {name: [sum, count]}; the metric is sum / count. maxima: {name: value}. moments: {name:
    [sum, sum of squares, count]}; the metric is the unbiased standard deviation.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor) -> None:
        """Add values whose mean is wanted; [..], also empty."""
        total = values.detach().cpu().double().sum()  # MPS has no double
        self._add(name, torch.stack([total, total.new_tensor(float(values.numel()))]))

    def ratio(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum and the count that it is to be divided by."""
        self._add(name, torch.tensor([float(total), float(count)], dtype=torch.float64))

    def deviation(self, name: str, values: Tensor) -> None:
        """Add values whose standard deviation is wanted; [..], also empty."""
        doubles = values.detach().cpu().double()
        parts = [doubles.sum(), doubles.square().sum(), doubles.new_tensor(float(values.numel()))]
        moments = torch.stack(parts)
        self.moments[name] = self.moments[name] + moments if name in self.moments else moments

    def maximum(self, name: str, values: Tensor) -> None:
        """Add values whose maximum is wanted; an empty tensor still brings the name."""
        start = torch.tensor(float("-inf"), dtype=torch.float64)
        value = values.detach().cpu().double().amax() if values.numel() else start
        self.maxima[name] = torch.maximum(self.maxima.get(name, start), value)

    def _add(self, name: str, pair: Tensor) -> None:
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def merge(self, other: Metrics) -> None:
        """Add another's to these."""
        for name, pair in other.sums.items():
            self._add(name, pair)
        for name, moments in other.moments.items():
            self.moments[name] = self.moments.get(name, torch.zeros_like(moments)) + moments
        for name, value in other.maxima.items():
            self.maximum(name, value[None])

    def reduce(self, device: torch.device) -> None:
        """Sum over the ranks, in place; all ranks must hold the same names."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # float64 is not everywhere (MPS); gloo and NCCL both take it
        for sums in (self.sums, self.moments):
            if sums:
                table = torch.stack([sums[name] for name in sorted(sums)]).to(device)
                dist.all_reduce(table)
                sums.update(zip(sorted(sums), table.cpu(), strict=True))
        if self.maxima:
            row = torch.stack([self.maxima[name] for name in sorted(self.maxima)]).to(device)
            dist.all_reduce(row, op=dist.ReduceOp.MAX)
            self.maxima = dict(zip(sorted(self.maxima), row.cpu(), strict=True))

    def values(self) -> dict[str, float]:
        """The metrics as numbers; a mean over nothing is left out, and a deviation of one value."""
        means = {name: float(s / n) for name, (s, n) in self.sums.items() if n}
        for name, (total, squares, n) in self.moments.items():
            if n > 1:
                variance = (squares - total.square() / n) / (n - 1)
                means[name] = float(variance.clamp_min(0.0).sqrt())
        return means | {name: float(v) for name, v in self.maxima.items() if not v.isneginf()}


def sum_over_ranks(counts: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum counts over the ranks; all ranks must hold the same names."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(counts)
    names = sorted(counts)
    table = torch.tensor([counts[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(table)
    return dict(zip(names, table.tolist(), strict=True))
