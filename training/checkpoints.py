"""Checkpoints that can be trusted: complete or ignored, and proved after loading.

A checkpoint folder is complete when it holds `complete.json`, written last. Resuming takes the
newest complete one (transformers takes the highest number, even half-written) and compares the
checksum of what was loaded with the one of what was saved.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from internvl.errors import UserError

MARKER = "complete.json"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, `checkpoint-120` -> 120."""
    return int(folder.name.removeprefix("checkpoint-"))


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint folder, complete or not, by step."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=step_of)


def newest_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    for path in reversed(all_checkpoints(output_dir)):
        if (path / MARKER).is_file():
            return path
    return None


def remove_incomplete(output_dir: Path) -> list[Path]:
    """Delete the folders that a kill left half-written; returns them."""
    broken = [path for path in all_checkpoints(output_dir) if not (path / MARKER).is_file()]
    for path in broken:
        shutil.rmtree(path)
    return broken


def mark_complete(folder: Path, record: dict[str, Any]) -> None:
    """Make a checkpoint complete: everything in it is synced to disk, then the marker appears."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    partial = folder / (MARKER + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(record, out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(folder / MARKER)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_marker(folder: Path) -> dict[str, Any]:
    """The record in a complete checkpoint's marker."""
    record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """Delete all but the newest `limit` complete checkpoints (None: keep all)."""
    if limit is None or limit <= 0:
        return
    complete = [path for path in all_checkpoints(output_dir) if (path / MARKER).is_file()]
    for path in complete[:-limit]:
        # without its marker first: a kill inside rmtree leaves a folder that is ignored
        (path / MARKER).unlink()
        shutil.rmtree(path)


def check_same_run(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise `UserError` when a checkpoint was made with other settings than the current ones."""
    changed = [
        f"{name}: {saved.get(name)!r} then, {value!r} now"
        for name, value in sorted(current.items())
        if saved.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{folder} was made with other settings ({'; '.join(changed)}). Go back to them, or "
            "choose another output_dir, or remove the folder."
        )
