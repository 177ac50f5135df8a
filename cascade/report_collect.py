"""Reading the folder of a run for its report (the folder's layout is told in cascade/report.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cascade.report_curves import read_num_tokens, read_trainings
from cascade.report_data import Process, ReportData
from cascade.report_examples import read_examples, read_pairs
from cascade.report_files import get, number, read_lines
from cascade.report_pictures import ImageFinder
from cascade.report_results import Answered, read_answered, read_result, read_steps
from cascade.report_rollouts import Judged, read_changes, read_judged, rollouts_of
from cascade.report_run import DEMO_RECIPES, TRAINING, RunFolder

# bytes of rollouts that are read to count their tokens; a page is not worth minutes of reading
MOST_ROLLOUT_BYTES = 2**29


def collect(path: Path) -> ReportData:
    """Read a run's folder into the data of its report.

    Required: manifest.json. What is not there is not on the page, what was begun and did not end
    is said to be so; a part that is there and cannot be read raises UserError.
    """
    run = RunFolder.read(path)
    results = [read_result(run, name) for name in run.evaluated]
    answered = _answered(run)
    judged = read_judged(run)
    steps, others = read_steps(run, results, answered)
    line = [result.name for result in results if not result.info.aside]
    finder = ImageFinder(run)
    examples, fates = read_examples(run, line, answered, finder)
    demo = run.name in DEMO_RECIPES and (path / "world").is_dir()
    revision = run.manifest.get("revision")
    return ReportData(
        title=_title(run, line),
        recipe=run.name,
        seed=get(run.manifest, "seed", int, run.file),
        seconds=number(run.manifest, "seconds", run.file) if "seconds" in run.manifest else
        sum(process.seconds for process in run.processes),
        stages=run.stages,
        results=results,
        steps=steps,
        others=others,
        trainings=read_trainings(run),
        examples=examples,
        fates=fates,
        changes=read_changes(run, answered, judged),
        pairs=read_pairs(run, finder),
        rollouts=rollouts_of(run, judged),
        gates=run.gates(results),
        processes=_with_tokens(run, answered, judged),
        waiting=run.waiting(),
        stale=run.stale,
        versions={str(k): str(v) for k, v in (run.manifest.get("versions") or {}).items()},
        revision=None if revision is None else str(revision),
        config_files=_config_files(path),
        demo_world=demo,
    )  # fmt: skip


def _title(run: RunFolder, line: list[str]) -> str:
    names = [run.stages[name].label for name in line]
    return f"{run.name}: {', '.join(names)}" if names else run.name


def _answered(run: RunFolder) -> dict[str, Answered]:
    paths = {name: run.path / "eval" / name / "predictions.jsonl" for name in run.evaluated}
    found = {name: read_answered(path) for name, path in paths.items() if path.exists()}
    return {name: one for name, one in found.items() if one.place}


def _with_tokens(
    run: RunFolder, answered: Mapping[str, Answered], judged: Mapping[str, Judged]
) -> list[Process]:
    """The processes with the tokens that they sampled, or were given to train on."""

    def tokens(process: Process) -> int | None:
        if process.kind == "evaluate" and process.stage in answered:
            return answered[process.stage].tokens
        if process.kind == "sample" and process.stage in judged:
            return judged[process.stage].tokens
        if process.kind == "rl":
            return _rl_tokens(run.folder(process.stage))
        if process.kind in TRAINING:
            return read_num_tokens(run, process.stage)
        return None

    return [replace(process, tokens=tokens(process)) for process in run.processes]


def _rl_tokens(folder: Path) -> int | None:
    """Tokens that online RL sampled, from its log of rollouts; None where there is none to read."""
    paths = sorted(folder.glob("rollouts/rank*.jsonl"))
    if not paths or sum(path.stat().st_size for path in paths) > MOST_ROLLOUT_BYTES:
        return None
    return sum(
        len(ids)
        for path in paths
        for row in read_lines(path)
        for ids in get(row, "completions", list, path)
    )


def _config_files(run: Path) -> list[tuple[str, str]]:
    paths = [*run.glob("*.yaml"), *run.glob("configs/*.yaml")]
    paths += run.glob("stages/*/config.resolved.json")
    return [
        (path.relative_to(run).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(paths, key=lambda path: (len(path.parts), path))
    ]
