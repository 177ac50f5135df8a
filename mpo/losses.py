"""Losses of preference pairs, as pure functions: MPO's three and their relatives.

    L = w_p L_p + w_q L_q + w_g L_g        MPO: DPO + BCO + SFT, arXiv 2411.10442, eq. 3

    paper            here                     shape, meaning
    log pi(y|x)      chosen_logps, ...        [P] sums over response tokens
    log pi_0(y|x)    ref_chosen_logps, ...    [P] the same under the reference
    |y|              chosen_lengths, ...      [P] response tokens, the end of turn among them
    beta             beta                     strength of the pull to the reference
    r(y)             implicit_rewards         [P] beta (log pi - log pi_0)
    delta            delta                    BCO's reward shift, a constant of the step

Each function gives one value a pair. mpo/loss_set.py weighs those that a run asks for (`loss_type`
and `loss_weights`, by TRL's names) and divides by the global number of pairs, so that no packing,
micro-batching or number of processes changes the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r(y) = beta (log pi(y|x) - log pi_0(y|x)); [P] each."""
    return beta * (logps - ref_logps)


# ---- MPO's own three ----


def dpo_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """L_p = -log sigma(r(y_c) - r(y_r)), the relative preference (MPO's eq. 4); [P] -> [P].

    label_smoothing e makes it cDPO (Mitchell 2023, "A note on DPO with noisy preferences"): (1 - e)
    times this loss + e times that of the pair the other way round. (TRL 1.16 reads no smoothing
    in `sigmoid`.)

    >>> round(float(dpo_loss(torch.zeros(1), torch.zeros(1))), 6)  # policy = reference: log 2
    0.693147
    """
    margins = chosen_rewards - rejected_rewards
    loss = -logsigmoid(margins)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margins)


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, delta: float) -> Tensor:
    """L_q = -log sigma(r(y_c) - delta) - log sigma(-(r(y_r) - delta)), MPO's eq. 5-7; [P] -> [P].

    The absolute quality of each response: the chosen one above the shift delta, the rejected one
    below it. delta is the mean reward of all steps before (see `RewardShift`).

    >>> r_c, r_r = torch.tensor([1.0]), torch.tensor([0.0])
    >>> round(float(bco_loss(r_c, r_r, 0.5)), 6)  # 2 log(1 + exp(-1/2))
    0.948154
    """
    return -logsigmoid(chosen_rewards - delta) - logsigmoid(-(rejected_rewards - delta))


def generation_loss(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """L_g = -log pi(y_c|x) / |y_c|, MPO's eq. 8: per sequence, not per batch token; [P] -> [P].

    >>> float(generation_loss(torch.tensor([-6.0]), torch.tensor([3])))
    2.0
    """
    return -chosen_logps / chosen_lengths


# ---- other losses of a preference ----


def robust_dpo_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, label_smoothing: float
) -> Tensor:
    """DPO without the bias of labels flipped with probability e < 1/2; [P] -> [P].

    ((1 - e) L_p(y_c, y_r) - e L_p(y_r, y_c)) / (1 - 2 e): arXiv 2403.00409, eq. 12.

    >>> r_c, r_r = torch.tensor([1.0]), torch.tensor([0.0])
    >>> round(float(robust_dpo_loss(r_c, r_r, 0.1)), 6)  # (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8
    0.188262
    """
    margins = chosen_rewards - rejected_rewards
    kept, flipped = -logsigmoid(margins), -logsigmoid(-margins)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float) -> Tensor:
    """(h(y_c) - h(y_r) - 1 / (2 beta))^2, beta the paper's tau: arXiv 2310.12036, eq. 17; [P].

    *_log_ratios: h, the mean over the response's tokens of log pi - log pi_0. The paper writes no
    length; the mean is TRL's, by word of its authors, and what they report was computed with it.

    >>> float(ipo_loss(torch.tensor([2.0]), torch.tensor([0.0]), 0.1))  # (2 - 5)^2
    9.0
    """
    return (chosen_log_ratios - rejected_log_ratios - 1 / (2 * beta)).square()


def hinge_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """max(0, 1 - (r(y_c) - r(y_r))): SLiC's hinge (arXiv 2305.10425, eq. 1) on rewards; [P].

    >>> hinge_loss(torch.tensor([0.25, 3.0]), torch.zeros(2)).tolist()
    [0.75, 0.0]
    """
    return torch.relu(1 - (chosen_rewards - rejected_rewards))


def odds_ratio_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """-log sigma(log odds(y_c) - log odds(y_r)): ORPO's L_OR, arXiv 2403.07691, eq. 7; [P] -> [P].

    odds(y) = p / (1 - p), log p the mean log-probability of the response's tokens. It needs no
    reference; ORPO itself is this (weight lambda) + SFT.

    >>> round(float(odds_ratio_loss(torch.tensor([0.5]).log(), torch.tensor([0.2]).log())), 6)
    0.223144
    """
    return -logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def log_odds(mean_logps: Tensor) -> Tensor:
    """log p - log(1 - p) of log p <= 0, finite also where p rounds to 1; [P] -> [P]."""
    below_one = mean_logps.clamp_max(-torch.finfo(mean_logps.dtype).eps)
    return below_one - (-torch.expm1(below_one)).log()


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
