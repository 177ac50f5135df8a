"""What a run's mathematics depends on: the same when it goes on, or it is another run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from training.arguments import PackedTrainingArguments

# of transformers' options; of ours, all but `free_on_resume`
_SAME_RUN = (
    "per_device_train_batch_size", "world_size", "seed", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "max_grad_norm",
    "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "data_seed",
)  # fmt: skip


def run_settings(
    args: PackedTrainingArguments, model: nn.Module, mixed_precision: str
) -> dict[str, Any]:
    """The settings, JSON-able, of a run.

    mixed_precision: accelerate's own word, since `accelerate launch` can set it, too.
    """
    base = {field.name for field in fields(TrainingArguments)}
    free = frozenset().union(*(vars(c).get("free_on_resume", ()) for c in type(args).__mro__))
    own = [f.name for f in fields(args) if f.name not in base | free]
    values = {name: getattr(args, name) for name in (*_SAME_RUN, *own)}
    values["mixed_precision"] = mixed_precision
    if isinstance(model, PeftModel):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        values["base.dtype"] = ", ".join(sorted({str(p.dtype) for p in frozen}))
        values["base.in_4_bits"] = any(type(p).__name__ == "Params4bit" for p in frozen)
        for adapter, config in model.peft_config.items():
            for key, value in config.to_dict().items():
                # a set is printed in another order by each process
                shown = sorted(value) if isinstance(value, set) else value
                values[f"peft.{adapter}.{key}"] = shown
    return {name: v if isinstance(v, int | float | None) else str(v) for name, v in values.items()}
