"""What users may hand to transformers' Trainer and nothing here would act on: said, not ignored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from transformers import Trainer, TrainingArguments

from internvl.errors import UserError

_UNREAD = ("compute_loss_func", "compute_metrics", "data_collator", "preprocess_logits_for_metrics")


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """What transformers and PEFT say of options that do not go together is the user's to mend."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def refuse_unread(names: Iterable[str]) -> None:
    """Raise `UserError` for a keyword argument of Trainer that a packed stage does itself."""
    for name in names:
        if name in _UNREAD:
            raise UserError(f"{name} would not be read: a stage's encode, count and loss do that")


def refuse_other_backend(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise `UserError` where accelerate passed over FSDP or DeepSpeed, as it does on a CPU.

    And where FSDP was told to save shards: transformers would then save no weights at the end.
    """
    kind = accelerator.distributed_type
    for name, asked in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if (asked or parse_flag_from_env(f"ACCELERATE_USE_{name}")) and kind.value != name:
            raise UserError(f"{name} was asked for, but accelerate runs {kind.value} here")
    if kind == DistributedType.FSDP:
        saved = str(accelerator.state.fsdp_plugin.state_dict_type)
        if "FULL_STATE_DICT" not in saved:
            raise UserError(f"FSDP's state_dict_type is {saved}; it must be FULL_STATE_DICT")


def warn_of_rounding(trainer: Trainer) -> None:
    """Say so when what is trained is held in 16 bits.

    bfloat16 has 8 bits of mantissa: an update of less than 1/512 of a weight is rounded away, and
    at MPO's learning rate of 2e-7 that is every update.
    """
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    if kinds & {torch.bfloat16, torch.float16} and trainer.is_world_process_zero():
        print(
            "WARNING: the weights that are trained are held in 16 bits, where small updates are "
            "rounded away; use dtype: float32 with bf16: true, or LoRA"
        )


def refuse_sharded(trainer: Trainer, what: str) -> None:
    """Raise `UserError` for what nobody has seen work, or knows not to, with sharded weights."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(f"{what} is not supported under FSDP and DeepSpeed yet")
