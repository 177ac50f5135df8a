"""`cascade run`: the stages of a recipe, one seed of it in one folder.

recipe -> plan -> (options and inputs are there?) -> driver -> summary.json, report.html
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.check_options import check_options
from cascade.driver import Driver, config_text, run_lock
from cascade.gates import GateError
from cascade.inputs import tell_missing
from cascade.manifest import Manifest, revision, versions
from cascade.plan import chosen_stages, plan
from cascade.processes import cores, has_gpu
from cascade.recipe import Recipe, is_evaluated
from cascade.stages import Choice, Stage, decide
from internvl.data import write_json
from internvl.errors import UserError


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run.

    extra: optional stages that are wanted. start: the stage (or process) that runs anew, with what
    needs it. only: the stages (or processes) that run. gates: whether they are looked at. backend,
    overlap: instead of the recipe's.
    """

    extra: tuple[str, ...] = ()
    start: str | None = None
    only: tuple[str, ...] = ()
    gates: bool = True
    backend: str | None = None
    overlap: bool | None = None


def run_seed(recipe: Recipe, run: Path, seed: int, options: RunOptions) -> None:
    """Run what is left of a recipe's stages for one seed; then summary, report and a table.

    Raises `UserError` for what is wrong with the recipe, before anything starts; `GateError` where
    a gate closed, after summary and report of the stages before it and its own.
    """
    stages = plan(recipe, run, seed, backend=options.backend, extra=options.extra)
    _check_inputs(recipe, options.extra)
    choice = _choice(stages, options)
    with run_lock(run) as lock:  # before the manifest is read: another driver may write it
        manifest = Manifest(run / "manifest.json", seed, recipe.name)
        driver = Driver(
            manifest,
            can_overlap=_overlap(recipe, options),
            env=recipe.environment,
            gates=options.gates,
        )
        _check_options(recipe, stages, manifest, driver.env)
        _note_what_runs(recipe, run, manifest)
        if options.start is not None:
            _forget(manifest, stages, options.start)
        try:
            driver.run_locked(stages, lock, choice)
        except GateError:
            _tell(recipe, run, manifest, options, True)
            raise
        if not options.only and manifest.data.pop("anew", None) is not None:
            manifest.write()
    _tell(recipe, run, manifest, options)


def print_plan(recipe: Recipe, run: Path, seed: int, options: RunOptions) -> None:
    """What a run would do, as a shell script that does it; nothing is written.

    What is done already stands there as a comment.
    """
    stages = plan(recipe, run, seed, backend=options.backend, extra=options.extra)
    _check_inputs(recipe, options.extra)
    manifest = Manifest(run / "manifest.json", seed, recipe.name)
    if options.start is not None:
        _forget(manifest, stages, options.start, write=False)
    decisions, _ = decide(stages, manifest, _choice(stages, options))
    _refuse_faults(recipe, check_options(stages).faults)
    print("set -e")
    for key, value in recipe.environment.items():
        print(f"export {key}=${{{key}:-{shlex.quote(value)}}}")
    for stage, decision in zip(stages, decisions, strict=True):
        print(f"\n# {stage.name}: {decision.action}: {decision.why}")
        if decision.action in ("skip", "leave"):
            continue
        if decision.action == "start" and stage.folder.exists():
            owned = [stage.folder] if stage.owns is None else list(stage.owns)
            print(shlex.join(["rm", "-rf", *map(str, owned)]))
        print(shlex.join(["mkdir", "-p", str(stage.folder)]))
        if stage.config is not None:
            assert stage.config_file is not None
            print(shlex.join(["mkdir", "-p", str(stage.config_file.parent)]))
            print(f"cat > {shlex.quote(str(stage.config_file))} <<'END'")
            print(f"{config_text(stage.config)}END")
        print(shlex.join([sys.executable, *stage.command]))


def summary(
    recipe: Recipe, run: Path, manifest: Manifest, shown: Collection[str]
) -> dict[str, Any]:
    """The run's result in a few numbers: the stages that the recipe reports, then optional ones.

    shown: those of them that are evaluated.
    """

    def row(name: str) -> dict[str, Any]:
        metrics = json.loads((run / "eval" / name / "metrics.json").read_text(encoding="utf-8"))
        return {k: metrics[k] for k in ("name", "greedy", "sampled", "sampled_se", "format", "n")}

    return {
        "seed": manifest.data["seed"],
        "seconds": manifest.seconds,
        "stages": [row(name) for name in recipe.report if name in shown],
        **{name: row(name) for name in shown if name not in recipe.report},
    }


