"""Where each token stands: variable visual position encoding (V2PE, arXiv 2412.09616, eq. 4).

    p_i = p_{i-1} + 1      for a text token
    p_i = p_{i-1} + delta  for a visual token, delta in {1, 1/2, 1/4, ..., 1/256}, one an image

    <|im_start|> user \\n <img> V V V V </img> What      delta = 1/4
    0            1    2  3     3.25 ... 4 5      6

A long context's images then span fewer positions than the language model was trained on. In
training delta is drawn for each image (InternVL3, arXiv 2504.10479, section 2.1), at inference it
is fixed: a checkpoint's config.json says it as "position_step" (absent: 1). With delta = 1
positions are whole numbers, as without any of this.

The published code also rounds the position after an image up. With its 256 tokens a tile every
image moves it on by a whole number, so that there it changes nothing. Its config says delta x 256
as "rope_pos_id_stride". A multiple of 1/256 is exact in float32 up to position 65,536.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from internvl.errors import UserError

POSITION_STEPS = tuple(2.0**-k for k in range(9))  # 1 ... 1/256


def token_positions(
    length: int, visual: Mapping[int, float], previous: float = -1
) -> Sequence[float]:
    """Positions of `length` tokens that come after position `previous`.

    visual: the step of each visual token by its place; steps of 1 may be left out. Whole numbers
    where all steps are 1.

    >>> list(token_positions(6, {2: 0.25, 3: 0.25}))
    [0, 1, 1.25, 1.5, 2.5, 3.5]
    """
    moved = {place: step for place, step in visual.items() if step != 1}
    if not moved and isinstance(previous, int):
        return range(previous + 1, previous + 1 + length)
    steps = [moved.get(place, 1) for place in range(length)]
    return list(accumulate(steps, initial=previous))[1:]


def draw_steps(steps: Sequence[float], images: int, *, key: str, seed: int) -> list[float]:
    """A step for each image of a sample: the one there is, or drawn by sample (key) and seed.

    The same in every epoch, process and run, so that policy and reference see one input.
    """
    if len(steps) == 1:
        return [steps[0]] * images
    digests = [hashlib.sha256(f"{seed}/{i}/{key}".encode()).digest() for i in range(images)]
    return [steps[int.from_bytes(digest[:8], "big") % len(steps)] for digest in digests]


def check_step(step: object, name: str) -> float:
    """`step` as a number, or `UserError` where it is none of POSITION_STEPS."""
    if not isinstance(step, int | float) or step not in POSITION_STEPS:
        raise UserError(
            f"{name} is {step!r}; a position step is one of 1, 0.5, 0.25, ... 0.00390625 (1/256)"
        )
    return float(step)


def checkpoint_step(config: Mapping[str, Any]) -> float:
    """The position step that a checkpoint's config.json (as a dict) is to be used with."""
    return check_step(config.get("position_step", 1.0), "position_step in config.json")
