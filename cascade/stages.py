"""Stages as processes, and the manifest that lets a killed run go on.

A stage is a command with a key: the hash of its command, its configuration and the keys of the
stages it needs. A finished stage with the same key is not run again; with another key its folder
is emptied and it runs anew, and so does all that needs it. A stage that was killed has its key in
the manifest without `done`: its folder is kept, and the command itself goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from internvl.data import write_json
from internvl.errors import UserError


@dataclass
class Stage:
    """One process of a run.

    name: unique in the run. command: arguments after the interpreter. folder: what the stage
    writes (emptied before it runs anew). config: options written to `config_file` before the
    start. needs: names of the stages whose results it reads.
    """

    name: str
    command: list[str]
    folder: Path
    needs: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    config_file: Path | None = None
    env: dict[str, str] = field(default_factory=dict)

    def key(self, keys: dict[str, str]) -> str:
        """The hash that stands for this stage's result."""
        material = [self.command, self.config, [keys[name] for name in self.needs]]
        return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:16]


class Manifest:
    """`manifest.json` of a run: what ran, by which key, for how long."""

    def __init__(self, path: Path, seed: int, preset: str):
        self.path = path
        self.data: dict[str, Any] = {"seed": seed, "preset": preset, "stages": []}
        if path.is_file():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            same = (self.data["seed"], self.data["preset"]) == (seed, preset)
            if not same:
                raise UserError(
                    f"{path.parent} holds a run with seed {self.data['seed']} and preset "
                    f"{self.data['preset']!r}; choose another --output, or remove the folder"
                )

    def entry(self, name: str) -> dict[str, Any] | None:
        """A stage's record, or None."""
        return next((s for s in self.data["stages"] if s["name"] == name), None)

    def put(self, record: dict[str, Any]) -> None:
        """Add or replace a stage's record, and write the file."""
        stages = self.data["stages"]
        for place, stage in enumerate(stages):
            if stage["name"] == record["name"]:
                stages[place] = record
                break
        else:
            stages.append(record)
        write_json(self.path, self.data)

    @property
    def seconds(self) -> float:
        """The time of all stages together."""
        return float(sum(stage["seconds"] for stage in self.data["stages"]))


def _prepare(stage: Stage, manifest: Manifest, key: str) -> dict[str, Any]:
    """The record of a stage about to start, or to go on; empties the folder of another key's."""
    before = manifest.entry(stage.name)
    if before is None or before["key"] != key:
        if stage.folder.exists():
            shutil.rmtree(stage.folder)
        before = {"name": stage.name, "seconds": 0.0}
    stage.folder.mkdir(parents=True, exist_ok=True)
    if stage.config is not None:
        assert stage.config_file is not None
        stage.config_file.parent.mkdir(parents=True, exist_ok=True)
        stage.config_file.write_text(yaml.safe_dump(stage.config, sort_keys=False))
    return {
        **before,
        "command": stage.command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "key": key,
        "done": False,
    }


def _run(stage: Stage) -> None:
    """Run a stage's process to its end; its output goes to the terminal."""
    command = [sys.executable, *stage.command]
    print(f"\n== {stage.name}: python {' '.join(stage.command)}", flush=True)
    code = subprocess.call(command, env={**os.environ, **stage.env})
    if code:
        raise UserError(
            f"stage {stage.name} ended with code {code}; start the same command again to go on "
            "from there"
        )


def run_stages(stages: Sequence[Stage], manifest: Manifest) -> None:
    """Run the stages that are not done, in order; raises `UserError` when one fails."""
    keys: dict[str, str] = {}
    for stage in stages:
        key = keys[stage.name] = stage.key(keys)
        before = manifest.entry(stage.name)
        if before is not None and before["key"] == key and before["done"]:
            print(f"== {stage.name}: done before ({before['seconds']:.0f} s), not run again")
            continue
        record = _prepare(stage, manifest, key)
        manifest.put(record)
        start = time.monotonic()
        try:
            _run(stage)
            record["done"] = True
        finally:
            record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
            manifest.put(record)
