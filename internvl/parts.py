"""The three parts of an InternVL, and the one that a weight belongs to."""

from __future__ import annotations

PARTS = ("vision tower", "projector", "language model")


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to, by its name in either layout, or PEFT's."""
    first = name.removeprefix("base_model.model.").removeprefix("model.").split(".")[0]
    if first in ("vision_model", "vision_tower"):
        return PARTS[0]
    return PARTS[1] if first in ("mlp1", "multi_modal_projector") else PARTS[2]
