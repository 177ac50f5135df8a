"""Rewards to advantages: what a completion's reward is over its group's.

    A_i = (R_i - baseline_i) / divisor

baseline: the group's mean (GRPO, arXiv 2402.03300; GSPO, arXiv 2507.18071, eq. 6), or the mean of
the others, leave-one-out (RLOO, arXiv 2402.14740). divisor: the group's standard deviation, that of
the whole rollout batch (arXiv 2508.08221), or 1 (Dr. GRPO, arXiv 2503.20783); unbiased, + 1e-4. The
names of the options are TRL's (scale_rewards) and ms-swift's (advantage_estimator).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPSILON = 1e-4  # as in TRL: keeps a group with hardly any spread from blowing up
ESTIMATORS = ("grpo", "rloo")
SCALES = ("group", "batch", "none")


def standard_deviation(rewards: Sequence[float | None]) -> float:
    """The unbiased standard deviation of the rewards that there are; 0 of fewer than two.

    Exact sums: the order of the rewards, and so the number of ranks, changes nothing.
    """
    judged = [reward for reward in rewards if reward is not None]
    if len(judged) < 2:
        return 0.0
    mean = math.fsum(judged) / len(judged)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in judged) / (len(judged) - 1))


def group_advantages(
    rewards: Sequence[float | None],
    *,
    scale: str = "group",
    estimator: str = "grpo",
    batch_std: float | None = None,
) -> list[float]:
    """The advantages of a group's completions; see the module.

    A reward of None (the answer could not be judged) takes no part in mean and std and gets
    advantage 0. batch_std: for scale "batch", `standard_deviation` of all ranks' rewards.

    >>> group_advantages([1.0, 0.0, None], scale="none")
    [0.5, -0.5, 0.0]
    >>> group_advantages([1.0, 0.0, 0.0], scale="none", estimator="rloo")
    [1.0, -0.5, -0.5]
    """
    judged = [reward for reward in rewards if reward is not None]
    # compared and not left to the difference: 0.1 three times has a mean that rounds away from 0.1
    if not judged or min(judged) == max(judged):
        return [0.0] * len(rewards)
    total, n = math.fsum(judged), len(judged)
    divisor = 1.0
    if scale == "group":
        divisor = standard_deviation(judged) + STD_EPSILON
    elif scale == "batch":
        assert batch_std is not None
        divisor = batch_std + STD_EPSILON

    def over(reward: float) -> float:
        baseline = (total - reward) / (n - 1) if estimator == "rloo" else total / n
        return (reward - baseline) / divisor

    return [0.0 if reward is None else over(reward) for reward in rewards]


def has_spread(advantages: Sequence[float]) -> bool:
    """Whether a group carries any gradient."""
    return any(advantages)
