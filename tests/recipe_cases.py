"""A recipe of all kinds of stages, its keys to be changed one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cascade.plan import plan
from cascade.recipe import Recipe, load_recipe
from cascade.stages import Stage

CASCADE: dict[str, Any] = {
    "base": {"kind": "convert", "source": "InternVL3-1B"},
    "sft": {"kind": "sft", "model": "base", "train_file": "sft.jsonl", "learning_rate": 1e-5},
    "pairs": {"kind": "pairs", "model": "sft", "questions": "train.jsonl", "sample": {"n": 8}},
    "mpo": {"kind": "mpo", "model": "sft", "data": "pairs", "max_tiles": 6},
    "select": {"kind": "select", "model": "mpo", "questions": "rl.jsonl", "min-accuracy": 0.1},
    "rl": {"kind": "rl", "model": "mpo", "data": "select"},
}
TOP: dict[str, Any] = {
    "common": {"max_tiles": 12},
    "sample": {"n": 4, "max_tokens": 40},
    "evaluate": {"questions": "heldout.jsonl", "image_root": "images", "samples": 3},
    "gate": {"metric": "sampled", "max_drop": 0.02},
}


def write(folder: Path, stages: dict[str, Any] | None = None, **top: Any) -> Path:
    """A recipe file of these stages."""
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump({**top, "stages": stages or CASCADE}, sort_keys=False))
    return file


def read(folder: Path, stages: dict[str, Any] | None = None, **top: Any) -> Recipe:
    return load_recipe(write(folder, stages, **top))


def processes(folder: Path, stages: dict[str, Any] | None = None, **top: Any) -> dict[str, Stage]:
    """What a run of these stages starts, in the folder `run`, by seed 3."""
    return {one.name: one for one in plan(read(folder, stages, **top), Path("run"), 3)}


def changed(**stages: Any) -> dict[str, Any]:
    """The cascade with some keys of its stages replaced (None: taken out)."""
    out = {name: dict(entries) for name, entries in CASCADE.items()}
    for name, entries in stages.items():
        merged = {**out.get(name, {}), **entries}
        out[name] = {key: value for key, value in merged.items() if value is not None}
    return out
