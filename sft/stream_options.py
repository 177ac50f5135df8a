"""Options of SFT's data: which samples are drawn, in what share, and how they are packed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from internvl.errors import UserError

if TYPE_CHECKING:
    from sft.config import SFTConfig

MIXTURES = ("size", "weights")
RATIOS = ("tokens", "samples")


@dataclass
class StreamArguments:
    """Options of the mixture and of packing (docs/data.md)."""

    mixture: str = field(
        default="size",
        metadata={
            "help": "What a data set's share of the samples goes by: 'size' (its rows, repeat_time "
            "counted) or 'weights' (meta.json's weight, or mixture_weights)."
        },
    )
    mixture_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "With mixture: weights, {name: weight} in place of meta.json's own."},
    )
    mixture_replacement: bool = field(
        default=False,
        metadata={
            "help": "Draw each sample by chance, with replacement. By default a data set's rows "
            "have all been drawn before one of them comes again."
        },
    )
    text_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of samples without image or video in what is drawn (InternVL3's native "
            "pre-training, text : multimodal = 1 : 3, is 0.25); within each kind the data sets "
            "keep their proportions. By default as it comes."
        },
    )
    text_ratio_by: str = field(
        default="tokens",
        metadata={"help": "What text_ratio is a share of: 'tokens' (published) or 'samples'."},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Pack the stream of samples: per_device_train_batch_size then counts PACKS of "
            "max_tokens_per_microbatch tokens and max_tiles_per_microbatch tiles in one optimizer "
            "step of this device (published: 32768 and 96). Text over that is split; rows with "
            "images over it are put aside."
        },
    )
    packing_buffer_size: int = field(
        default=20, metadata={"help": "Packs that are open at once, for samples to find room in."}
    )


def check_stream_options(args: SFTConfig) -> None:
    """Raise `UserError` for what cannot be; read weights that the command line gave as JSON."""
    if args.mixture not in MIXTURES:
        raise UserError(f"mixture is {args.mixture!r}; it is one of {', '.join(MIXTURES)}")
    if isinstance(args.mixture_weights, str):
        args.mixture_weights = _read_weights(args.mixture_weights)
    if args.mixture_weights is not None:
        _check_weights(args.mixture_weights)
        if args.mixture != "weights":
            raise UserError(
                'mixture_weights is given, but mixture is "size": give mixture: weights'
            )
    if args.text_ratio is not None and not 0 < args.text_ratio < 1:
        raise UserError(f"text_ratio is {args.text_ratio:g}; it is a share, between 0 and 1")
    if args.text_ratio_by not in RATIOS:
        raise UserError(f"text_ratio_by is {args.text_ratio_by!r}; it is {' or '.join(RATIOS)}")
    if args.text_ratio_by != "tokens" and args.text_ratio is None:
        raise UserError("text_ratio_by is given, but text_ratio is not")
    if args.packing:
        _check_packing(args)
    elif args.packing_buffer_size != 20:
        raise UserError("packing_buffer_size is given, but packing is not")


def _check_packing(args: SFTConfig) -> None:
    if args.packing_buffer_size < 1:
        raise UserError(f"packing_buffer_size is {args.packing_buffer_size}; it must be at least 1")
    if args.max_tokens_per_microbatch < 2:
        raise UserError("packing: max_tokens_per_microbatch must be at least 2")
    if args.check_rows == "when_used" and args.max_steps < 1:
        raise UserError(
            "packing with check_rows: when_used needs max_steps: how many packs an epoch gives is "
            "known when every length was counted"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise UserError(
                f'{name} is "epoch", but with packing one epoch runs on into the next: give "steps"'
            )


def _read_weights(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f'mixture_weights is {text!r}; give {{"name": weight}} as JSON')
    return found


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"mixture_weights is {weights!r}; give a weight for each name")
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(
                f"mixture_weights: {name} has {weight!r}; a weight is a number over 0 "
                "(repeat_time 0 in meta.json leaves a data set out)"
            )


def changes_order(args: SFTConfig) -> bool:
    """Whether an option asks for another order than every row once an epoch."""
    return args.mixture != "size" or args.mixture_replacement or args.text_ratio is not None
