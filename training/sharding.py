"""What FSDP2 and DeepSpeed are told beyond what accelerate tells them, and what they cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from internvl.errors import UserError
from internvl.logprobs import ScoringHead


def keep_precision(accelerator: Accelerator) -> None:
    """Have FSDP2 compute in 16 bits as autocast does, and round nothing else.

    accelerate 1.15 has it round what a module is given (V2PE's positions), what it returns (the
    log-probabilities), and the sums of gradients over micro-batches and ranks, too.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=False,
        )


def refuse_split_head(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise `UserError` for sharded weights under a head that is called once a chunk of tokens.

    Each call gathers weights, and ranks with another number of chunks would wait for good.
    """
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    base: Any = model
    if accelerator.distributed_type in kinds and not isinstance(base.lm_head, ScoringHead):
        raise UserError("an adapter on lm_head is not supported under FSDP and DeepSpeed")
