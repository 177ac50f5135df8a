"""The published stages of supervised fine-tuning, and what goes with them.

    mlp_warmup        the projector alone: a new one learns the language model's space
    vit_incremental   vision tower and projector, the language model frozen
    full              everything

as InternVL 2.5 trains them (arXiv 2412.05271, "Single Model Training Pipeline": stages 1, 1.5 and
2); its numbers stand in docs/training.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvl.errors import UserError

if TYPE_CHECKING:
    from sft.config import SFTConfig

# stage -> the parts that it trains, as options call them
STAGES: dict[str, tuple[str, ...]] = {
    "mlp_warmup": ("projector",),
    "vit_incremental": ("vit", "projector"),
    "full": ("vit", "projector", "llm"),
}


def asked_parts(stage: str | None) -> tuple[str, ...]:
    """The parts that a stage trains; none are named where there is no stage.

    >>> asked_parts("vit_incremental")
    ('vit', 'projector')
    """
    return () if stage is None else STAGES[stage]


def apply_stage(args: SFTConfig) -> None:
    """Freeze what the stage does not train; raises `UserError` for a part that it does train.

    So a stage cannot be had with less than it says: that is what the freeze options alone are for.
    """
    if args.stage is None:
        return
    if args.stage not in STAGES:
        raise UserError(f"stage is {args.stage!r}; it is one of {', '.join(STAGES)}")
    for part in STAGES["full"]:
        name = f"freeze_{part}"
        if part not in STAGES[args.stage]:
            setattr(args, name, True)
        elif getattr(args, name):
            raise UserError(
                f"stage is {args.stage!r}, which trains the {part}, but {name} is set: leave one "
                "of them out"
            )


def check_vision_options(args: SFTConfig) -> None:
    """Raise `UserError` for a drop path that is none, or of what is not trained."""
    rate = args.vit_drop_path
    if not 0 <= rate < 1:
        raise UserError(f"vit_drop_path is {rate}; it is from 0 to below 1")
    if rate and args.freeze_vit:
        raise UserError(f"vit_drop_path is {rate}, but freeze_vit is set, too")
