"""`cascade run` on stages that cost nothing: what runs again, gates, kills, seeds and arms.

The stages of a recipe are played by a few lines of Python each; the driver, the manifest, the
recipe and the gates are the real ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.ablation_page import draw_plot, make_table
from cascade.check_options import Checked
from cascade.cli import main
from cascade.driver import Driver, run_lock
from cascade.inputs import digest_input
from cascade.manifest import Manifest
from cascade.plan import plan
from cascade.recipe import Recipe
from cascade.stages import Stage
from internvl.errors import UserError

# plays any command: notes its name, writes what the next ones look for; the accuracy of an
# evaluation, and who fails, stand in the file `play.json`
PLAY = """
import json, os, sys, time
from pathlib import Path
name, folder, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
play = json.loads((root / "play.json").read_text())
with (root / "calls.txt").open("a") as calls:
    calls.write(name + "\\n")
time.sleep(play.get("seconds", {}).get(name, 0))
if name in play.get("burn", {}):
    until = time.process_time() + play["burn"][name]
    while time.process_time() < until:
        pass
if name in play.get("fails", []):
    print("error: it was told to fail")
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.txt").write_text(name)
if name.startswith("evaluate."):
    sampled = play.get("accuracy", {}).get(name[9:], 0.5)
    metrics = {"name": name[9:], "model": "m", "n": 100, "k": 2, "greedy": sampled,
               "greedy_se": 0.01, "sampled": sampled, "sampled_se": 0.02, "format": 1.0,
               "mean_tokens": 9.0, "chain_correct": sampled / 2, "careless": 0.25}
    (folder / "metrics.json").write_text(json.dumps(metrics))
"""
RECIPE: dict[str, Any] = {
    "overlap": False,
    "evaluate": {"questions": "heldout.jsonl", "count": {"careless": "clear"}},
    "stages": {
        "sft": {"kind": "sft", "model": "base", "train_file": "sft.jsonl", "learning_rate": 0.1},
        "pairs": {"kind": "pairs", "model": "sft", "questions": "q.jsonl"},
        "mpo": {"kind": "mpo", "model": "sft", "data": "pairs"},
        "rl": {"kind": "rl", "model": "mpo", "train_file": "q.jsonl"},
    },
}
ALL = ["sft", "evaluate.sft", "pairs.sample", "pairs.verify", "pairs", "mpo", "evaluate.mpo"]
ALL += ["rl", "evaluate.rl"]


@dataclasses.dataclass
class Play:
    """A folder with a recipe and its inputs, where `cascade run` plays."""

    root: Path

    def run(self, *words: str, recipe: dict[str, Any] | None = None) -> None:
        """`cascade run r.yaml`."""
        if recipe is not None:
            self.write(recipe)
        main(["run", str(self.root / "r.yaml"), f"--output={self.folder}", *words])

    def write(self, recipe: dict[str, Any]) -> None:
        (self.root / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def told(self, **play: Any) -> None:
        """How the stages are to play."""
        (self.root / "play.json").write_text(json.dumps(play))

    @property
    def folder(self) -> Path:
        return self.root / "run"

    def calls(self) -> list[str]:
        """The processes that ran since the last look."""
        file = self.root / "calls.txt"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    def records(self) -> dict[str, Any]:
        data = json.loads((self.folder / "manifest.json").read_text())
        return {record["name"]: record for record in data["stages"]}


def played(root: Path) -> Callable[..., list[Stage]]:
    """`plan`, each of its commands replaced by PLAY; a background stage keeps its place."""

    def stub(recipe: Recipe, run: Path, seed: int, **more: Any) -> list[Stage]:
        return [
            dataclasses.replace(
                stage,
                command=["-c", PLAY, stage.name, str(stage.folder), str(root), *stage.command],
            )
            for stage in plan(recipe, run, seed, **more)
        ]

    return stub


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    for name in ("sft", "q", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "1"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    monkeypatch.setattr("cascade.run.plan", played(tmp_path))
    monkeypatch.setattr("cascade.run.check_options", lambda *_: Checked((), {}))
    monkeypatch.setattr("cascade.run._tell", lambda *_: None)
    out = Play(tmp_path)
    out.told()
    out.write(RECIPE)
    return out


def changed(**stages: dict[str, Any]) -> dict[str, Any]:
    """The recipe with some of its stages' options replaced."""
    entries = {n: {**e, **stages.get(n, {})} for n, e in RECIPE["stages"].items()}
    return {**RECIPE, "stages": entries}


def ended(code: int, call: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says when it ends with this code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call()
    assert exit_.value.code == code
    return capsys.readouterr().err


# ---- what runs again ----


def test_only_what_a_change_reaches_runs_again(play: Play) -> None:
    play.run()
    assert play.calls() == ALL
    play.run()
    assert play.calls() == []
    # an option, and all that stands on it
    play.run(recipe=changed(mpo={"beta": 0.2}))
    assert play.calls() == ["mpo", "evaluate.mpo", "rl", "evaluate.rl"]
    # the evaluation's alone
    play.run(recipe=changed(mpo={"beta": 0.2, "evaluate": {"samples": 9}}))
    assert play.calls() == ["evaluate.mpo"]
    # pairs are made anew of the same verdicts
    play.run(recipe=changed(pairs={"pair": {"max-pairs-per-question": 1}}))
    assert play.calls()[:3] == ["pairs", "mpo", "evaluate.mpo"]
    assert (play.folder / "stages" / "pairs" / "result.txt").exists()


def test_inputs_count_by_their_content(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play.run()
    play.calls()
    os.utime(play.root / "sft.jsonl", (1, 1))
    play.run()
    assert play.calls() == []
    (play.root / "q.jsonl").write_text('{"id": "2"}\n')
    play.run()
    assert play.calls() == ALL[2:]
    (play.root / "base" / "model.safetensors").write_text("others")
    play.run()
    assert play.calls() == ALL
    records = play.records()
    assert records["sft"]["inputs"].keys() == {
        str(play.root / "base"),
        str(play.root / "sft.jsonl"),
    }
    # a run that was moved, with its inputs, is the same run
    moved = play.root.with_name("moved")
    play.root.rename(moved)
    monkeypatch.setattr("cascade.run.plan", played(play.root))  # the stub's own path is no part
    there = Play(moved)
    for record in json.loads((there.folder / "manifest.json").read_text())["stages"]:
        assert record["done"]
    there.run("--dry-run")
    assert there.calls() == []


def test_a_lost_folder_is_made_again(play: Play) -> None:
    play.run()
    play.calls()
    import shutil

    shutil.rmtree(play.folder / "stages" / "mpo")
    play.run()
    assert play.calls() == ["mpo"]


def test_from(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage and what needs it; killed on the way, the same command goes on."""
    said = ended(2, lambda: play.run("--from=mpo"), capsys)
    assert said == "error: mpo needs pairs, which has not been run to its end\n"
    play.run()
    play.calls()
    play.run("--from=mpo")
    assert play.calls() == ["mpo", "evaluate.mpo", "rl", "evaluate.rl"]
    # an earlier change is not looked at now, and found by the next start
    play.run("--from=mpo", recipe=changed(sft={"learning_rate": 0.2}))
    assert play.calls() == ["mpo", "evaluate.mpo", "rl", "evaluate.rl"]
    play.told(fails=["rl"])
    ended(2, lambda: play.run("--from=mpo"), capsys)
    assert play.calls() == ["mpo", "evaluate.mpo", "rl"]
    play.told()
    play.run("--from=mpo")
    assert play.calls() == ["rl", "evaluate.rl"]
    play.run()
    assert play.calls() == ALL
    said = ended(2, lambda: play.run("--from=nothing"), capsys)
    assert "--from nothing: no stage of the recipe; there are: sft, pairs, mpo, rl" in said


def test_only(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    play.run("--only=sft")
    assert play.calls() == ["sft", "evaluate.sft"]
    said = ended(2, lambda: play.run("--only=mpo"), capsys)
    assert said == "error: mpo needs pairs, which has not been run to its end\n"
    play.run("--only=pairs")
    assert play.calls() == ["pairs.sample", "pairs.verify", "pairs"]
    play.run("--only=mpo")
    assert play.calls() == ["mpo", "evaluate.mpo"]
    play.run("--only=mpo")
    assert play.calls() == []
    said = ended(2, lambda: play.run("--only=mpo", "--from=mpo"), capsys)
    assert "--only and --from are both given; give one of the two" in said


def test_dry_run(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells why, writes nothing, and is a script that does the same."""
    play.run("--only=sft")
    play.calls()
    before = (play.folder / "manifest.json").read_bytes()
    capsys.readouterr()
    play.run("--dry-run", recipe=changed(sft={"learning_rate": 0.2, "max_steps": 7}))
    said = capsys.readouterr().out
    why = "# sft: start: learning_rate was 0.1, is 0.2; max_steps was 'not given', is 7\n"
    assert why in said
    assert "# evaluate.sft: start: sft runs anew\n" in said
    assert f"rm -rf {play.folder}/stages/sft\n" in said
    play.write(RECIPE)
    (play.root / "heldout.jsonl").write_text("{}\n")
    play.run("--dry-run")
    said = capsys.readouterr().out
    assert "# sft: skip: done before (" in said
    assert f"# evaluate.sft: start: {play.root}/heldout.jsonl has changed\n" in said
    assert "# rl: start: has not been run\n" in said
    assert play.calls() == []
    assert (play.folder / "manifest.json").read_bytes() == before
    done = subprocess.run(["sh"], input=said, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert play.calls() == ALL[1:]
    config = yaml.safe_load((play.folder / "configs" / "mpo.yaml").read_text())
    assert config["train_file"] == str(play.folder / "stages" / "pairs" / "meta.json")


def test_what_is_wrong_is_told_before_anything_starts(
    play: Play, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (play.root / "q.jsonl").unlink()
    wrong = changed(sft={"model": "bsae"})
    said = ended(2, lambda: play.run(recipe=wrong), capsys)
    assert said.splitlines() == [
        f"error: {play.root}/r.yaml: stages.sft.model: {play.root}/bsae is not there",
        f"error: {play.root}/r.yaml: stages.pairs.questions: {play.root}/q.jsonl is not there",
        f"error: {play.root}/r.yaml: stages.rl.train_file: {play.root}/q.jsonl is not there",
    ]
    (play.root / "q.jsonl").touch()
    asked = []

    def faults(stages: Sequence[Stage], *_: Any) -> Checked:
        asked.append([stage.name for stage in stages])
        return Checked((("mpo", "unknown key 'betta'; did you mean 'beta'?"),), {})

    monkeypatch.setattr("cascade.run.check_options", faults)
    said = ended(2, lambda: play.run(recipe=RECIPE), capsys)
    assert said == (
        f"error: {play.root}/r.yaml: stages.mpo: unknown key 'betta'; did you mean 'beta'?\n"
    )
    assert asked == [ALL]
    assert play.calls() == []


def test_options_are_asked_once(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    none = Checked((), {})
    monkeypatch.setattr("cascade.run.check_options", lambda *_: asked.append(1) or none)
    play.run("--only=sft")
    play.run("--only=pairs")
    assert len(asked) == 1
    play.run("--only=sft", recipe=changed(rl={"max_steps": 3}))
    assert len(asked) == 2


def test_the_manifest(play: Play) -> None:
    play.told(burn={"mpo": 0.3})
    play.run()
    data = json.loads((play.folder / "manifest.json").read_text())
    assert (data["recipe"], data["seed"]) == ("r", 0)
    assert {"python", "torch", "transformers", "internvl-posttraining"} <= data["versions"].keys()
    assert "revision" in data
    assert (play.folder / "recipe.yaml").read_text() == (play.root / "r.yaml").read_text()
    mpo = play.records()["mpo"]
    assert 0.3 <= mpo["cpu_seconds"] < 3
    assert (mpo["stage"], mpo["kind"], mpo["starts"], mpo["timed"]) == ("mpo", "mpo", 1, 1)
    assert mpo["needs"].keys() == {"pairs", "sft"}
    assert mpo["config"]["train_file"].endswith("stages/pairs/meta.json")


def test_children_count_in_a_process_time(tmp_path: Path) -> None:
    """A launcher's time is its child's: what was waited for below it is counted."""
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    stage = Stage("a", ["-c", code], tmp_path / "a")
    manifest = Manifest(tmp_path / "manifest.json", 0, "test")
    Driver(manifest, can_overlap=False).run_stages([stage])
    record = manifest.entry("a")
    assert record is not None
    assert record["cpu_seconds"] >= 0.4


# ---- gates ----

GATED = {**RECIPE, "gate": {"metric": "sampled", "max_drop": 0.05}}


def test_a_gate_stops_the_run(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    play.told(accuracy={"sft": 0.5, "mpo": 0.4, "rl": 0.37})
    said = ended(3, lambda: play.run(recipe=GATED), capsys)
    assert said == (
        "error: gate of stage mpo: sampled fell from 0.5000 [0.4608, 0.5392] (sft) to 0.4000 "
        "[0.3608, 0.4392], by 0.1000; max_drop is 0.05. Nothing is lost: mend the recipe and start "
        "again, or go on anyway with --no-gate (or gate: false in stages.mpo)\n"
    )
    assert play.calls() == ALL[:7]
    ended(3, play.run, capsys)  # it is still closed
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
    play.told(accuracy={"sft": 0.5, "mpo": 0.4}, seconds={"rl": 60})
    start = time.monotonic()
    ended(3, lambda: play.run("--overlap=on", recipe=GATED), capsys)
    assert time.monotonic() - start < 30
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


def test_a_metric_that_is_none(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    said = ended(2, lambda: play.run(recipe={**GATED, "gate": {"metric": "gredy"}}), capsys)
    assert "metrics.json has no number 'gredy'; there are: greedy, greedy_se, sampled," in said


# ---- kills ----

DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_cascade_run as t
import cascade.run
root = Path(sys.argv[2])
cascade.run.plan = t.played(root)
cascade.run.check_options = lambda *_: t.Checked((), {})
cascade.run._tell = lambda *_: None
t.Play(root).run()
"""


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
    found = json.loads((play.folder / "ablation.json").read_text())
    assert [run["accuracy"] for run in found["runs"] if run["arm"] == "cascade"] == [0.6, 0.6]
    assert (play.folder / "seed-7" / "run.log").exists()


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


# ---- inputs ----


def test_what_an_input_is(tmp_path: Path) -> None:
    """A meta.json is its annotation files, too; a checkpoint is not the log of its training."""
    (tmp_path / "a.jsonl").write_text("1\n")
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a": {"root": "", "annotation": "a.jsonl"}}))
    first = digest_input(meta)
    (tmp_path / "a.jsonl").write_text("2\n")
    assert digest_input(meta) != first
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        (folder / name).write_text(name)
    first = digest_input(folder)
    (folder / "trainer_state.json").write_text("more")
    (folder / "checkpoint-4").mkdir()
    assert digest_input(folder) == first
    (folder / "model.safetensors").write_text("more")
    assert digest_input(folder) != first
    tables = [tmp_path / "t-0.parquet", tmp_path / "t-1.parquet"]
    tables[0].write_text("x")
    first = digest_input(tmp_path / "t-*.parquet")
    tables[1].write_text("y")
    assert digest_input(tmp_path / "t-*.parquet") != first


def test_the_run_of_another_recipe_is_refused(play: Play) -> None:
    Manifest(play.folder / "manifest.json", 0, "other").write()
    with pytest.raises(UserError, match=r"holds a run of recipe 'other' with seed 0; choose anoth"):
        Manifest(play.folder / "manifest.json", 0, "r")
    (play.folder / "manifest.json").write_text('{"seed": 0, "preset": "r", "stages": []}')
    with pytest.raises(UserError, match=r"holds the run of another version of cascade; choose"):
        Manifest(play.folder / "manifest.json", 0, "r")
