"""What is trained: each part of the model frozen, adapted or trained whole, at a rate of its own.

The vision tower's rates may fall from its last layer to its first (layer-wise decay, BEiT, arXiv
2106.08254, A.1), by the rule of InternVL's published training code (`vit_layer_decay_rate`): of L
layers, layer i = 0 .. L - 1 learns at rate * decay^(L - i), the embeddings at rate * decay^(L + 1).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from internvl.errors import UserError
from internvl.parts import PARTS, part_of
from training.arguments import PackedTrainingArguments

# what options call the parts
SHORT = dict(zip(PARTS, ("vit", "projector", "llm"), strict=True))
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # by an adapter, to the model's own weights


@dataclass
class Count:
    """Parameters of a part: the model's own, and those that are trained (an adapter's, too)."""

    every: int = 0
    trained: int = 0


def freeze_parts(model: nn.Module, args: PackedTrainingArguments) -> None:
    """Freeze the parts that the options name; before an adapter is put on the model."""
    for name, parameter in model.named_parameters():
        if getattr(args, f"freeze_{SHORT[part_of(name)]}"):
            parameter.requires_grad_(False)


def count_parts(model: nn.Module) -> dict[str, Count]:
    """Parameters by part."""
    counts = {part: Count() for part in PARTS}
    for name, parameter in model.named_parameters():
        count, size = counts[part_of(name)], _size(parameter)
        count.trained += size if parameter.requires_grad else 0
        count.every += 0 if _ADDED.search(name) else size
    return counts


def _size(parameter: Tensor) -> int:
    """Numbers in a parameter; bitsandbytes packs those of a quantised one into bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def check_parts(model: nn.Module, args: PackedTrainingArguments) -> dict[str, Count]:
    """Count the parts, once the adapter is on the model.

    Raises `UserError` where nothing is trained, an adapter trains what is to be frozen, or a
    learning rate is given for what is not trained.
    """
    counts = count_parts(model)
    for part, count in counts.items():
        short = SHORT[part]
        if count.trained and getattr(args, f"freeze_{short}"):
            raise UserError(
                f"freeze_{short} is set, but the adapter trains {count.trained:,} parameters of "
                f"the {part}: take it out of lora_parts, lora_target_modules or "
                "lora_modules_to_save"
            )
        for option in (f"{short}_learning_rate", f"{short}_layer_decay"):
            if getattr(args, option, None) is not None and not count.trained:
                raise UserError(f"{option} is given, but nothing of the {part} is trained")
        if short in args.asked_parts and not count.trained:
            raise UserError(
                f"the stage trains the {part}, but the adapter has nothing of it: name it in "
                "lora_parts or lora_modules_to_save, or leave the stage out"
            )
    if not any(count.trained for count in counts.values()):
        raise UserError("nothing is trained: every part of the model is frozen")
    return counts


def describe_parts(model: nn.Module, counts: dict[str, Count]) -> str:
    """One line: what is trained of each part."""
    kind = "by adapter" if isinstance(model, PeftModel) else "all weights"
    shares = [
        f"{part} {short_number(count.trained)} of {short_number(count.every)}"
        for part, count in reversed(counts.items())
    ]
    return f"trained ({kind}): {', '.join(shares)} parameters"


def short_number(number: int) -> str:
    """1234567 -> '1.23 M'."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def learning_rate(name: str, args: PackedTrainingArguments, layers: int) -> float:
    """The learning rate of a parameter, by its name; layers: of the vision tower."""
    part = part_of(name)
    if part == PARTS[2]:
        return args.learning_rate
    if part == PARTS[1]:
        given = args.projector_learning_rate
        return args.learning_rate if given is None else given
    rate = args.learning_rate if args.vit_learning_rate is None else args.vit_learning_rate
    if args.vit_layer_decay is None:
        return rate
    if found := re.search(r"vision_tower\.encoder\.layer\.(\d+)\.", name):
        depth = int(found[1]) + 1
    else:
        depth = 0 if "vision_tower.embeddings." in name else layers + 1
    return rate * args.vit_layer_decay ** (layers + 1 - depth)


def has_own_rates(args: PackedTrainingArguments) -> bool:
    """Whether some part learns at a rate of its own."""
    return any(
        value is not None
        for value in (args.vit_learning_rate, args.projector_learning_rate, args.vit_layer_decay)
    )


def split_groups(optimizer: Optimizer, model: nn.Module, args: PackedTrainingArguments) -> None:
    """Split the optimizer's groups by learning rate, in place, before its first step.

    All else of a group (weight decay and the like) stays. The order is the same in every process
    and at every start: language model, projector, vision tower from its last layer to its first.
    Raises `UserError` for an optimizer that is several behind one face.
    """
    if "param_groups" not in vars(optimizer):
        raise UserError(f"optim {args.optim.value!r} has no groups to give learning rates to")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = base.config
    layers = config.vision_config.num_hidden_layers
    names = {parameter: name for name, parameter in model.named_parameters()}
    split: dict[tuple[int, float, int], list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = names[parameter]
            rate = learning_rate(name, args, layers)
            place = (-PARTS.index(part_of(name)), -rate, index)
            split.setdefault(place, []).append(parameter)
    optimizer.param_groups = [
        {**optimizer.param_groups[index], "params": parameters, "lr": -rate}
        for (_, rate, index), parameters in sorted(split.items(), key=lambda item: item[0])
    ]
