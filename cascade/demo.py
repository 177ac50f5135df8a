"""`cascade demo`: the recipes that come with the package, on a world made on the spot.

world -> sft-careful -> sft -> [evaluate] -> sample, verify, pair -> mpo -> [evaluate]
      -> sample, verify, select -> rl -> [evaluate] -> report.html, summary.json
"""

from __future__ import annotations

from pathlib import Path

from cascade.recipe import Recipe, load_recipe
from cascade.run import RunOptions, run_seed
from internvl.errors import UserError

PRESETS = ("demo", "tiny")


def demo_recipe(preset: str) -> Recipe:
    """A recipe that comes with the package."""
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    return load_recipe(Path(__file__).parent / "recipes" / f"{preset}.yaml")


def run_demo(run: Path, *, seed: int, preset: str, control: bool, backend: str) -> None:
    """Run what is left of the demo; control: with the recipe's optional stage of that name."""
    extra = ("control",) if control else ()
    run_seed(demo_recipe(preset), run, seed, RunOptions(extra=extra, backend=backend))
