"""Gates, kills, seeds and arms of `cascade run`, on stages that cost nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from play_runs import ALL, DRIVER, RECIPE, Play, changed, ended, play

from cascade.ablation import run_of_arm
from cascade.ablation_page import draw_plot, make_table
from cascade.driver import run_lock
from cascade.gates import GateError, check_gate
from cascade.manifest import Manifest
from cascade.recipe import Gate, Recipe, load_recipe
from cascade.run import RunOptions, _tell

__all__ = ["play"]  # a fixture

# ---- gates ----

GATED = {**RECIPE, "gate": {"metric": "sampled", "max_drop": 0.05}}


def test_a_gate_stops_the_run(
    play: Play, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play.told(accuracy={"sft": 0.5, "mpo": 0.4, "rl": 0.37})
    said = ended(3, lambda: play.run(recipe=GATED), capsys)
    assert said == (
        "error: gate of stage mpo: sampled fell from 0.5000 [0.4608, 0.5392] (sft) to 0.4000 "
        "[0.3608, 0.4392], by 0.1000; max_drop is 0.05. Nothing is lost: mend the recipe and start "
        "again, or go on anyway with --no-gate (or gate: false in stages.mpo)\n"
    )
    assert play.calls() == ALL[:7]
    monkeypatch.setattr("cascade.run._tell", _tell)
    ended(3, play.run, capsys)  # it is still closed
    summary = json.loads((play.folder / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "mpo"]
    page = (play.folder / "report.html").read_text()
    assert "closed" in page and "0.37" not in page
    monkeypatch.setattr("cascade.run._tell", lambda *_: None)
    assert play.calls() == []
    play.run("--no-gate")
    assert play.calls() == ["rl", "evaluate.rl"]  # 0.37 is borne after 0.4
    stages = {**GATED["stages"], "mpo": {**GATED["stages"]["mpo"], "gate": False}}
    play.run(recipe={**GATED, "stages": stages})
    assert play.calls() == []


def test_a_gate_that_closes_beside_the_next_stage(
    play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage that runs meanwhile is ended, with what it started, and goes on later."""
    play.told(accuracy={"sft": 0.5, "mpo": 0.4}, seconds={"rl": 300}, waits={"evaluate.mpo": "rl"})
    start = time.monotonic()
    ended(3, lambda: play.run("--overlap=on", recipe=GATED), capsys)
    assert time.monotonic() - start < 200
    assert sorted(play.calls()[-2:]) == ["evaluate.mpo", "rl"]
    rl = play.records()["rl"]
    assert (rl["done"], rl["starts"], rl["timed"]) == (False, 1, 1)
    assert (play.folder / "logs" / "evaluate.mpo.log").exists()
    with run_lock(play.folder):
        pass  # nothing of it is alive
    play.told(accuracy={"sft": 0.5, "mpo": 0.4})
    play.run("--no-gate")
    assert play.calls() == ["rl", "evaluate.rl"]
    assert play.records()["rl"]["starts"] == 2


def test_a_gate_waits_for_the_evaluation_that_it_compares_with(play: Play) -> None:
    """The last evaluation is not in the background; the one before it may be slower."""
    play.told(seconds={"evaluate.mpo": 2})
    play.run("--overlap=on", recipe=GATED)
    calls = play.calls()
    # of two that run beside each other either may be the first to write
    assert {*calls[1:3]} == {"evaluate.sft", "pairs.sample"}
    assert {*calls[6:8]} == {"evaluate.mpo", "rl"}
    assert sorted(calls, key=ALL.index) == ALL
    assert [calls[n] for n in (0, 3, 4, 5, 8)] == [ALL[n] for n in (0, 3, 4, 5, 8)]
    # the gate of a stage that is done, against one that is evaluated anew
    stages = {**GATED["stages"], "rl": {**GATED["stages"]["rl"], "gate": {"against": "sft"}}}
    sft = {**stages["sft"], "evaluate": {"samples": 9}}
    play.told(seconds={"evaluate.sft": 2})
    play.run("--overlap=on", recipe={**GATED, "stages": {**stages, "sft": sft}})
    assert play.calls() == ["evaluate.sft"]


def test_a_gate_between_evaluations_that_differ(tmp_path: Path) -> None:
    """It closes all the same; there is no interval of the fall."""
    for stage, sampled, samples in (("sft", 0.5, 2), ("mpo", 0.4, 8)):
        folder = tmp_path / "eval" / stage
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"sampled": sampled}))
        (folder / "settings.json").write_text(json.dumps({"samples": samples}))
        (folder / "predictions.jsonl").write_text("")
    with pytest.raises(
        GateError, match=r"by 0\.1000 \(.* other settings: samples 2 and 8\..*0\.05"
    ):
        check_gate(tmp_path, "mpo", Gate("sampled", 0.05, "sft"))


def test_a_fall_of_exactly_max_drop_is_borne(tmp_path: Path) -> None:
    """0.5 - 0.48 is 0.020000000000000018."""
    for stage, sampled in (("sft", 0.5), ("mpo", 0.48)):
        folder = tmp_path / "eval" / stage
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"sampled": sampled}))
    check_gate(tmp_path, "mpo", Gate("sampled", 0.02, "sft"))
    with pytest.raises(GateError, match=r"by 0\.0200; max_drop is 0\.0199"):
        check_gate(tmp_path, "mpo", Gate("sampled", 0.0199, "sft"))


def test_a_metric_that_is_none(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    said = ended(2, lambda: play.run(recipe={**GATED, "gate": {"metric": "pass@2"}}), capsys)
    assert "metrics.json has no number 'pass@2'; there are: greedy, greedy_se, sampled," in said


# ---- kills ----


def test_a_driver_that_is_ended_ends_its_stages(play: Play) -> None:
    """SIGTERM (a scheduler's) reaches what the driver started; SIGKILL leaves it to end alone."""
    play.told(seconds={"pairs.verify": 60})
    tests = str(Path(__file__).parent)
    words = [sys.executable, "-c", DRIVER, tests, str(play.root)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    calls = play.root / "calls.txt"
    while not calls.exists() or "pairs.verify" not in calls.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    with run_lock(play.folder):
        pass
    assert play.calls()[-1] == "pairs.verify"
    assert play.records()["pairs.verify"]["done"] is False
    play.told()
    play.run()
    assert play.calls() == ALL[3:]


# ---- seeds and arms ----

ARMS = {
    **RECIPE,
    "seeds": [4, 7],
    "parallel": 2,
    "arms": {"start": "sft", "mpo": "mpo", "cascade": "rl"},
    "start_seconds": {"mpo": 0.2},
}


def test_seeds_and_arms(
    play: Play, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run a seed; one that fails is told and counted, and the same command mends it."""
    play.told(
        accuracy={"sft": 0.3, "mpo": 0.4, "rl": 0.6}, fails=["rl"], burn={"sft": 0.3, "mpo": 0.5}
    )
    code = DRIVER.replace(
        "t.Play(root).run()", "from cascade.cli import main\nmain(['run', *sys.argv[4:]])"
    )

    def command(recipe: Recipe, folder: Path, seed: int, _: Any) -> list[str]:
        tests = str(Path(__file__).parent)
        words = [str(recipe.file), f"--seed={seed}", f"--output={folder}"]
        return ["-c", code, tests, str(play.root), "run", *words]

    monkeypatch.setattr("cascade.seeds.seed_command", command)
    said = ended(2, lambda: play.run(recipe=ARMS), capsys)
    assert f"seed 4, 7 of {play.folder} failed; start the same command again" in said
    found = json.loads((play.folder / "ablation.json").read_text())
    assert found["compute_from"] == "sft"
    runs = {(run["arm"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == 6
    assert runs["cascade", 7] == {
        "arm": "cascade",
        "stage": "rl",
        "seed": 7,
        "error": "stage rl ended with code 2. Start the same command again to go on from there "
        "(code 2)",
    }
    assert runs["start", 4]["compute_seconds"] == 0
    mpo = runs["mpo", 4]
    assert (mpo["accuracy"], mpo["se"], mpo["n"]) == (0.4, 0.02, 100)
    assert (mpo["right_chain"], mpo["counts"]) == (0.2, {"careless": 0.25})
    assert mpo["starts"] == 4  # sample, verify, pair and train; the evaluation is left out
    assert 0.5 <= mpo["compute_seconds_raw"] < 5
    assert mpo["compute_seconds"] == pytest.approx(mpo["compute_seconds_raw"] - 0.2)
    assert "- cascade, seed 7: stage rl ended" in (play.folder / "ablation.md").read_text()

    play.calls()
    play.told(accuracy={"sft": 0.3, "mpo": 0.4, "rl": 0.6})
    play.run()
    assert sorted(play.calls()) == ["evaluate.rl", "evaluate.rl", "rl", "rl"]
    shown = capsys.readouterr().out.splitlines()
    for seed in (4, 7):  # here, too, it can be seen where each run is
        mark = f"seed {seed}: "
        lines = [line for line in shown if line.startswith(mark)]
        assert [line.removeprefix(mark) for line in lines] == [
            *(f"{name}: done before" for name in ALL[:-2]), "rl", "evaluate.rl"
        ]  # fmt: skip
    found = json.loads((play.folder / "ablation.json").read_text())
    assert [run["accuracy"] for run in found["runs"] if run["arm"] == "cascade"] == [0.6, 0.6]
    assert (play.folder / "seed-7" / "run.log").exists()


def test_an_arm_of_before_a_change_is_no_result(
    play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that was changed, and run to its first stage: the last arm's numbers are the old."""
    play.write({**ARMS, "parallel": 1})
    words = ("--seed=4", f"--output={play.folder}/seed-4")
    play.run(*words)
    recipe = load_recipe(play.root / "r.yaml")
    assert run_of_arm(recipe, play.folder, "cascade", 4, None)["accuracy"] == 0.5
    stages = changed(sft={"learning_rate": 0.2})["stages"]
    play.run(*words, "--only=sft", recipe={**ARMS, "stages": stages})
    recipe = load_recipe(play.root / "r.yaml")
    assert run_of_arm(recipe, play.folder, "start", 4, None)["accuracy"] == 0.5
    assert run_of_arm(recipe, play.folder, "cascade", 4, None) == {
        "arm": "cascade",
        "stage": "rl",
        "seed": 4,
        "error": "stage rl has not been evaluated since what it needs ran anew",
    }
    folder = play.folder / "seed-4"
    capsys.readouterr()
    _tell(recipe, folder, Manifest(folder / "manifest.json", 4, "r"), RunOptions())
    assert "no report (not evaluated: mpo, rl)" in capsys.readouterr().out


def test_what_ended_a_seed(
    play: Play, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates alone: exit code 3; what is told is this start's, whatever an earlier one wrote."""
    codes = ["print('error: a gate'); raise SystemExit(3)", "raise SystemExit(9)"]
    monkeypatch.setattr("cascade.seeds.seed_command", lambda *_: ["-c", codes[0]])
    recipe = {**RECIPE, "seeds": [4, 7]}
    said = ended(3, lambda: play.run(recipe=recipe), capsys)
    assert said.splitlines()[:2] == [f"seed {seed} failed: a gate (code 3)" for seed in (4, 7)]
    monkeypatch.setattr("cascade.seeds.seed_command", lambda *_: ["-c", codes[1]])
    said = ended(2, play.run, capsys)
    assert said.splitlines()[0] == "seed 4 failed: it said nothing (code 9)"


def runs_of(**arms: list[float]) -> dict[str, Any]:
    """What ablation.json holds of these accuracies."""
    runs = [
        {"arm": arm, "seed": seed, "accuracy": one, "greedy": one, "right_chain": one / 2,
         "compute_seconds": 10.0 * seed, "counts": {}}
        for arm, values in arms.items()
        for seed, one in enumerate(values)
    ]  # fmt: skip
    return {"compute_from": "sft", "runs": runs}


def test_the_table_and_the_plot() -> None:
    found = runs_of(gspo=[0.5, 0.6, 0.7], cascade=[0.6, 0.6, 0.9])
    found["runs"].append({"arm": "gspo", "seed": 9, "error": "out | of memory"})
    table = make_table(found).splitlines()
    assert table[2] == (
        "| gspo | 3 (1 failed) | 60.0 [35.2, 84.8] | 60.0 [35.2, 84.8] | 30.0 [17.6, 42.4] | "
        "10 (0 to 20) |"
    )
    assert table[9].startswith("| cascade - gspo | +10.0 [-14.8, +34.8], above in 2 of 3 | +5.0 ")
    assert table[-1] == "- gspo, seed 9: out | of memory"
    plot = draw_plot(found)
    assert plot == draw_plot(found)
    assert plot.count(">60.0</text>") == 1
    assert "prefers-color-scheme: dark" in plot
    assert "#01fe2" not in plot
