"""The cascade's driver on cheap stages, killed, and its recipes on the real options."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.demo import PRESETS, demo_recipe
from cascade.driver import Driver, run_lock
from cascade.manifest import Manifest
from cascade.plan import plan
from cascade.stages import Stage
from internvl.errors import UserError

# a stage: notes that it was called, takes a part of its work each time, and fails where told to
WORK = """
import sys, time
from pathlib import Path
run, name, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with (run / "calls.txt").open("a") as calls:
    calls.write(name + "\\n")
folder = run / name
with (folder / "work.txt").open("a") as work:
    work.write("part\\n")
if mode == "sleep" and len((folder / "work.txt").read_text().split()) == 1:
    time.sleep(60)
if mode == "brief":
    time.sleep(0.5)
if mode == "fail" and not (run / "mended").exists():
    raise SystemExit(3)
"""


def stage(run: Path, name: str, *needs: str, mode: str = "run", **options: Any) -> Stage:
    """A stage that writes into the folder of its name."""
    return Stage(name, ["-c", WORK, str(run), name, mode], run / name, needs, **options)


def start(run: Path, *stages: Stage, seed: int = 0, can_overlap: bool = False) -> None:
    """What a start of the driver does."""
    Driver(Manifest(run / "manifest.json", seed, "test"), can_overlap=can_overlap).run_stages(
        stages
    )


def calls(run: Path) -> list[str]:
    """The stages that were called since the last look, in order."""
    file = run / "calls.txt"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def test_what_is_done_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", "a")]
    start(tmp_path, *stages)
    assert calls(tmp_path) == ["a", "b"]
    start(tmp_path, *stages, stage(tmp_path, "c", "b"))
    assert calls(tmp_path) == ["c"]
    said = capsys.readouterr().out
    assert "== a: done before (" in said
    assert "== b: done before (" in said
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert [(entry["name"], entry["done"]) for entry in record["stages"]] == [
        ("a", True),
        ("b", True),
        ("c", True),
    ]
    assert record["seconds"] > 0


def test_a_change_runs_it_and_what_needs_it_anew(tmp_path: Path) -> None:
    def stages(rate: float) -> list[Stage]:
        file = tmp_path / "configs" / "b.yaml"
        return [
            stage(tmp_path, "a"),
            stage(tmp_path, "b", "a", config={"rate": rate}, config_file=file),
            stage(tmp_path, "c", "b"),
            stage(tmp_path, "d", "a"),
        ]

    start(tmp_path, *stages(0.1))
    assert calls(tmp_path) == ["a", "b", "c", "d"]
    (tmp_path / "b" / "old.txt").write_text("of the first run")
    start(tmp_path, *stages(0.2))
    assert calls(tmp_path) == ["b", "c"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["work.txt"]
    assert (tmp_path / "c" / "work.txt").read_text() == "part\n"
    assert yaml.safe_load((tmp_path / "configs" / "b.yaml").read_text()) == {"rate": 0.2}


def test_a_kill_while_a_folder_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back to the old options must not find the emptied folder done."""
    start(tmp_path, stage(tmp_path, "a"))

    def killed(path: Path) -> None:
        (path / "work.txt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cascade.driver.shutil.rmtree", killed)
        start(tmp_path, stage(tmp_path, "a", mode="brief"))
    assert calls(tmp_path) == ["a"]
    start(tmp_path, stage(tmp_path, "a"))
    assert calls(tmp_path) == ["a"]


def test_a_failed_stage_goes_on(tmp_path: Path) -> None:
    stages = [
        stage(tmp_path, "a"),
        stage(tmp_path, "b", "a", mode="fail"),
        stage(tmp_path, "c", "b"),
    ]
    with pytest.raises(UserError) as error:
        start(tmp_path, *stages)
    assert str(error.value) == (
        "stage b ended with code 3. Start the same command again to go on from there"
    )
    assert calls(tmp_path) == ["a", "b"]
    (tmp_path / "mended").touch()
    start(tmp_path, *stages)
    assert calls(tmp_path) == ["b", "c"]
    assert (tmp_path / "b" / "work.txt").read_text() == "part\npart\n"  # not begun anew


def test_a_background_stage(tmp_path: Path) -> None:
    """It runs beside the next one, is waited for by what needs it, and its failure is told."""
    beside = [
        stage(tmp_path, "eval", background=True, mode="brief"),
        stage(tmp_path, "b"),
        stage(tmp_path, "report", "eval"),
    ]
    start(tmp_path, *beside, can_overlap=True)
    assert sorted(calls(tmp_path)[:2]) == ["b", "eval"]
    assert (tmp_path / "logs" / "eval.log").is_file()
    entries = Manifest(tmp_path / "manifest.json", 0, "test").data["stages"]
    assert [entry["done"] for entry in entries] == [True] * 3

    failing = [stage(tmp_path, "eval2", background=True, mode="fail"), stage(tmp_path, "b")]
    with pytest.raises(
        UserError, match=r"stage eval2 ended with code 3; its output is in .*/eval2"
    ):
        start(tmp_path, *failing, can_overlap=True)


def test_the_run_of_another_seed_is_refused(tmp_path: Path) -> None:
    start(tmp_path, stage(tmp_path, "a"))
    with pytest.raises(UserError) as error:
        start(tmp_path, stage(tmp_path, "a"), seed=1)
    assert str(error.value) == (
        f"{tmp_path} holds a run of recipe 'test' with seed 0; choose another --output, or "
        "remove the folder"
    )
    assert calls(tmp_path) == ["a"]


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_cascade import stage, start
run = Path(sys.argv[2])
start(run, stage(run, "a"), stage(run, "b", "a", mode="sleep"), stage(run, "c", "b"))
"""


def driver(run: Path) -> subprocess.Popen[bytes]:
    """A driver in a process group of its own, whose second stage sleeps the first time."""
    tests = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, tests, str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (run / "b" / "work.txt").exists():
        assert process.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def kill_all(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill a driver with all that it started, and wait until they are gone: the lock is free."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while True:
        try:
            with run_lock(run):
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_killed_driver_goes_on(tmp_path: Path) -> None:
    process = driver(tmp_path)
    kill_all(tmp_path, process)
    assert calls(tmp_path) == ["a", "b"]
    stages = [
        stage(tmp_path, "a"),
        stage(tmp_path, "b", "a", mode="sleep"),
        stage(tmp_path, "c", "b"),
    ]
    start(tmp_path, *stages)
    assert calls(tmp_path) == ["b", "c"]
    assert (tmp_path / "b" / "work.txt").read_text() == "part\npart\n"


def test_a_stage_that_outlives_its_driver_is_not_started_twice(tmp_path: Path) -> None:
    process = driver(tmp_path)
    process.kill()  # the driver alone
    process.wait()
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", "a", mode="sleep")]
    with pytest.raises(UserError) as error:
        start(tmp_path, *stages)
    assert str(error.value) == (
        f"{tmp_path}: another process of this run is alive; wait for it, or end it first"
    )
    kill_all(tmp_path, process)
    start(tmp_path, *stages)
    assert calls(tmp_path) == ["a", "b", "b"]


# ---- recipes ----


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes_name_real_options(preset: str, tmp_path: Path) -> None:
    """Every configuration and command is parsed by what will read it in the run."""
    from training.cli import ModelArguments, parse_config

    processes = plan(demo_recipe(preset), tmp_path, 3, extra=("control",))
    stages = {item.name: item for item in processes}
    assert [name for name, item in stages.items() if item.config] == [
        "sft-careful",
        "sft",
        "mpo",
        "control",
        "rl",
    ]
    budgets = {}
    for item in stages.values():
        assert all(need in stages for need in item.needs)
        if item.config is None:
            _, tool, *words = item.command
            parsed = importlib.import_module(f"{tool}.cli").build_parser().parse_args(words)
            if "max_tiles" in parsed:
                budgets[item.name] = parsed.max_tiles
            continue
        assert item.config_file is not None
        item.config_file.parent.mkdir(parents=True, exist_ok=True)
        item.config_file.write_text(yaml.safe_dump(item.config))
        words = item.command[item.command.index("--config") :]
        assert words == ["--config", str(item.config_file)]
        module = item.command[item.command.index("--config") - 1]
        name = {"sft": "SFTConfig", "mpo": "MPOConfig", "rl": "RLConfig"}[module]
        kind = vars(importlib.import_module(f"{module}.config"))[name]
        args, model = parse_config([kind, ModelArguments], module, words)
        assert (args.seed, args.output_dir) == (3, str(item.folder))
        assert Path(model.model_name_or_path).is_relative_to(tmp_path)
        budgets[item.name] = args.max_tiles
    # a wide chart is cut alike by all that look at it
    looking = [name for name in stages if name.startswith("evaluate.") or name.endswith(".sample")]
    trained = ["sft-careful", "sft", "mpo", "control", "rl"]
    assert budgets == dict.fromkeys([*looking, *trained], 2)