def _check_inputs(recipe: Recipe, extra: Collection[str]) -> None:
    specs = chosen_stages(recipe, extra).values()
    _refuse([fault for spec in specs for fault in tell_missing(recipe, spec)])


def _check_options(
    recipe: Recipe, stages: Sequence[Stage], manifest: Manifest, env: dict[str, str]
) -> None:
    """Ask the commands' own parsers, unless they were asked the same before."""
    asked = [[stage.command, stage.config] for stage in stages]
    material = json.dumps([asked, versions(), revision()], sort_keys=True)
    digest = hashlib.sha256(material.encode()).hexdigest()[:16]
    if manifest.data.get("checked") == digest:
        return
    print("== checking the options of all stages", flush=True)
    _refuse_faults(recipe, check_options(stages, env).faults)
    manifest.data["checked"] = digest


def _refuse_faults(recipe: Recipe, faults: Sequence[tuple[str, str]]) -> None:
    _refuse([f"{recipe.file}: stages.{stage}: {fault}" for stage, fault in faults])


def _refuse(faults: Sequence[str]) -> None:
    """Raise the last of the faults; the others are told before it, a line each."""
    faults = list(dict.fromkeys(faults))
    for fault in faults[:-1]:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        raise UserError(faults[-1])


def _note_what_runs(recipe: Recipe, run: Path, manifest: Manifest) -> None:
    manifest.data["versions"] = versions()
    manifest.data["revision"] = revision()
    (run / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
    manifest.write()


def _named(stages: Sequence[Stage], name: str, option: str) -> list[str]:
    """The processes of a stage, or the one of this name."""
    found = [stage.name for stage in stages if name in (stage.stage, stage.name)]
    if not found:
        known = ", ".join(dict.fromkeys(stage.stage for stage in stages))
        raise UserError(f"{option} {name}: no stage of the recipe; there are: {known}")
    return found


def _choice(stages: Sequence[Stage], options: RunOptions) -> Choice:
    if options.only:
        names = [one for name in options.only for one in _named(stages, name, "--only")]
        return Choice(frozenset(names))
    if options.start is None:
        return Choice()
    order = [stage.name for stage in stages]
    first = order.index(_named(stages, options.start, "--from")[0])
    return Choice(frozenset(order[first:]))


def _forget(manifest: Manifest, stages: Sequence[Stage], start: str, *, write: bool = True) -> None:
    """--from: the stage and all that needs it begin anew; once, however often that is killed."""
    if manifest.data.get("anew") == start:
        return
    gone = set(_named(stages, start, "--from"))
    for stage in stages:
        if gone & set(stage.needs):
            gone.add(stage.name)
    for record in manifest.data["stages"]:
        if record["name"] in gone:
            record.update(key="", done=False)
    manifest.data["anew"] = start
    if write:
        manifest.write()


def _overlap(recipe: Recipe, options: RunOptions) -> bool:
    for said in (options.overlap, recipe.overlap):
        if said is not None:
            return said
    return cores() > 1 and not has_gpu()


def _tell(
    recipe: Recipe, run: Path, manifest: Manifest, options: RunOptions, closed: bool = False
) -> None:
    """summary.json, the report and the table, where all that they show is there.

    closed: a gate closed, and they are of what is there.
    """
    from rich.console import Console

    from cascade.report import collect, write_report
    from cascade.terminal import stage_table

    shown = [*recipe.report, *(n for n in options.extra if is_evaluated(recipe.stages[n]))]
    missing = [name for name in shown if not manifest.is_whole(f"evaluate.{name}")]
    if closed:
        shown, missing = [name for name in shown if name not in missing], []
    if missing or not shown:
        what = f"not evaluated: {', '.join(missing)}" if missing else "no stage is evaluated"
        print(f"\n{manifest.seconds:.0f} s in all; no report ({what})")
        return
    write_json(run / "summary.json", summary(recipe, run, manifest, shown))
    page = write_report(run)
    console = Console()
    console.print(stage_table(collect(run)))
    console.print(f"{manifest.seconds:.0f} s in all; the page: {page}")
