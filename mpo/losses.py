"""MPO's three losses, as pure functions (Wang et al. 2024, arXiv 2411.10442, section 3.2).

    L = w_p L_p + w_q L_q + w_g L_g                                                   (eq. 3)

    paper            here                    shape, meaning
    log pi(y|x)      chosen_logps, rejected_logps        [P] sums over response tokens
    log pi_0(y|x)    ref_chosen_logps, ref_rejected_logps [P] the same under the reference
    beta             beta                    strength of the pull to the reference
    r(y)             implicit_rewards        beta (log pi - log pi_0)
    delta            delta                   BCO's reward shift, a constant of the step

Every function returns one value a pair; `mpo_loss` divides by the global number of pairs, so that
no packing, micro-batching or number of processes changes the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r(y) = beta (log pi(y|x) - log pi_0(y|x)); [P] each."""
    return beta * (logps - ref_logps)


def dpo_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """L_p = -log sigma(r(y_c) - r(y_r)), the relative preference (eq. 4); [P] -> [P].

    Policy = reference gives log 2:

    >>> round(float(dpo_loss(torch.zeros(1), torch.zeros(1))), 6)
    0.693147
    """
    return -logsigmoid(chosen_rewards - rejected_rewards)


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, delta: float) -> Tensor:
    """L_q = -log sigma(r(y_c) - delta) - log sigma(-(r(y_r) - delta)), eq. 5-7; [P] -> [P].

    The absolute quality of each response: the chosen one above the shift delta, the rejected one
    below it. delta is the mean reward of all steps before (see `RewardShift`).

    >>> r_c, r_r = torch.tensor([1.0]), torch.tensor([0.0])
    >>> round(float(bco_loss(r_c, r_r, 0.5)), 6)  # 2 log(1 + exp(-1/2))
    0.948154
    """
    return -logsigmoid(chosen_rewards - delta) - logsigmoid(-(rejected_rewards - delta))


def generation_loss(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """L_g = -log pi(y_c|x) / |y_c|, eq. 8: per sequence, not per batch token; [P] -> [P].

    >>> float(generation_loss(torch.tensor([-6.0]), torch.tensor([3])))
    2.0
    """
    return -chosen_logps / chosen_lengths


@dataclass(frozen=True)
class LossWeights:
    """(w_p, w_q, w_g); the paper's are (0.8, 0.2, 1.0)."""

    preference: float = 0.8
    quality: float = 0.2
    generation: float = 1.0

    def first_loss(self, nll: float) -> float:
        """The loss while policy = reference and delta = 0: w_p ln 2 + w_q 2 ln 2 + w_g nll.

        With the paper's weights that is 1.2 ln 2 + nll.
        """
        ln2 = math.log(2.0)
        return self.preference * ln2 + self.quality * 2 * ln2 + self.generation * nll


@dataclass
class PairTerms:
    """The parts of the loss, each [P], and the rewards behind them, detached, [P]."""

    preference: Tensor
    quality: Tensor
    generation: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def pair_terms(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float,
    delta: float,
) -> PairTerms:
    """All three losses of a set of pairs; every argument [P]."""
    chosen = implicit_rewards(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_rewards(rejected_logps, ref_rejected_logps, beta)
    return PairTerms(
        preference=dpo_loss(chosen, rejected),
        quality=bco_loss(chosen, rejected, delta),
        generation=generation_loss(chosen_logps, chosen_lengths),
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
    )


def mpo_loss(terms: PairTerms, weights: LossWeights, num_pairs: float) -> Tensor:
    """w_p L_p + w_q L_q + w_g L_g, each summed here and divided by the global number of pairs."""
    weighted = (
        weights.preference * terms.preference
        + weights.quality * terms.quality
        + weights.generation * terms.generation
    )
    return weighted.sum() / num_pairs


@dataclass
class RewardShift:
    """BCO's delta: the mean of all rewards, chosen and rejected alike, of the steps before.

    delta_t = (sum of rewards of steps < t) / (their number), delta_0 = 0. It is constant through
    a step, so that no packing can change it, and is updated once after it from the sums over all
    ranks. (TRL 1.16 has no delta; older ones let the current micro-batch into it.)

    >>> shift = RewardShift()
    >>> shift.delta
    0.0
    >>> shift.update(total=1.0 - 0.5, count=2)  # one pair: r(y_c) = 1, r(y_r) = -0.5
    >>> shift.delta
    0.25
    """

    total: float = 0.0
    count: float = 0.0

    @property
    def delta(self) -> float:
        """The shift that the current step uses."""
        return self.total / self.count if self.count else 0.0

    def update(self, total: float, count: float) -> None:
        """Take a finished step in: the sum of its rewards over all ranks, and their number."""
        self.total += total
        self.count += count
