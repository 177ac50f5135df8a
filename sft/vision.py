"""`vision_from`: the start of progressive scaling (internvl/grafting.py), on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl.errors import UserError
from internvl.grafting import Graft, check_graft, graft_vision
from internvl.model import InternVLForConditionalGeneration
from sft.config import SFTConfig
from training.cli import ModelArguments


def check_vision_from(args: SFTConfig, model_args: ModelArguments) -> Graft | None:
    """What is to be put under the language model, or None; no weight is read.

    Raises `UserError` for a donor that does not fit, a new projector that nothing would train, and
    an adapter, whose base would be no folder.
    """
    if args.vision_from is None:
        return None
    if model_args.use_peft:
        raise UserError(
            "vision_from makes another model, which use_peft has no folder of to put an adapter "
            "on: train it whole first (stage: mlp_warmup needs little memory), then that folder "
            "by adapter"
        )
    graft = check_graft(Path(model_args.model_name_or_path), Path(args.vision_from))
    if not graft.fits and args.freeze_projector:
        raise UserError(
            f"the projector of {args.vision_from} does not fit and is made anew, but "
            "freeze_projector is set: nothing would train it"
        )
    return graft


def take_vision(model: Any, graft: Graft | None, args: SFTConfig) -> None:
    """Put the donor's parts into the model, and say what came from where."""
    if graft is None:
        return
    assert isinstance(model, InternVLForConditionalGeneration)  # an adapter was refused
    graft_vision(model, graft, seed=args.seed)
    if args.process_index == 0:
        print(graft.described(args.seed))
