"""Options that every training stage has, on top of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from internvl.errors import UserError

# options of transformers that the packed step, loader or evaluation does not act on
_NOT_HONOURED: dict[str, Any] = {
    "auto_find_batch_size": False,
    "batch_eval_metrics": False,
    "bf16_full_eval": False,
    "dataloader_drop_last": False,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "eval_accumulation_steps": None,
    "eval_use_gather_object": False,
    "fp16_full_eval": False,
    "include_for_metrics": [],
    "label_smoothing_factor": 0.0,
    "load_best_model_at_end": False,
    "torch_empty_cache_steps": None,
}


@dataclass
class PackedTrainingArguments(TrainingArguments):
    """TrainingArguments of a packed stage.

    `per_device_train_batch_size` counts the examples (conversations, pairs, groups) of one
    optimizer step on this device: that is the mathematics. `max_tokens_per_microbatch` and
    `max_tiles_per_microbatch` say how many of them run at once: that is the memory. There is no
    third knob, so `gradient_accumulation_steps` other than 1 is refused.
    """

    max_tokens_per_microbatch: int = field(
        default=16384,
        metadata={"help": "Tokens in one forward; examples are packed up to it, never cut."},
    )
    max_tiles_per_microbatch: int | None = field(
        default=None, metadata={"help": "Image tiles in one forward; by default unlimited."}
    )
    max_tiles: int = field(
        default=12, metadata={"help": "Tile budget of one prompt (shared by its images)."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of one example (prompt and its longest completion); a longer one goes "
            "to the quarantine. By default the model's own limit."
        },
    )
    freeze_vision: bool = field(
        default=False, metadata={"help": "Train neither the vision tower nor the projector."}
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Where relative image paths start; by default the data file's folder, or the "
            "root that meta.json names."
        },
    )
    quarantine_file: str | None = field(
        default=None,
        metadata={"help": "Where bad rows go; by default quarantine.jsonl in output_dir."},
    )
    max_bad: float = field(
        default=0.05,
        metadata={"help": "Share (< 1) or number (>= 1) of bad rows at which the run stops."},
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "'auto': go on from the newest complete checkpoint in output_dir, if any; "
            "'never': start anew, and refuse a folder that holds checkpoints."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Always false: examples are packed here."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False, so that a NaN loss is seen."}
    )
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    save_only_model: bool = field(
        default=False, metadata={"help": "True keeps checkpoints that cannot be resumed."}
    )

    def __post_init__(self) -> None:
        """Check what cannot be honoured before anything is loaded."""
        if self.gradient_accumulation_steps != 1:
            raise UserError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; leave it at "
                "1. per_device_train_batch_size is the number of examples of an optimizer step, "
                "and max_tokens_per_microbatch what runs at once."
            )
        for name in ("max_tokens_per_microbatch", "max_tiles", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns cannot be true: examples are not columns")
        if self.resume not in ("auto", "never"):
            raise UserError(f"resume is {self.resume!r}; it is 'auto' or 'never'")
        for name, default in _NOT_HONOURED.items():
            if getattr(self, name) != default:
                raise UserError(f"{name} is {getattr(self, name)!r}, which is not supported here")
        if self.group_by_length_asked():
            raise UserError("train_sampling_strategy is ours (one shuffled order for all ranks)")
        super().__post_init__()
        if self.resume_from_checkpoint is not None:
            raise UserError(
                "use resume: auto (the default), which goes on from the newest complete "
                "checkpoint of output_dir; resume_from_checkpoint is not read"
            )
        available = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in available:
                raise UserError(
                    f"report_to names {name!r}, which is not installed; there is: "
                    f"{', '.join(available) or 'none'}"
                )

    def group_by_length_asked(self) -> bool:
        """Whether another sampling order than the shuffled one was asked for."""
        return self.train_sampling_strategy != "random"
