"""The losses that a run asks for, by TRL's names: their weighted sum over the pairs of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo.losses import (
    bco_loss,
    dpo_loss,
    generation_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    odds_ratio_loss,
    robust_dpo_loss,
)

LN2 = math.log(2.0)
# loss_type and loss_weights of the paper, arXiv 2411.10442
MPO_WEIGHTS = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


@dataclass(frozen=True)
class Pairs:
    """What the losses of P pairs are made of, [P] each.

    *_logps: sums over a response's tokens. ref_*: the same under the reference, None where there
    is none. *_lengths: numbers of tokens.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None

    @classmethod
    def alternating(cls, logps: Tensor, lengths: Tensor, ref_logps: Tensor | None) -> Pairs:
        """From [2P] values, chosen and rejected in turn."""
        refs = (None, None) if ref_logps is None else (ref_logps[::2], ref_logps[1::2])
        return cls(logps[::2], logps[1::2], lengths[::2], lengths[1::2], *refs)

    @property
    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability of a token, of chosen and of rejected."""
        return self.chosen_logps / self.chosen_lengths, self.rejected_logps / self.rejected_lengths

    @property
    def mean_log_ratios(self) -> tuple[Tensor, Tensor]:
        """Mean of log pi - log pi_0 over the tokens, of chosen and of rejected."""
        chosen, rejected = self.rewards(beta=1.0)
        return chosen / self.chosen_lengths, rejected / self.rejected_lengths

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """r of chosen and of rejected; raises ValueError where there is no reference."""
        if self.ref_chosen_logps is None or self.ref_rejected_logps is None:
            raise ValueError("rewards need a reference")
        return (
            implicit_rewards(self.chosen_logps, self.ref_chosen_logps, beta),
            implicit_rewards(self.rejected_logps, self.ref_rejected_logps, beta),
        )


@dataclass(frozen=True)
class Settings:
    """The numbers in the losses: beta, label_smoothing (sigmoid, robust) and delta (bco_pair)."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    delta: float = 0.0


@dataclass(frozen=True)
class PairLoss:
    """One loss of a set.

    value: pairs and settings to [P]. at_reference: what it is while policy = reference and delta
    = 0, None where that is no constant; words: the same as it is printed.
    """

    value: Callable[[Pairs, Settings], Tensor]
    words: str
    at_reference: Callable[[Settings], float] | None
    needs_reference: bool = True
    reads_label_smoothing: bool = False


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(
        lambda pairs, s: dpo_loss(*pairs.rewards(s.beta), s.label_smoothing),
        *("ln2", lambda s: LN2),
        reads_label_smoothing=True,
    ),
    "bco_pair": PairLoss(
        lambda pairs, s: bco_loss(*pairs.rewards(s.beta), s.delta),
        *("2 ln2", lambda s: 2 * LN2),
    ),
    "sft": PairLoss(
        lambda pairs, s: generation_loss(pairs.chosen_logps, pairs.chosen_lengths),
        *("nll", None),
        needs_reference=False,
    ),
    "robust": PairLoss(
        lambda pairs, s: robust_dpo_loss(*pairs.rewards(s.beta), s.label_smoothing),
        *("ln2", lambda s: LN2),
        reads_label_smoothing=True,
    ),
    "ipo": PairLoss(
        lambda pairs, s: ipo_loss(*pairs.mean_log_ratios, s.beta),
        *("1/(2 beta)^2", lambda s: (1 / (2 * s.beta)) ** 2),
    ),
    "hinge": PairLoss(
        lambda pairs, s: hinge_loss(*pairs.rewards(s.beta)),
        *("1", lambda s: 1.0),
    ),
    "orpo": PairLoss(
        lambda pairs, s: odds_ratio_loss(*pairs.mean_logps),
        *("odds ratio", None),
        needs_reference=False,
    ),
}


@dataclass(frozen=True)
class LossSet:
    """Losses by name with their weights; one of weight 0 is measured and not trained on.

    >>> losses = LossSet({"ipo": 1.0, "sft": 0.5})
    >>> losses.needs_reference, LossSet({"orpo": 0.1, "sft": 1.0}).needs_reference
    (True, False)
    >>> losses.first_loss({"ipo": 20.0, "sft": 2.0})  # the measured ipo is not looked at
    26.0
    >>> losses.first_loss_words
    '1 * 1/(2 beta)^2 + 0.5 * nll'
    """

    weights: Mapping[str, float]
    beta: float = 0.1
    label_smoothing: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether any of them compares with the reference."""
        return any(LOSSES[name].needs_reference for name in self.weights)

    @property
    def needs_delta(self) -> bool:
        """Whether BCO's reward shift is kept."""
        return "bco_pair" in self.weights

    def terms(self, pairs: Pairs, delta: float = 0.0) -> dict[str, Tensor]:
        """Each loss, [P]; delta: BCO's reward shift."""
        settings = Settings(self.beta, self.label_smoothing, delta)
        return {name: LOSSES[name].value(pairs, settings) for name in self.weights}

    def total(self, terms: Mapping[str, Tensor], num_pairs: float) -> Tensor:
        """The weighted sum of the terms, divided by the global number of pairs.

        That is the count of every term: all of them give one value a pair.
        """
        weighted = [weight * terms[name] for name, weight in self.weights.items()]
        return torch.stack(weighted).sum() / num_pairs

    def first_loss(self, measured: Mapping[str, float]) -> float | None:
        """The loss while policy = reference and delta = 0; None where no part of it is a constant.

        The paper's is 1.2 ln 2 + nll. measured: the terms' means; read are those that are no
        constant (sft, orpo).
        """
        known = {name: LOSSES[name].at_reference for name in self.weights}
        if not any(known.values()):
            return None
        settings = Settings(self.beta, self.label_smoothing)
        values = {name: at(settings) if at else measured[name] for name, at in known.items()}
        return sum(weight * values[name] for name, weight in self.weights.items())

    @property
    def measured(self) -> dict[str, str]:
        """Of those that are no constant while policy = reference: name to words."""
        known = {name: LOSSES[name] for name in self.weights}
        return {name: loss.words for name, loss in known.items() if not loss.at_reference}

    @property
    def first_loss_words(self) -> str:
        """`first_loss` as a sum in words."""
        return " + ".join(f"{w:g} * {LOSSES[name].words}" for name, w in self.weights.items())
