"""Options of the SFT stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl.errors import UserError
from sft.losses import EXPONENTS
from sft.presets import apply_stage, asked_parts, check_vision_options
from sft.stream_options import StreamArguments, check_stream_options
from training.arguments import AugmentedArguments

_CONSTANT = ("linear", "constant", "constant_with_warmup")  # the first is transformers' default


@dataclass
class SFTConfig(StreamArguments, AugmentedArguments):
    """Options of supervised fine-tuning; see PackedTrainingArguments for the common ones."""

    train_file: str = field(
        default="", metadata={"help": "Conversations: JSONL, meta.json, parquet, saved data set."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out conversations, for eval_steps."}
    )
    learning_rate: float = field(
        default=2e-5, metadata={"help": "Of AdamW at its highest; for LoRA ten times as much."}
    )
    check_rows: str = field(
        default="before",
        metadata={
            "help": "'before': every image is decoded and every length counted before the first "
            "step. 'when_used', for data too large for that: training begins at once, and a bad "
            "row is put aside in quarantine.used.jsonl when its turn comes (it leaves the batch "
            "smaller); max_bad then goes by the rows seen so far."
        },
    )
    loss_average: str = field(
        default="square",
        metadata={"help": "Weight of a token: 'token', 'sample' or 'square' (InternVL 2.5)."},
    )
    stop_gold_probability: float | None = field(
        default=None,
        metadata={
            "help": "Stop by what was learned, not by a number of steps: once the mean probability "
            "of the held-out gold completions reaches this, cool down and end. The learning rate "
            "is constant until then (after warmup_steps); max_steps is the cap."
        },
    )
    cooldown_steps: int = field(
        default=40, metadata={"help": "Steps of linear decay to 0 after stop_gold_probability."}
    )

    # what is trained of which model (sft/presets.py)
    stage: str | None = field(
        default=None,
        metadata={
            "help": "A published stage, which says what is trained: 'mlp_warmup' (the projector), "
            "'vit_incremental' (ViT and projector) or 'full'. By default all that is not frozen."
        },
    )
    vit_drop_path: float = field(
        default=0.0,
        metadata={
            "help": "Stochastic depth of the vision tower: chance that its last block is left out "
            "of a tile's way in training, rising from 0 at its first block."
        },
    )
    vision_from: str | None = field(
        default=None,
        metadata={
            "help": "Progressive scaling: an InternVL whose vision tower and projector go under "
            "the language model of model_name_or_path (which may then be a bare one), as `internvl "
            "compose` does, into output_dir/composed."
        },
    )

    def __post_init__(self) -> None:
        """Check the options that belong together."""
        apply_stage(self)
        check_vision_options(self)
        if not self.train_file:
            raise UserError("train_file is missing: the JSONL (or meta.json) of conversations")
        if self.check_rows not in ("before", "when_used"):
            raise UserError(f"check_rows is {self.check_rows!r}; it is 'before' or 'when_used'")
        check_stream_options(self)
        if self.loss_average not in EXPONENTS:
            raise UserError(f"loss_average {self.loss_average!r} is not one of {list(EXPONENTS)}")
        if self.stop_gold_probability is not None:
            if self.eval_file is None or self.eval_strategy == "no":
                raise UserError("stop_gold_probability needs eval_file and eval_strategy: steps")
            if self.lr_scheduler_type not in _CONSTANT or self.lr_scheduler_kwargs:
                raise UserError(
                    "stop_gold_probability brings its own learning rate schedule (warm-up, "
                    "constant, cool-down); leave lr_scheduler_type and its kwargs out"
                )
            if self.eval_on_start:
                raise UserError(
                    "eval_on_start looks again at every restart, so stop_gold_probability could "
                    "be reached at another step than without it"
                )
            if self.cooldown_steps < 1:
                raise UserError(f"cooldown_steps is {self.cooldown_steps}; it must be at least 1")
            if self.max_steps < 1:
                raise UserError("stop_gold_probability needs max_steps, the cap")
            if not 0 < self.stop_gold_probability < 1:
                raise UserError("stop_gold_probability is a probability, between 0 and 1")
        super().__post_init__()

    def tiles_of_a_step(self, tokens_of_a_tile: int) -> float:
        """Tiles of one step of this device, about: half of a pack's tokens are visual."""
        if not self.packing:
            return super().tiles_of_a_step(tokens_of_a_tile)
        half = self.max_tokens_per_microbatch / (2 * tokens_of_a_tile)
        return self.per_device_train_batch_size * min(half, self.max_tiles_per_microbatch or half)

    @property
    def asked_parts(self) -> tuple[str, ...]:
        """The parts that `stage` names: each must be trained."""
        return asked_parts(self.stage)
