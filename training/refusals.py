"""What users may hand to transformers' Trainer and nothing here would act on: said, not ignored."""

from __future__ import annotations

from collections.abc import Iterable

from accelerate import DistributedType
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from internvl.errors import UserError

_UNREAD = ("compute_loss_func", "compute_metrics", "data_collator", "preprocess_logits_for_metrics")


def refuse_unread(names: Iterable[str]) -> None:
    """Raise `UserError` for a keyword argument of Trainer that a packed stage does itself."""
    for name in names:
        if name in _UNREAD:
            raise UserError(f"{name} would not be read: a stage's encode, count and loss do that")


def refuse_other_backend(args: TrainingArguments, kind: DistributedType) -> None:
    """Raise `UserError` where accelerate passed over FSDP or DeepSpeed, as it does on a CPU.

    kind: what accelerate runs.
    """
    for name, asked in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if (asked or parse_flag_from_env(f"ACCELERATE_USE_{name}")) and kind.value != name:
            raise UserError(f"{name} was asked for, but accelerate runs {kind.value} here")
