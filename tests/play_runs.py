"""`cascade run` on stages that cost nothing: a few lines of Python play each of them.

The driver, the manifest, the recipe and the gates are the real ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.check_options import Checked
from cascade.cli import main
from cascade.plan import plan
from cascade.recipe import Recipe
from cascade.stages import Stage

# plays any command: notes its name, writes what the next ones look for; the accuracy of an
# evaluation, and who fails, stand in the file `play.json`
PLAY = """
import json, os, sys, time
from pathlib import Path
name, folder, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
play = json.loads((root / "play.json").read_text())
with (root / "calls.txt").open("a") as calls:
    calls.write(name + "\\n")
while play.get("waits", {}).get(name, name) not in (root / "calls.txt").read_text().split():
    time.sleep(0.05)
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


# `cascade run` of a play in a process of its own
DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import play_runs as t
import cascade.run
root = Path(sys.argv[2])
cascade.run.plan = t.played(root)
cascade.run.check_options = lambda *_: t.Checked((), {})
cascade.run._tell = lambda *_: None
t.Play(root).run()
"""
