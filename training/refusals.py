"""What users may hand to transformers' Trainer and nothing here would act on: said, not ignored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from transformers import Trainer, TrainingArguments

from internvl.errors import UserError

_GATHER = "stage3_gather_16bit_weights_on_model_save"
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


def refuse_lone_ranks(args: TrainingArguments) -> None:
    """Raise `UserError` where transformers takes one of several processes for the only one.

    As it does on a CPU under torchrun without use_cpu: all would write into one output_dir.
    """
    number = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and number != str(args.world_size):
        raise UserError(
            f"{number} processes were started (WORLD_SIZE), but transformers sees "
            f"{args.world_size}: on a CPU add --use_cpu true"
        )


def refuse_other_backend(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise `UserError` where accelerate passed over FSDP or DeepSpeed, as it does on a CPU.

    And for settings of theirs with which the result would be wrong, or not be saved.
    """
    kind = accelerator.distributed_type
    for name, asked in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if (asked or parse_flag_from_env(f"ACCELERATE_USE_{name}")) and kind.value != name:
            raise UserError(f"{name} was asked for, but accelerate runs {kind.value} here")
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin)


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_version is {plugin.fsdp_version}; it must be 2")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UserError(  # transformers would save no weights at the end
            f"FSDP's state_dict_type is {plugin.state_dict_type}; it must be FULL_STATE_DICT"
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading must be false: only the first rank would have weights "
            "when the reference is scored and checksums are taken"
        )


def _check_deepspeed(plugin: Any) -> None:
    if plugin.zero_stage == 3:
        if not plugin.deepspeed_config["zero_optimization"].get(_GATHER):
            raise UserError(
                f"ZeRO-3 would save no weights: set zero3_save_16bit_model ({_GATHER}) to true"
            )
        if plugin.zero3_init_flag:
            raise UserError(
                "zero3_init_flag must be false: every rank loads whole weights, which are checked "
                "and scored before DeepSpeed cuts them up"
            )


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
