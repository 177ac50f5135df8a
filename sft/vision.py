"""`vision_from`: the start of progressive scaling (internvl/conversion/compose.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internvl.conversion.compose import Composition, check_composition, compose_once
from internvl.errors import UserError
from sft.config import SFTConfig
from training.cli import ModelArguments
from training.refusals import refuse_lone_ranks

FOLDER = "composed"


def check_vision_from(args: SFTConfig, model_args: ModelArguments) -> Composition | None:
    """What is to be composed, or None; no weight is read.

    Raises `UserError` for two folders that do not go together, a new projector that nothing would
    train, and an adapter, which would no longer be its base's.
    """
    if args.vision_from is None:
        return None
    if model_args.goes_on:
        raise UserError(
            f"{model_args.model_name_or_path} is an adapter; vision_from needs a whole model: make "
            f"one: internvl merge {model_args.model_name_or_path} OUT"
        )
    composition = check_composition(model_args.model_name_or_path, args.vision_from, seed=args.seed)
    trained = not args.freeze_projector
    if model_args.use_peft:
        trained = "multi_modal_projector" in (model_args.lora_modules_to_save or [])
    if not composition.fits and not trained:
        cause = (
            "lora_modules_to_save does not name multi_modal_projector"
            if model_args.use_peft
            else "freeze_projector is set"
        )
        raise UserError(
            f"the projector of {args.vision_from} does not fit and is made anew, but {cause}: "
            "nothing would train it"
        )
    return composition


def composed_start(
    composition: Composition | None, args: SFTConfig, model_args: ModelArguments
) -> ModelArguments:
    """The model's arguments with the composed folder as the one to start from.

    The first process makes it, once: a run that goes on finds it. Raises `UserError` where
    another process does not see it.
    """
    if composition is None:
        return model_args
    refuse_lone_ranks(args)
    folder = Path(args.output_dir or "") / FOLDER
    first = args.process_index == 0
    with args.main_process_first(local=False, desc="composing"):
        if first:
            compose_once(composition, folder, progress=not args.disable_tqdm)
            print(composition.described())
        elif not folder.is_dir():
            raise UserError(f"{folder}: process 0 made none, or lies on a disk of its own")
    return replace(model_args, model_name_or_path=str(folder))
