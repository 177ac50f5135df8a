"""The policy's losses, as pure functions: GSPO, GSPO-token, GRPO, DAPO and their kin.

One function of two choices. The ratio's level (`importance_sampling_level`):

    sequence        s_i = (pi(y_i|x) / pi_old(y_i|x))^(1/|y_i|)       GSPO, arXiv 2507.18071, eq. 7
    sequence_token  sg[s_i] pi(y_it) / sg[pi(y_it)]                   GSPO-token, same paper, 4.3
    token           w_it = pi(y_it) / pi_old(y_it)                    GRPO, arXiv 2402.03300, eq. 3

and how -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) is summed up (`loss_type`):

    grpo     1/n sum_i 1/|y_i| sum_t          also GSPO's eq. 5, where all tokens of y_i are alike
    bnpo     1/(tokens of the optimizer step) sum_i sum_t
    dapo     the same, by the tokens of the rollout batch over its steps (arXiv 2503.14476, eq. 8)
    dr_grpo  1/(n max_completion_length) sum_i sum_t                  Dr. GRPO, arXiv 2503.20783
    luspo    1/n sum_i sum_t                                          LUSPO, arXiv 2602.05261

The names and the formulas are TRL 1.16's (GRPOConfig, GRPOTrainer._compute_loss), but every count
is the sum over all ranks and micro-batches, so that no packing and no world size changes anything.

paper               here                   shape, meaning
log pi, log pi_old  logprobs, old_logprobs [N] per token of all completions
|y_i|               lengths                [C] tokens, the end-of-turn token counted if sampled
A_i                 advantages             [C]
n                   counts.sequences       all completions of the global batch, those of groups
                                           without spread and the masked ones included (as zeros)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = ("sequence", "sequence_token", "token")
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Objective:
    """Which loss it is; see the module and RLConfig."""

    importance_sampling_level: str = "sequence"
    loss_type: str = "grpo"
    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    max_completion_length: int = 1024

    @property
    def every_group_counts(self) -> bool:
        """Whether a group without spread carries a gradient, too: of the KL term or the entropy."""
        return self.beta != 0.0 or self.entropy_coef != 0.0


@dataclass(frozen=True)
class Counts:
    """Totals over all ranks: completions and unmasked tokens of the optimizer step.

    rollout_tokens: unmasked tokens of the rollout batch, divided by its optimizer steps.
    """

    sequences: float
    tokens: float
    rollout_tokens: float


@dataclass
class PolicyTokens:
    """A micro-batch's completions.

    logprobs, old_logprobs: [N]; completion_of_token: [N]; lengths, advantages: [C]. ref_logprobs,
    entropy: [N] where the objective asks for them. token_weights: [N], or completion_weights: [C],
    from `correction_weights`.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    completion_of_token: Tensor
    lengths: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    token_weights: Tensor | None = None
    completion_weights: Tensor | None = None


