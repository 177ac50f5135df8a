"""Stochastic depth of the vision tower (arXiv 1603.09382), as InternViT is trained: drop path.

    x + drop(attention(x)), x + drop(mlp(x))     drop: 0 with chance p, else times 1 / (1 - p)

p rises linearly from 0 at the first block to the rate at the last one, and each branch of a block
drops for itself, tile by tile. What is drawn depends on the sample (its text and the seed), the
tile's number, the step, the block and the branch, and on nothing else: packing, micro-batches,
ranks and a restart change nothing. Two copies of a sample in one step are dropped alike.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from internvl.model import InternVLForConditionalGeneration

_TOP = 1 << 53  # draws have as many bits as a float64 has


def _logical_shift(values: Tensor, bits: int) -> Tensor:
    """Shift int64 right with zeros, as if it had no sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(number: int) -> int:
    """A number of any size as int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _scrambled(values: Tensor) -> Tensor:
    """int64 to int64 without a pattern (splitmix64's finisher; products wrap around)."""
    values = (values ^ _logical_shift(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _logical_shift(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _logical_shift(values, 31)


def uniform(keys: Tensor, *numbers: int) -> Tensor:
    """A number in [0, 1) for each key (int64) and these numbers: float64, the same everywhere."""
    mixed = _scrambled(keys)
    for number in numbers:
        mixed = _scrambled(mixed + _wrapped((number + 1) * 0x1E3779B97F4A7C15))
    return _logical_shift(mixed, 11).double() / _TOP


def block_rates(rate: float, blocks: int) -> list[float]:
    """The chance of each block: from 0 to `rate`.

    >>> block_rates(0.2, 3)
    [0.0, 0.1, 0.2]
    """
    return [rate * block / max(1, blocks - 1) for block in range(blocks)]


class DropPath:
    """Drop path on a model's vision tower, from now on and in training mode only.

    The factors of a forward are set by `draw` before it; they stay until the next one, so that
    gradient checkpointing computes the blocks again with the same ones.
    """

    def __init__(self, model: InternVLForConditionalGeneration, rate: float):
        layers: Any = model.model.vision_tower.encoder.layer
        self._rates = block_rates(rate, len(layers))
        self._factors: dict[tuple[int, int], Tensor] = {}
        for block, layer in enumerate(layers):
            # a block scales what its branches return channel by channel: the order is the same
            for branch, module in enumerate((layer.attention, layer.mlp)):
                if self._rates[block]:
                    module.register_forward_hook(partial(self._drop, (block, branch)))

    def draw(self, keys: Tensor, step: int) -> None:
        """Draw for the tiles of the next forward, by their keys: int64 [X]."""
        for block, rate in enumerate(self._rates):
            for branch in range(2) if rate else ():
                kept = uniform(keys, step, block, branch) >= rate
                self._factors[block, branch] = kept / (1.0 - rate)

    def _drop(self, place: tuple[int, int], module: Any, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        factors = self._factors[place].to(hidden.dtype)
        dropped = hidden * factors[:, None, None]
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped
