"""GSPO's loss, as pure functions (Zheng et al. 2025, arXiv 2507.18071).

s_i = (pi(y_i|x) / pi_old(y_i|x))^(1/|y_i|)                                       (eq. 7)
L   = -1/n sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)           (eq. 5)

paper               here                   shape, meaning
log pi, log pi_old  logprobs, old_logprobs [N] per token of all completions
|y_i|               lengths                [C] tokens, the end-of-turn token counted if sampled
A_i                 advantages             [C]
n                   num_sequences          all completions of the global batch, those of groups
                                           without spread included (they add zeros)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sequence_ratios(
    logprobs: Tensor, old_logprobs: Tensor, completion_of_token: Tensor, lengths: Tensor
) -> Tensor:
    """s_i, the length-normalised likelihood ratio; [N], [N], [N], [C] -> [C].

    >>> new, old = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0])
    >>> ratios = sequence_ratios(new, old, torch.tensor([0, 0]), torch.tensor([2]))
    >>> round(float(ratios), 6)  # exp((0 + 2) / 2)
    2.718282
    """
    difference = logprobs - old_logprobs
    sums = difference.new_zeros(len(lengths)).index_add(0, completion_of_token, difference)
    return (sums / lengths.clamp_min(1)).exp()


@dataclass
class GSPOTerms:
    """What the loss is made of.

    loss: [C], -min(...) of each completion. clipped_low, clipped_high: bool [C], where the clip
    took the gradient away.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def gspo_terms(
    ratios: Tensor, advantages: Tensor, *, epsilon_low: float, epsilon_high: float
) -> GSPOTerms:
    """The clipped objective of each completion; [C], [C] -> [C].

    >>> terms = gspo_terms(
    ...     torch.tensor([1.1]), torch.tensor([1.0]), epsilon_low=3e-4, epsilon_high=4e-4)
    >>> round(float(terms.loss), 6), bool(terms.clipped_high)  # -(1 + 4e-4)
    (-1.0004, True)
    """
    clipped = ratios.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    objective = torch.minimum(ratios * advantages, clipped * advantages)
    return GSPOTerms(
        loss=-objective,
        clipped_low=(ratios < 1.0 - epsilon_low) & (advantages < 0),
        clipped_high=(ratios > 1.0 + epsilon_high) & (advantages > 0),
    )


def gspo_loss(terms: GSPOTerms, num_sequences: float) -> Tensor:
    """The mean over all sequences of the global batch; [C] -> scalar."""
    return terms.loss.sum() / num_sequences