@dataclass
class PolicyLoss:
    """The loss, a scalar, and what is logged of it.

    clipped_low, clipped_high: bool, where the clip took the gradient away; [C] at sequence level,
    otherwise [N]. kl: [N], with its bias correction, or None.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor | None


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


def importance_ratios(tokens: PolicyTokens, level: str) -> Tensor:
    """The ratios at a level: [C] at "sequence", otherwise [N]."""
    if level == "token":
        return (tokens.logprobs - tokens.old_logprobs).exp()
    of = tokens.completion_of_token
    ratios = sequence_ratios(tokens.logprobs, tokens.old_logprobs, of, tokens.lengths)
    if level == "sequence":
        return ratios
    # its value is s_i for every token, its gradient that of the token's own probability
    return ratios.detach()[of] * (tokens.logprobs - tokens.logprobs.detach()).exp()


def clipped_objective(
    ratios: Tensor, advantages: Tensor, *, epsilon_low: float, epsilon_high: float
) -> Tensor:
    """-min(r A, clip(r) A), element by element.

    >>> loss = clipped_objective(
    ...     torch.tensor([1.1]), torch.tensor([1.0]), epsilon_low=3e-4, epsilon_high=4e-4)
    >>> round(float(loss), 6)  # -(1 + 4e-4)
    -1.0004
    """
    clipped = ratios.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3, an unbiased estimate of KL(pi || pi_ref) that is never negative; [N], [N] -> [N].

    Schulman, "Approximating KL divergence" (2020); GRPO's eq. 4: pi_ref/pi - log(pi_ref/pi) - 1.

    >>> float(kl_to_reference(torch.tensor([-1.0]), torch.tensor([-1.0])))
    0.0
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1.0


def correction_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    completion_of_token: Tensor,
    lengths: Tensor,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """rho = pi_old / pi_sampler, bounded: what the sampler's probabilities were off by.

    mode: "token_..." (a weight for each token, [N]) or "sequence_..." (their product, [C]);
    "..._truncate" clamps to the bounds (truncated importance sampling), "..._mask" takes those
    outside them out. As TRL 1.16's vllm_importance_sampling_mode.

    >>> old, drawn = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0])
    >>> of, lengths = torch.tensor([0, 0]), torch.tensor([2])
    >>> for mode in ("token_truncate", "token_mask", "sequence_mask"):
    ...     correction_weights(
    ...         old, drawn, of, lengths, mode=mode, clip_min=None, clip_max=3.0).tolist()
    [1.0, 3.0]
    [1.0, 0.0]
    [0.0]
    """
    difference = old_logprobs - sampler_logprobs
    if mode.startswith("sequence"):
        sums = difference.new_zeros(len(lengths))
        difference = sums.index_add(0, completion_of_token, difference)
    weights = difference.exp()
    if mode.endswith("truncate"):
        # clamp refuses to be given neither
        return weights.clamp(
            min=float("-inf") if clip_min is None else clip_min,
            max=float("inf") if clip_max is None else clip_max,
        )
    outside = torch.zeros_like(weights, dtype=torch.bool)
    if clip_min is not None:
        outside |= weights < clip_min
    if clip_max is not None:
        outside |= weights > clip_max
    return weights.masked_fill(outside, 0.0)


def policy_loss(tokens: PolicyTokens, objective: Objective, counts: Counts) -> PolicyLoss:
    """This micro-batch's part of the global loss."""
    level = objective.importance_sampling_level
    of, by_completion = tokens.completion_of_token, level == "sequence"
    low, high = objective.epsilon_low, objective.epsilon_high
    ratios = importance_ratios(tokens, level)
    advantages = tokens.advantages if by_completion else tokens.advantages[of]
    values = clipped_objective(ratios, advantages, epsilon_low=low, epsilon_high=high)
    if tokens.completion_weights is not None:
        weights = tokens.completion_weights
        values = values * (weights if by_completion else weights[of])
    elif tokens.token_weights is not None:
        values = (values[of] if by_completion else values) * tokens.token_weights
        by_completion = False
    kl = None
    if objective.beta != 0.0:
        assert tokens.ref_logprobs is not None
        kl = kl_to_reference(tokens.logprobs, tokens.ref_logprobs)
        if objective.use_bias_correction_kl:  # DeepSeek-V3.2, arXiv 2512.02556
            kl = kl * (ratios[of] if level == "sequence" else ratios)
        values = (values[of] if by_completion else values) + objective.beta * kl
        by_completion = False
    loss = _aggregate(values, by_completion, tokens, objective, counts)
    if objective.entropy_coef != 0.0:
        assert tokens.entropy is not None
        # a mean over the step's tokens, however the loss itself is summed up
        loss = loss - objective.entropy_coef * tokens.entropy.sum() / max(counts.tokens, 1.0)
    return PolicyLoss(
        loss=loss,
        clipped_low=(ratios < 1.0 - low) & (advantages < 0),
        clipped_high=(ratios > 1.0 + high) & (advantages > 0),
        kl=kl,
    )


def _aggregate(
    values: Tensor, by_completion: bool, tokens: PolicyTokens, objective: Objective, counts: Counts
) -> Tensor:
    """Sum up values that stand for a completion's every token ([C]) or for one token ([N])."""
    lengths, of, kind = tokens.lengths, tokens.completion_of_token, objective.loss_type
    if kind == "grpo":
        # a completion without an unmasked token has no share
        share = values * (lengths > 0) if by_completion else values / lengths[of]
        return share.sum() / counts.sequences
    total = (values * lengths).sum() if by_completion else values.sum()
    divisor = {
        "bnpo": max(counts.tokens, 1.0),
        "dapo": max(counts.rollout_tokens, 1.0),
        "dr_grpo": counts.sequences * objective.max_completion_length,
        "luspo": counts.sequences,
    }[kind]
    return total / divisor
