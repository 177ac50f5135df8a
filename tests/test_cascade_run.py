"""`cascade run` on stages that cost nothing: what runs again and what not, and its record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from play_runs import ALL, RECIPE, Play, changed, ended, play, played

import cascade.run
from cascade.check_options import Checked, _examine
from cascade.cli import main
from cascade.driver import Driver
from cascade.inputs import digest_input
from cascade.manifest import Manifest
from cascade.stages import Choice, Stage
from internvl.errors import UserError

__all__ = ["play"]  # a fixture

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
    shutil.rmtree(play.folder / "stages" / "mpo")
    play.run()
    assert play.calls() == ["mpo"]


def test_a_run_goes_on_from_another_folder(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of images count by their way from the recipe, inside it or not."""
    (play.root / "here").mkdir()
    images = play.root / "images"
    stages = {**RECIPE["stages"], "pairs": {**RECIPE["stages"]["pairs"], "image-root": "images"}}
    play.write({**RECIPE, "stages": stages})
    images.mkdir()

    def run(folder: Path, file: str, *words: str) -> list[str]:
        monkeypatch.chdir(folder)
        main(["run", file, f"--output={play.folder}", *words])
        return play.calls()

    assert run(play.root, "r.yaml") == ALL
    assert run(play.root / "here", "../r.yaml") == []
    assert run(play.root / "here", f"{play.root}/r.yaml") == []
    stages["pairs"] = {**stages["pairs"], "image-root": "here"}
    play.write({**RECIPE, "stages": stages})
    assert run(play.root, "r.yaml") == ALL[2:]


def test_a_folder_of_others_is_not_emptied(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    mine = play.folder / "stages" / "mpo" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    said = ended(2, play.run, capsys)
    assert said == (
        f"error: {mine.parent} is there, {play.folder}/manifest.json does not know it, and mpo "
        "would empty it; move it away, or choose another --output\n"
    )
    assert mine.exists()
    assert play.calls() == []
    mine.unlink()
    play.run()
    assert play.calls() == ALL


def test_the_manifest_is_read_under_the_lock(
    play: Play, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another driver wrote until then is known."""

    choice = cascade.run._choice

    def late(*asked: Any) -> Choice:
        monkeypatch.setattr("cascade.run._choice", choice)
        play.run()
        return choice(*asked)

    monkeypatch.setattr("cascade.run._choice", late)
    play.run()
    assert play.calls() == ALL
    (play.folder / "manifest.json").write_text("{")
    said = ended(2, play.run, capsys)
    assert said.startswith(f"error: {play.folder}/manifest.json cannot be read: Expecting ")


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


def test_the_launcher_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.check_options._parse_config", lambda *_: {})
    file = tmp_path / "launch.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_procs: 2\n")

    def said(*words: str) -> str | None:
        command = ["accelerate.commands.launch", *words, "-m", "mpo", "--config", "m.yaml"]
        return _examine({"kind": "mpo", "config": "m.yaml", "words": command})[0]

    assert said("--quiet", "--num_processes", "2") is None
    assert said("--num_procs", "2") == "unrecognized arguments: --num_procs"
    told = said("--config_file", str(file))
    assert told is not None
    assert told.startswith(f"launch.config_file {file}: ")
    assert "unknown keys (['num_procs'])" in told


def test_an_evaluation_s_options_are_asked_too() -> None:
    words = ["cascade", "evaluate", "q.jsonl", "--model", "m", "--output", "o"]
    for more, told in {
        "--samples=0": "--samples is 0; give 1 or more",
        "--temperature=0": "--temperature is 0; the greedy answers are reported in any case, and "
        "the samples need a temperature above 0",
        "--count=careless": "--count 'careless': expected NAME=TEXT",
        "--count=sampled=x": "--count 'sampled=x': sampled is a metric's name; choose another one",
        "--count=n=x": "--count 'n=x': n is a metric's name; choose another one",
        "--seed=-1": "--seed is -1; give 0 or more",
    }.items():
        assert _examine({"kind": "evaluate", "words": [*words, more]}) == (told, {})
    assert _examine({"kind": "evaluate", "words": words}) == (None, {})


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


def test_what_an_input_stands_on(tmp_path: Path) -> None:
    """An adapter is its base, too; accelerate's configuration is DeepSpeed's."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_text("x")
    first = digest_input(adapter)
    (base / "config.json").write_text('{"hidden_size": 2}')
    assert digest_input(adapter) != first
    deepspeed, launch = tmp_path / "zero.json", tmp_path / "accelerate.yaml"
    deepspeed.write_text("{}")
    launch.write_text(f"deepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n")
    first = digest_input(launch)
    deepspeed.write_text('{"zero_optimization": {"stage": 3}}')
    assert digest_input(launch) != first


def test_the_run_of_another_recipe_is_refused(play: Play) -> None:
    Manifest(play.folder / "manifest.json", 0, "other").write()
    with pytest.raises(UserError, match=r"holds a run of recipe 'other' with seed 0; choose anoth"):
        Manifest(play.folder / "manifest.json", 0, "r")
    (play.folder / "manifest.json").write_text('{"seed": 0, "preset": "r", "stages": []}')
    with pytest.raises(UserError, match=r"holds the run of another version of cascade; choose"):
        Manifest(play.folder / "manifest.json", 0, "r")
