"""Options of the MPO stage."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import ClassVar

from internvl.errors import UserError
from mpo.loss_set import LOSSES, MPO_WEIGHTS, LossSet
from training.arguments import AugmentedArguments, Copies

_SMOOTHED = [name for name, loss in LOSSES.items() if loss.reads_label_smoothing]


@dataclass
class MPOConfig(AugmentedArguments):
    """Options of mixed preference optimisation; see AugmentedArguments for the common ones."""

    free_on_resume: ClassVar[frozenset[str]] = AugmentedArguments.free_on_resume | {
        "reference_cache_dir"
    }

    train_file: str = field(
        default="", metadata={"help": "Pairs: JSONL, MMPR meta.json, parquet, saved data set."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Held-out pairs."})
    learning_rate: float = field(
        default=1e-6,
        metadata={
            "help": "Of AdamW at its highest (published: 1e-6, for InternVL3.5 2e-7); for LoRA ten "
            "times as much."
        },
    )
    loss_type: list[str] = field(
        default_factory=lambda: [*MPO_WEIGHTS],
        metadata={
            "help": f"Losses, by TRL's names: {' '.join(LOSSES)} (orpo is ours: the odds ratio). "
            "orpo and sft alone need no reference."
        },
    )
    loss_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "A weight for each of loss_type; 0: measured only. By default MPO's 0.8 0.2 "
            "1.0 for sigmoid, bco_pair and sft together, and 1 each for others."
        },
    )
    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull to the reference; ipo's tau."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Share of pairs held to be flipped: sigmoid (cDPO) and robust read it."},
    )
    log_entropy: bool = field(
        default=False,
        metadata={"help": "Log the entropy at the completions' tokens (one more read of logits)."},
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Compute the reference's log-probabilities once, before the first step, and "
            "keep them on disk; false: at each step, under a frozen copy of what is trained."
        },
    )
    precompute_ref_batch_size: int = field(
        default=64,
        metadata={"help": "Pairs of the reference pass that are kept at once: a kill loses them."},
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where the reference's log-probabilities are kept, found again by their "
            "content; any number of runs may share it. By default reference in output_dir."
        },
    )

    def __post_init__(self) -> None:
        """Check MPO's own options."""
        if not self.train_file:
            raise UserError("train_file is missing: the JSONL (or meta.json) of preference pairs")
        self._check_losses()
        size = self.precompute_ref_batch_size
        if size < 1:
            raise UserError(f"precompute_ref_batch_size is {size}, at least 1")
        self._check_reference()
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference's log-probabilities."""
        return self.losses.needs_reference

    @property
    def copies_of_trained(self) -> Copies:
        """The reference that is asked at each step; see mpo/reference.py."""
        live = self.needs_reference and not self.precompute_ref_log_probs
        return Copies(device=int(live))

    @property
    def scores_entropy(self) -> bool:
        """Where it is to be logged."""
        return self.log_entropy

    @property
    def losses(self) -> LossSet:
        """What is minimised."""
        assert self.loss_weights is not None  # __post_init__ fills it in
        weights = dict(zip(self.loss_type, self.loss_weights, strict=True))
        return LossSet(weights, self.beta, self.label_smoothing)

    def _check_reference(self) -> None:
        """Refuse options of a reference, or of its pass, that is not asked for."""
        names = ["reference_cache_dir", "precompute_ref_batch_size"]
        reason = "precompute_ref_log_probs is false"
        if not self.needs_reference:
            names.append("precompute_ref_log_probs")
            reason = f"loss_type {self.loss_type} reads no reference"
        elif self.precompute_ref_log_probs:
            return
        for name in names:
            if getattr(self, name) != getattr(MPOConfig, name):
                raise UserError(f"{name} is {getattr(self, name)!r}, but {reason}")

    def _check_losses(self) -> None:
        """Check the losses and their numbers, and fill in the weights."""
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for name in self.loss_type:
            if name not in LOSSES:
                near = difflib.get_close_matches(name, LOSSES, n=1)
                known = f"did you mean {near[0]!r}?" if near else f"it is one of {[*LOSSES]}"
                raise UserError(f"loss_type has {name!r}; {known}")
        if len(set(self.loss_type)) < len(self.loss_type) or not self.loss_type:
            raise UserError(f"loss_type is {self.loss_type}; name at least one, and each once")
        if self.loss_weights is None:
            paper = set(self.loss_type) == set(MPO_WEIGHTS)
            self.loss_weights = [MPO_WEIGHTS[n] if paper else 1.0 for n in self.loss_type]
        if len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"loss_weights is {self.loss_weights}; give a number for each of loss_type "
                f"{self.loss_type}"
            )
        if not all(0 <= w < math.inf for w in self.loss_weights) or not any(self.loss_weights):
            raise UserError(f"loss_weights is {self.loss_weights}; give numbers >= 0, not all 0")
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta is {self.beta}; it must be positive")
        if not self.losses.needs_reference and self.beta != 0.1:
            raise UserError(
                f"beta is {self.beta}, which loss_type {self.loss_type} does not read (the weight "
                "of orpo is its number in loss_weights)"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it is from 0 to below 0.5")
        if self.label_smoothing and not set(_SMOOTHED) & set(self.loss_type):
            raise UserError(
                f"label_smoothing is {self.label_smoothing}, which only {_SMOOTHED} of loss_type "
                f"read, not {self.loss_type}"
            )
