"""Liger's kernels: what `use_liger_kernel` means for a packed model."""

from __future__ import annotations

from internvl.errors import UserError
from internvl.model import InternVLForConditionalGeneration
from training.arguments import PackedTrainingArguments


def use_liger(model: InternVLForConditionalGeneration, args: PackedTrainingArguments) -> None:
    """Let Liger score the tokens where `use_liger_kernel` asks for its kernels.

    transformers replaces the layers' norms, MLPs and rotary positions, and the forward that is not
    packed; the packed forward's head follows here, unless liger_kernel_config has
    fused_linear_cross_entropy: false. Raises `UserError` on a CPU, where the kernels do not run.
    """
    if not args.use_liger_kernel:
        return
    if args.device.type == "cpu":
        raise UserError("use_liger_kernel needs a GPU: its kernels are written for Triton")
    config = args.liger_kernel_config or {}
    model.liger_head = bool(config.get("fused_linear_cross_entropy", True))
