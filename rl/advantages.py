"""Rewards of a group to advantages (GSPO, arXiv 2507.18071, eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPSILON = 1e-4  # as in TRL: keeps a group with hardly any spread from blowing up


def group_advantages(rewards: Sequence[float | None], *, scale: bool = True) -> list[float]:
    """A_i = (R_i - mean) / (std + 1e-4), the standard deviation unbiased.

    A reward of None (the answer could not be judged) takes no part in mean and std and gets
    advantage 0. scale=False leaves the division out (Dr. GRPO).

    >>> group_advantages([1.0, 0.0, None], scale=False)
    [0.5, -0.5, 0.0]
    """
    judged = [reward for reward in rewards if reward is not None]
    # compared and not left to the difference: 0.1 three times has a mean that rounds away from 0.1
    if not judged or min(judged) == max(judged):
        return [0.0] * len(rewards)
    mean = math.fsum(judged) / len(judged)
    variance = math.fsum((reward - mean) ** 2 for reward in judged) / (len(judged) - 1)
    divisor = math.sqrt(variance) + STD_EPSILON if scale else 1.0
    return [0.0 if reward is None else (reward - mean) / divisor for reward in rewards]


def has_spread(advantages: Sequence[float]) -> bool:
    """Whether a group carries any gradient."""
    return any(advantages)
