"""The whole demo (its tiny preset), killed at random moments: it ends as if nothing had happened.

An uninterrupted run says how much CPU time each process takes: the work that it does, which other
work on the machine does not stretch as it does the clock. Then moments are drawn over all of that
by a seed that is printed, and a second run is killed at each of them by a real SIGKILL: of the
driver with all that it started, or of the driver alone, so that a stage outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from stage_runs import NOT_COMPARED

from cascade.driver import run_lock
from cascade.report import write_report
from internvl.errors import UserError

KILLS = 10
SEED = int(os.environ.get("CASCADE_KILLS_SEED", "0"))
HANG = 3600.0  # seconds; more is a hang
TRAINED = ("sft-careful", "sft", "mpo", "rl")
OF_A_RECORD = ("seconds", "cpu_seconds", "started", "starts", "timed")


@dataclass(frozen=True)
class Moment:
    """`after` CPU seconds into a process; alone: of the driver, and not of its processes."""

    name: str
    after: float
    alone: bool


def start(run: Path) -> subprocess.Popen[bytes]:
    """`cascade demo --preset tiny` in a process group of its own."""
    command = [sys.executable, "-m", "cascade", "demo", "--preset", "tiny"]
    with run.with_suffix(".log").open("ab") as out:
        return subprocess.Popen(
            [*command, "--output", str(run)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )


def log(run: Path) -> str:
    return run.with_suffix(".log").read_text(errors="replace")


def finish(run: Path) -> None:
    """Run the demo to its end, which must be a good one."""
    code = start(run).wait(timeout=HANG)
    assert code == 0, log(run)[-3000:]


def records(run: Path) -> dict[str, dict[str, Any]]:
    """{process: its record}, while the run goes on, too."""
    file = run / "manifest.json"
    data = json.loads(file.read_text()) if file.exists() else {"stages": []}
    return {record["name"]: record for record in data["stages"]}


def wait_until(test: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG
    while not test():
        assert time.monotonic() < deadline, f"{what} does not come"
        time.sleep(0.1)


def is_free(run: Path) -> bool:
    """Whether nothing of the run is alive."""
    try:
        with run_lock(run):
            return True
    except UserError:
        return False


def draw_moments(seconds: dict[str, float], rng: random.Random) -> list[Moment]:
    """KILLS moments, evenly over the work of all processes, in the order in which they come."""
    drawn = sorted(rng.uniform(0, sum(seconds.values())) for _ in range(KILLS))
    moments = []
    for moment in drawn:
        rest = moment
        for name, lasts in seconds.items():
            if rest < lasts or name == [*seconds][-1]:
                moments.append(Moment(name, rest, rng.random() < 0.4))
                break
            rest -= lasts
    return moments


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """What the driver and all that it started have used, those that have ended too."""
    used = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        driver = psutil.Process(process.pid)
        for one in (driver, *driver.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used += sum(one.cpu_times()[:4])  # user, system, and the same of ended children
    return used


def kill(run: Path, moment: Moment) -> bool:
    """Start the demo and kill it at this moment, or when its process ends; False: it was over."""
    before = records(run).get(moment.name, {}).get("starts", 0)
    process = start(run)

    def is_over() -> bool:
        return process.poll() is not None

    def has_come() -> bool:
        record = records(run).get(moment.name, {"starts": 0, "done": False})
        return is_over() or record["starts"] > before or record["done"]

    wait_until(has_come, moment.name)
    used = cpu_seconds(process)
    ends = not records(run).get(moment.name, {}).get("done", True)

    def is_there() -> bool:
        late = ends and records(run)[moment.name]["done"]
        return is_over() or late or cpu_seconds(process) >= used + moment.after

    wait_until(is_there, str(moment))
    if is_over():
        assert process.returncode == 0, log(run)[-3000:]
        return False
    if moment.alone:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # what outlives its driver holds the run's lock, and is not started twice
    wait_until(lambda: is_free(run), "the end of what was killed")
    return True


def with_times_of(run: Path, other: Path) -> None:
    """Replace every time in a run's records by the other run's; nothing else."""
    for name in ("manifest.json", "summary.json"):
        found, wanted = (json.loads((folder / name).read_text()) for folder in (run, other))
        found["seconds"] = wanted["seconds"]
        if name == "manifest.json":
            for record, twin in zip(found["stages"], wanted["stages"], strict=True):
                record.update({key: twin[key] for key in OF_A_RECORD})
        (run / name).write_text(json.dumps(found))
    for file in run.glob("stages/*/trainer_state.json"):
        found, wanted = (
            json.loads((folder / file.relative_to(run)).read_text()) for folder in (run, other)
        )
        for entry, twin in zip(found["log_history"], wanted["log_history"], strict=True):
            entry.update({key: twin[key] for key in twin if key.endswith(NOT_COMPARED)})
        file.write_text(json.dumps(found))


def compared(run: Path) -> dict[str, bytes]:
    """What must be the same to the byte: weights, data, predictions and metrics."""
    names = [f"stages/{name}/model.safetensors" for name in TRAINED]
    names += [f"stages/pairs/{name}" for name in ("rollouts.jsonl", "verdicts.jsonl")]
    names += ["stages/pairs/pairs.jsonl", "stages/pairs/meta.json"]
    names += ["stages/select/rollouts.jsonl", "stages/select/questions.jsonl"]
    names += [f"eval/{name}/predictions.jsonl" for name in TRAINED]
    return {name: (run / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_the_demo_killed_at_random_moments(tmp_path: Path) -> None:
    run, reference = tmp_path / "run", tmp_path / "reference"
    finish(run)
    run.rename(reference)
    seconds = {name: record["cpu_seconds"] for name, record in records(reference).items()}
    rng = random.Random(SEED)
    moments = draw_moments(seconds, rng)
    killed = 0
    for moment in moments:
        alive = kill(run, moment)
        killed += alive
        print(f"seed {SEED}: {moment}: {'killed' if alive else 'was over'}", flush=True)
    while killed < KILLS:  # a moment fell behind the end: once more, from the beginning
        subprocess.run(["rm", "-rf", str(run)], check=True)
        moment = rng.choice(moments)
        killed += kill(run, moment)
        print(f"seed {SEED}: from the beginning: {moment}", flush=True)
    finish(run)
    started = log(run).count(": python -m")
    finish(run)  # and then there is nothing to do
    assert log(run).count(": python -m") == started

    for name, content in compared(reference).items():
        assert (run / name).read_bytes() == content, name
    with_times_of(run, reference)
    for name in ("summary.json", *(f"eval/{stage}/metrics.json" for stage in TRAINED)):
        found, wanted = (json.loads((folder / name).read_text()) for folder in (run, reference))
        assert found == wanted, name
    # both reports from one place: a page tells its run's paths
    page = write_report(run).read_text()
    run.rename(tmp_path / "killed")
    reference.rename(run)
    assert write_report(run).read_text() == page
