"""Options that every training stage has, on top of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from internvl.attention import Case, check_backend
from internvl.augmentation import check_qualities
from internvl.errors import UserError
from internvl.positions import check_step

# options of transformers that the packed step, loader, evaluation or checkpoint does not act on
_NOT_HONOURED: dict[str, Any] = {
    "accelerator_config": None,
    "auto_find_batch_size": False,
    "average_tokens_across_devices": True,  # the loss is always normalised over all ranks
    "batch_eval_metrics": False,
    "bf16_full_eval": False,
    "dataloader_drop_last": False,
    "dataloader_in_order": True,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "do_predict": False,
    "enable_jit_checkpoint": False,  # its checkpoint would pass for the run's last one
    "eval_accumulation_steps": None,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "fp16_full_eval": False,
    "include_for_metrics": [],
    "label_names": None,
    "label_smoothing_factor": 0.0,
    "length_column_name": "length",
    "load_best_model_at_end": False,
    "neftune_noise_alpha": None,
    "parallelism_config": None,
    "save_on_each_node": False,  # every rank must see the same checkpoints
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "torch_empty_cache_steps": None,
    "train_sampling_strategy": "random",  # one shuffled order for all ranks
    "use_cache": False,
}
# they step in backward, or must be told of training and evaluation: neither fits a packed step
_OTHER_STEPS = ("lomo", "layerwise", "schedule_free")
_AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens_per_microbatch"),
    *("max_tiles_per_microbatch", "max_tiles", "max_length"),
)


class Copies(NamedTuple):
    """How often a stage holds what is trained once more: on the device, and on the host."""

    device: int = 0
    host: int = 0


@dataclass
class PackedTrainingArguments(TrainingArguments):
    """TrainingArguments of a packed stage.

    `per_device_train_batch_size` counts the examples (conversations, pairs, groups) of one
    optimizer step on this device: that is the mathematics. `max_tokens_per_microbatch` and
    `max_tiles_per_microbatch` say how many of them run at once: that is the memory. There is no
    third knob, so `gradient_accumulation_steps` other than 1 is refused.
    """

    # options that may change between a kill and a restart; a stage names its own beside these
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"resume", "quarantine_file", "max_bad"}
        # how a row is computed, but for its rounding not what
        | {"max_tokens_per_microbatch", "max_tiles_per_microbatch", "attention_backend"}
    )

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
    position_steps: list[float] | None = field(
        default=None,
        metadata={
            "help": "V2PE: how far a visual token moves the position on, 1, 0.5, ... 0.00390625 "
            "(1/256); of several, one is drawn for each image, by the sample's text and the seed. "
            "By default the checkpoint's own position_step (1 where it names none)."
        },
    )
    inference_position_step: float | None = field(
        default=None,
        metadata={
            "help": "V2PE: the position_step that the saved checkpoint is to be used with; needed "
            "where position_steps has several."
        },
    )
    freeze_llm: bool = field(default=False, metadata={"help": "Do not train the LLM."})
    freeze_vit: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    freeze_projector: bool = field(
        default=False, metadata={"help": "Do not train the projector between the two."}
    )
    vit_learning_rate: float | None = field(
        default=None, metadata={"help": "The vision tower's; by default learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "The projector's; by default learning_rate."}
    )
    vit_layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Each layer of the vision tower learns at this times the rate of the next one "
            "(0 < decay <= 1), its last at this times vit_learning_rate."
        },
    )
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "How a packed row's attention is computed: segments, split, varlen, flash or "
            "flex (docs/attention.md); auto takes the fastest that is there, by measuring."
        },
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
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "False: each backward reaches every parameter, also without an image."},
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
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self._check_position_steps()
        self._check_parts()
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns cannot be true: examples are not columns")
        if self.resume not in ("auto", "never"):
            raise UserError(f"resume is {self.resume!r}; it is 'auto' or 'never'")
        for name, default in _NOT_HONOURED.items():
            if getattr(self, name) != default:
                raise UserError(f"{name} is {getattr(self, name)!r}, which is not supported here")
        # off has two spellings: "no", and the false that the command line makes of it
        if self.include_num_input_tokens_seen not in ("no", False):
            raise UserError("include_num_input_tokens_seen is set, which is not supported here")
        if self.dataloader_multiprocessing_context not in (None, "fork"):
            raise UserError(
                f"dataloader_multiprocessing_context is {self.dataloader_multiprocessing_context!r}"
                "; workers are forked: they hold the trainer, which cannot be pickled"
            )
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("use_liger_kernel needs the package liger-kernel (the extra 'liger')")
        if self.ignore_data_skip != type(self).ignore_data_skip:
            raise UserError(
                f"ignore_data_skip is {self.ignore_data_skip}: a resumed run would not end with "
                "the weights of the uninterrupted one"
            )
        super().__post_init__()
        check_backend(self.attention_backend, Case(self.device.type))
        if any(word in self.optim.value for word in _OTHER_STEPS):
            raise UserError(f"optim is {self.optim.value!r}, which does not fit a packed step")
        one = self.save_total_limit == 1 and self.save_strategy != "best"
        if one and self.metric_for_best_model is not None:
            raise UserError(
                "save_total_limit is 1 beside a metric_for_best_model (reduce_lr_on_plateau sets "
                "it to the loss); give at least 2: the best checkpoint and the newest"
            )
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

    # what the estimate of memory needs to know of a stage

    @property
    def copies_of_trained(self) -> Copies:
        """A reference's copies of what is trained."""
        return Copies()

    def tiles_of_a_step(self, tokens_of_a_tile: int) -> float:
        """Tiles of one step of this device, about: an example has half of max_tiles."""
        return self.per_device_train_batch_size * self.max_tiles / 2

    @property
    def asked_parts(self) -> tuple[str, ...]:
        """Parts, as options call them, of which an adapter, too, must train something."""
        return ()

    @property
    def scores_entropy(self) -> bool:
        """Whether a training step asks for the entropy of the scored tokens."""
        return False

    def _check_parts(self) -> None:
        """Refuse what trains nothing, and rates for what is frozen."""
        if self.freeze_llm and self.freeze_vit and self.freeze_projector:
            raise UserError("freeze_llm, freeze_vit and freeze_projector leave nothing to train")
        for name in ("vit_learning_rate", "projector_learning_rate", "vit_layer_decay"):
            value, frozen = getattr(self, name), f"freeze_{name.split('_')[0]}"
            if value is not None and getattr(self, frozen):
                raise UserError(f"{name} is given, but {frozen} is set, too")
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; it must be positive")
        if self.vit_layer_decay is not None and self.vit_layer_decay > 1:
            raise UserError(f"vit_layer_decay is {self.vit_layer_decay}; it is at most 1")

    def _check_position_steps(self) -> None:
        """Refuse steps that are none, and a checkpoint that would not say which one it takes."""
        steps, after = self.position_steps, self.inference_position_step
        for step in steps or []:
            check_step(step, "position_steps")
        if steps is not None and not steps:
            raise UserError("position_steps is empty; leave it out, or give at least one step")
        if after is None:
            if steps is not None and len(steps) > 1:
                raise UserError(
                    f"position_steps is {steps}: say with inference_position_step which one the "
                    "saved checkpoint is to be used with"
                )
            return
        check_step(after, "inference_position_step")
        if steps is None or after not in steps:
            raise UserError(
                f"inference_position_step is {after:g}, which is not among position_steps "
                f"({steps}): nothing would be trained for it"
            )


@dataclass
class AugmentedArguments(PackedTrainingArguments):
    """Options of a stage that trains on given texts, so that their images may be augmented."""

    jpeg_quality: list[int] | None = field(
        default=None,
        metadata={
            "help": "Random JPEG compression of training images (not of a video's frames), as "
            "lowest and highest quality: 75 100. By default only of data sets whose entry in "
            "meta.json says data_augment: true, at 75 to 100; one that says false keeps out."
        },
    )

    def __post_init__(self) -> None:
        """Check the qualities."""
        if self.jpeg_quality is not None:
            check_qualities(self.jpeg_quality)
        super().__post_init__()
