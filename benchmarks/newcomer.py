"""From the command to the first optimizer step, on MMPR files: ours beside TRL 1.16.

    OMP_NUM_THREADS=1 python benchmarks/newcomer.py            # a table
    OMP_NUM_THREADS=1 python benchmarks/newcomer.py --json     # the last line is one JSON object

A newcomer has an MMPR `meta.json` with a JSONL of 64 pairs, rendered pictures and the tiny
checkpoint (all made here, in a temporary folder), and no model hub. Each run is a process of its
own, full training or LoRA, five steps of eight pairs:

    ours    `python -m mpo --config mpo.yaml`: nine lines of YAML, no code
    trl     its DPOTrainer with the three losses, on what `newcomer_trl.py` makes of the same files
            (TRL reads neither meta.json nor `<image>`, so that script is glue of the user's own)

`wall` and `cpu` are seconds from the start of the process to the end of its first optimizer step
(torch's own hook says when; user and system time of the process and its children), `to_end` those
of the whole run. The runs take turns, `--rounds` times each; medians. `--phases` also says where
ours spends its time, by the clock. Nothing else should run beside it: the wall clock sees it all,
and on cores that share a package even CPU seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
ROWS, STEPS, BATCH = 64, 5, 8
RUNS = ("ours_full", "trl_full", "ours_lora", "trl_lora")
MARKS = "NEWCOMER_MARKS"  # the file that a run writes its times to
CONFIG = """\
model_name_or_path: {folder}/model
train_file: {folder}/MMPR/meta.json
output_dir: {output}
per_device_train_batch_size: {batch}
max_steps: {steps}
learning_rate: 1.0e-5
save_strategy: "no"
report_to: none
use_cpu: true
"""


def main() -> None:
    """Make the files, let the runs take turns, print their times."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", action="store_true", help="end with one JSON object")
    options.add_argument("--only", choices=RUNS, action="append", help="these runs alone")
    options.add_argument("--phases", action="store_true", help="where our time goes")
    options.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)  # in a process of its own
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.run is not None:
        run_marked(asked.run, asked.folder)
        return
    runs = asked.only or list(RUNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        found: dict[str, list[dict[str, Any]]] = {run: [] for run in runs}
        for number in range(asked.rounds + 1):  # the first round fills the disk's cache
            for run in runs:
                times = time_run(run, folder)
                if number:
                    found[run].append(times)
                    print(f"round {number}  {run:<10}", *shown(times), sep="  ", flush=True)
    result = {run: summary(times) for run, times in found.items()}
    print(
        "\nmedian of", asked.rounds, "rounds: seconds to the first optimizer step, and to the end"
    )
    for run, times in result.items():
        print(f"  {run:<10}", *shown(times), sep="  ")
    if asked.phases:
        for run in (run for run in runs if run.startswith("ours")):
            print(f"  {run}:", ", ".join(f"{k} {v:.2f}" for k, v in result[run]["phases"].items()))
    if asked.json:
        print(json.dumps({"rounds": asked.rounds, "rows": ROWS, **result}))


def shown(times: dict[str, Any]) -> list[str]:
    """The four times as a table's columns."""
    first, end = times, times["to_end"]
    return [
        f"{first['wall']:6.2f} s by the clock, {first['cpu']:6.2f} CPU-s",
        f"{end['wall']:6.2f} / {end['cpu']:6.2f} to the end",
    ]


def summary(times: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a run's rounds."""
    median: dict[str, Any] = {
        name: statistics.median(one[name] for one in times) for name in ("wall", "cpu")
    }
    median["to_end"] = {
        name: statistics.median(one["to_end"][name] for one in times) for name in ("wall", "cpu")
    }
    median["fastest_wall"] = min(one["wall"] for one in times)
    names = times[0]["phases"]
    median["phases"] = {n: statistics.median(one["phases"][n] for one in times) for n in names}
    return median


def make_files(folder: Path) -> None:
    """The checkpoint, the pictures, MMPR's two files and our YAML."""
    sys.path.insert(0, str(ROOT))
    from cascade.tiny import make_tiny_model
    from cascade.world import WorldSizes, make_world

    make_tiny_model(folder / "model", seed=0)
    sizes = WorldSizes(sft=1, mixed=1, probe=1, preference=1, rl=ROWS, heldout=1)
    make_world(folder / "MMPR", seed=0, sizes=sizes)
    rows = [json.loads(line) for line in (folder / "MMPR/rl.jsonl").read_text().splitlines()]
    with (folder / "MMPR/pairs.jsonl").open("w") as out:
        for row in rows:
            pair = {name: row[name] for name in ("id", "image", "question")}
            careless = "It looks clear from the chart. Final Answer: 11"
            out.write(json.dumps({**pair, "chosen": row["solution"], "rejected": careless}) + "\n")
    entry = {"root": ".", "annotation": "pairs.jsonl", "data_augment": False}
    meta = {"charts": {**entry, "repeat_time": 1, "length": len(rows)}}
    (folder / "MMPR/meta.json").write_text(json.dumps(meta))
    for kind, lora in (("full", ""), ("lora", "use_peft: true\n")):
        text = CONFIG.format(folder=folder, output=folder / kind, batch=BATCH, steps=STEPS)
        (folder / f"{kind}.yaml").write_text(text + lora)


def time_run(run: str, folder: Path) -> dict[str, Any]:
    """One run in a new process; raises RuntimeError with what it printed where it fails."""
    subprocess.run(["rm", "-rf", str(folder / "full"), str(folder / "lora")], check=True)
    marks = folder / "marks.json"
    marks.unlink(missing_ok=True)
    ended = subprocess.run(
        [sys.executable, str(HERE), "--run", run, "--folder", str(folder)],
        env={
            **os.environ,
            MARKS: json.dumps({"file": str(marks), "start": time.time()}),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode or not marks.exists():
        raise RuntimeError(f"{run} failed:\n{ended.stdout}\n{ended.stderr}")
    times: dict[str, Any] = json.loads(marks.read_text())
    return times


# ---------------------------------------------------------------- in a run's own process


def run_marked(run: str, folder: Path) -> None:
    """Do what the user's command does, and write down when its first step was made."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    asked = json.loads(os.environ[MARKS])
    first: dict[str, float] = {}
    phases: dict[str, float] = {}
    seen: dict[str, float] = {}  # the phases until the first step

    def now() -> dict[str, float]:
        spent = os.times()
        cpu = spent.user + spent.system + spent.children_user + spent.children_system
        return {"wall": time.time() - asked["start"], "cpu": cpu}

    def stepped(*_: Any) -> None:
        if not first:
            first.update(now())
            seen.update(phases)

    register_optimizer_step_post_hook(stepped)
    # benchmarks/ holds a mpo.py: `python -m mpo` has the working directory there instead
    sys.path[0] = str(ROOT)
    side, kind = run.split("_")
    if side == "ours":
        sys.argv = ["mpo", "--config", str(folder / f"{kind}.yaml")]
        mark_phases(phases)
        runpy.run_module("mpo", run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["newcomer_trl.py", str(folder), kind]
        runpy.run_path(str(HERE.with_name("newcomer_trl.py")), run_name="__main__")
    times = {**first, "to_end": now(), "phases": seen}
    Path(asked["file"]).write_text(json.dumps(times))


def mark_phases(phases: dict[str, float]) -> None:
    """Note how long each part of `python -m mpo` takes; its imports are made in its order."""
    last = time.perf_counter()

    def mark(name: str) -> None:
        nonlocal last
        here = time.perf_counter()
        phases[name] = phases.get(name, 0.0) + here - last
        last = here

    def wrap(owner: Any, function: str, before: str, after: str) -> None:
        original = getattr(owner, function)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            mark(before)
            result = original(*args, **kwargs)
            mark(after)
            return result

        setattr(owner, function, wrapped)

    import mpo.config
    from training import cli

    mark("import for the options")
    wrap(cli, "parse_config", "options", "options")
    import mpo.trainer
    from training import stage

    mark("import for training")
    wrap(stage, "open_stage", "options", "processor and model")
    wrap(stage, "usable_rows", "rows", "rows")
    wrap(mpo.trainer.MPOTrainer, "__init__", "rows", "trainer and reference")
    wrap(mpo.trainer.MPOTrainer, "training_step", "start of training", "first step")


if __name__ == "__main__":
    main()
