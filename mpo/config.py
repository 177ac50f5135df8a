"""Options of the MPO stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl.errors import UserError
from mpo.losses import LossWeights
from training.arguments import PackedTrainingArguments


@dataclass
class MPOConfig(PackedTrainingArguments):
    """Options of mixed preference optimisation; see PackedTrainingArguments for the common ones."""

    train_file: str = field(
        default="", metadata={"help": "Pairs: JSONL, MMPR meta.json, parquet, saved data set."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Held-out pairs."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull to the reference."})
    loss_weights: list[float] = field(
        default_factory=lambda: [0.8, 0.2, 1.0],
        metadata={"help": "Weights of DPO, BCO and SFT: w_p w_q w_g (0 0 1: the control)."},
    )
    reference_batch_size: int = field(
        default=64, metadata={"help": "Pairs encoded at once in the reference pass."}
    )

    def __post_init__(self) -> None:
        """Check MPO's own options."""
        if not self.train_file:
            raise UserError("train_file is missing: the JSONL (or meta.json) of preference pairs")
        if self.beta <= 0:
            raise UserError(f"beta is {self.beta}; it must be positive")
        if self.reference_batch_size < 1:
            raise UserError(f"reference_batch_size is {self.reference_batch_size}, at least 1")
        if len(self.loss_weights) != 3 or min(self.loss_weights) < 0 or not any(self.loss_weights):
            raise UserError(
                f"loss_weights is {self.loss_weights}; give three numbers >= 0, not all 0: "
                "w_p w_q w_g"
            )
        super().__post_init__()

    @property
    def weights(self) -> LossWeights:
        """loss_weights by name."""
        return LossWeights(*self.loss_weights)
