"""Options of the MPO stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from internvl.errors import UserError
from mpo.losses import LossWeights
from training.arguments import PackedTrainingArguments


@dataclass
class MPOConfig(PackedTrainingArguments):
    """Options of mixed preference optimisation; see PackedTrainingArguments for the common ones."""

    free_on_resume: ClassVar[frozenset[str]] = PackedTrainingArguments.free_on_resume | {
        "reference_cache_dir"
    }

    train_file: str = field(
        default="", metadata={"help": "Pairs: JSONL, MMPR meta.json, parquet, saved data set."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Held-out pairs."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull to the reference."})
    loss_weights: list[float] = field(
        default_factory=lambda: [0.8, 0.2, 1.0],
        metadata={"help": "Weights of DPO, BCO and SFT: w_p w_q w_g (0 0 1: the control)."},
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
        if self.beta <= 0:
            raise UserError(f"beta is {self.beta}; it must be positive")
        size = self.precompute_ref_batch_size
        if size < 1:
            raise UserError(f"precompute_ref_batch_size is {size}, at least 1")
        if self.reference_cache_dir is not None and not self.precompute_ref_log_probs:
            raise UserError("reference_cache_dir is given, but precompute_ref_log_probs is false")
        if len(self.loss_weights) != 3 or min(self.loss_weights) < 0 or not any(self.loss_weights):
            raise UserError(
                f"loss_weights is {self.loss_weights}; give three numbers >= 0, not all 0: "
                "w_p w_q w_g"
            )
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference's log-probabilities."""
        return True

    @property
    def weights(self) -> LossWeights:
        """loss_weights by name."""
        return LossWeights(*self.loss_weights)
