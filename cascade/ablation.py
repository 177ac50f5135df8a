"""What a recipe's arms came to over its seeds: ablation.json, a table, a plot.

    {"compute_from": "sft", "start_seconds": {"sft": 14.0}, "runs": [
      {"arm": "cascade", "stage": "rl", "seed": 10, "accuracy": 0.81, "se": 0.008, "n": 2000,
       "compute_seconds": 151.2, "compute_seconds_raw": 212.9, "starts": 8, "untimed_starts": 0,
       "right_chain": 0.79, "greedy": 0.84, "greedy_se": 0.008, "format": 1.0, "mean_tokens": 21.7,
       "counts": {"careless": 0.0}},
      {"arm": "cascade", "stage": "rl", "seed": 11, "error": "stage rl ended with code 1"}]}

compute_seconds: CPU seconds of the processes behind an arm after the stage `compute_from`, sampling
included and evaluations left out, less `start_seconds` (by kind) for each start of a process; raw:
with them. untimed_starts: those that ended with their driver, whose seconds nobody counted. No run
is left out: one that failed is an entry with its error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.manifest import Manifest
from cascade.plan import plan
from cascade.recipe import Recipe
from cascade.seeds import seed_folder
from cascade.stages import Stage
from internvl.data import write_json
from internvl.errors import UserError

_OF_METRICS = ("greedy", "greedy_se", "sampled_ci", "greedy_ci", "format", "mean_tokens")


def write_ablation(recipe: Recipe, output: Path, failed: Mapping[int, str]) -> str:
    """Write ablation.json, ablation.md and ablation.svg into `output`; returns the table.

    failed: {seed: why its run ended before the end}.
    """
    from cascade.ablation_page import draw_plot, make_table

    runs = [
        run_of_arm(recipe, output, arm, seed, failed.get(seed))
        for arm in recipe.arms
        for seed in recipe.seeds
    ]
    found = {
        "recipe": recipe.name,
        "compute_from": recipe.compute_from,
        "start_seconds": dict(recipe.start_seconds),
        "runs": runs,
    }
    write_json(output / "ablation.json", found)
    table = make_table(found)
    (output / "ablation.md").write_text(table, encoding="utf-8")
    (output / "ablation.svg").write_text(draw_plot(found), encoding="utf-8")
    return table


def run_of_arm(
    recipe: Recipe, output: Path, arm: str, seed: int, failed: str | None
) -> dict[str, Any]:
    """The entry of one arm and seed; one that was not evaluated holds the error instead."""
    stage = recipe.arms[arm]
    entry: dict[str, Any] = {"arm": arm, "stage": stage, "seed": seed}
    folder = seed_folder(output, seed)
    try:
        manifest = Manifest(folder / "manifest.json", seed, recipe.name)
        if not manifest.is_whole(f"evaluate.{stage}"):
            before = manifest.entry(f"evaluate.{stage}") or {}
            since = " since what it needs ran anew" if before.get("done") else ""
            return {**entry, "error": failed or f"stage {stage} has not been evaluated{since}"}
        file = folder / "eval" / stage / "metrics.json"
        metrics = json.loads(file.read_text(encoding="utf-8"))
        return {
            **entry,
            "accuracy": metrics["sampled"],
            "se": metrics["sampled_se"],
            "n": metrics["n"],
            **compute_of(recipe, folder, seed, manifest, stage),
            **({"right_chain": metrics["chain_correct"]} if "chain_correct" in metrics else {}),
            **{key: metrics[key] for key in _OF_METRICS if key in metrics},
            "counts": {name: metrics[name] for name in _counted(recipe, stage) if name in metrics},
        }
    except (UserError, OSError, ValueError, KeyError) as error:
        return {**entry, "error": f"{type(error).__name__}: {error}"}


def compute_of(
    recipe: Recipe, run: Path, seed: int, manifest: Manifest, stage: str
) -> dict[str, float]:
    """The CPU seconds behind a stage after `compute_from`, whole and without the starts."""
    stages = {item.name: item for item in plan(recipe, run, seed, extra=_optional(recipe))}
    behind = _behind(stages, stage)
    if recipe.compute_from is not None:
        behind -= _behind(stages, recipe.compute_from)
    raw = net = 0.0
    starts = untimed = 0
    for name in sorted(behind):
        record = manifest.entry(name)
        if record is None:
            raise UserError(f"{manifest.path} has no record of {name}")
        raw += record["cpu_seconds"]
        net += record["cpu_seconds"]
        net -= record["timed"] * recipe.start_seconds.get(record["kind"], 0.0)
        starts += record["starts"]
        untimed += record["starts"] - record["timed"]
    return {
        "compute_seconds": round(net, 1),
        "compute_seconds_raw": round(raw, 1),
        "starts": starts,
        "untimed_starts": untimed,
    }


def _optional(recipe: Recipe) -> tuple[str, ...]:
    return tuple(name for name, spec in recipe.stages.items() if spec.optional)


def _behind(stages: Mapping[str, Stage], stage: str) -> set[str]:
    """The processes of a recipe's stage and all that they need, but its evaluation."""
    look = [s.name for s in stages.values() if s.stage == stage and s.kind != "evaluate"]
    if not look:  # a stage of kind evaluate: what it looks at
        look = [*stages[f"evaluate.{stage}"].needs]
    found: set[str] = set()
    while look:
        name = look.pop()
        if name not in found:
            found.add(name)
            look += stages[name].needs
    return found


def _counted(recipe: Recipe, stage: str) -> Sequence[str]:
    """The names of the shares that a stage's evaluation counts."""
    spec = recipe.stages[stage]
    options = spec.options if spec.kind == "evaluate" else spec.evaluate or {}
    return [*options.get("count", {})]
