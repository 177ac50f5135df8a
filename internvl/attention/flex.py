"""Backend `flex`: FlexAttention with a block mask made from the segments.

Compiled on CUDA (not run here); on a CPU torch has its forward alone, which is what is tested.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from internvl.attention.layout import AttentionLayout, visible

BLOCK = 128


def block_mask(layout: AttentionLayout) -> BlockMask:
    """The layout's mask in blocks of 128 x 128: empty, full, or looked at position by position.

    Counted from the segments' bounds, T x T/128 numbers; create_block_mask would take T x T.
    """
    first, last, own = visible(layout)

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= first[q]) & (k < last[q])) | ((k >= own[q]) & (k <= q))

    length, device = layout.length, layout.device
    blocks = -(-length // BLOCK)
    start = torch.arange(blocks, device=device) * BLOCK
    query = torch.arange(length, device=device)

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        """How many of each block's keys lie in [low, high): [T, blocks]."""
        low, high = low[:, None].clamp(min=start), high[:, None].clamp(max=start + BLOCK)
        return (high - low).clamp(min=0)

    seen = overlap(first, last) + overlap(own, query + 1)
    seen = torch.nn.functional.pad(seen, (0, 0, 0, blocks * BLOCK - length))
    seen = seen.view(blocks, BLOCK, blocks).sum(1)
    full = seen == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((seen > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of blocks: how many are chosen [1, 1, B], and which, first [1, 1, B, B]."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@cache
def _kernel(device: str) -> Any:
    return flex_attention if device == "cpu" else torch.compile(flex_attention)


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None, dropout: float
) -> Tensor:
    """q: [T, H, D]; k, v: [T, h, D]. Returns [T, H, D]."""
    assert dropout == 0.0
    out = _kernel(q.device.type)(
        *(states.transpose(0, 1)[None] for states in (q, k, v)),
        block_mask=layout.prepared(block_mask),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
