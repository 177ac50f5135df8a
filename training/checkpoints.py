"""Checkpoints that can be trusted: complete or ignored, and proved after loading.

A checkpoint folder is complete when it holds `complete.json`, written last; until then it holds
`incomplete`, written first. Resuming takes the newest complete one (transformers takes the highest
number, even half-written) and compares the checksum of what was loaded with the one of what was
saved. Half-written folders are deleted; a checkpoint of another program is never touched.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from internvl.errors import UserError

MARKER = "complete.json"
BEGUN = "incomplete"  # there until the marker is: tells our half-written folders from others' own


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


def begin(folder: Path) -> None:
    """Make the folder of a checkpoint that is about to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).touch()


def _unmarked(output_dir: Path) -> list[Path]:
    return [path for path in all_checkpoints(output_dir) if not (path / MARKER).is_file()]


def refuse_foreign(output_dir: Path) -> None:
    """Raise `UserError` for a checkpoint that another program wrote: it would be in the way."""
    for path in _unmarked(output_dir):
        if not (path / BEGUN).is_file() and any(path.iterdir()):
            raise UserError(
                f"{path} is no checkpoint of this program, which can neither go on from it nor "
                "delete it; choose another output_dir, or move the folder away"
            )


def remove_incomplete(output_dir: Path) -> list[Path]:
    """Delete the folders that a kill left half-written; returns them."""
    broken = _unmarked(output_dir)
    for path in broken:
        _delete(path)
    return broken


def _delete(folder: Path) -> None:
    """Delete a folder, what tells that it is ours last: a kill in between must not hide that."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != BEGUN:
            path.unlink()
    (folder / BEGUN).unlink(missing_ok=True)
    folder.rmdir()


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
    (folder / BEGUN).unlink(missing_ok=True)


def read_marker(folder: Path) -> dict[str, Any]:
    """The record in a complete checkpoint's marker."""
    record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def keep_newest(output_dir: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete all but the newest `limit` complete checkpoints (None: keep all).

    best: the best checkpoint by the user's metric, if any; it is kept, and counted.
    """
    if limit is None or limit <= 0:
        return
    complete = [path for path in all_checkpoints(output_dir) if (path / MARKER).is_file()]
    kept = complete[-limit:]
    if best in complete and best not in kept:
        kept = [best, *complete[-max(1, limit - 1) :]]
    for path in complete:
        if path not in kept:
            # no longer complete, and still ours, whatever a kill leaves of it
            (path / MARKER).rename(path / BEGUN)
            _delete(path)


def check_same_run(folder: Path, current: dict[str, Any]) -> None:
    """Raise `UserError` when the current run, with these settings, cannot go on from a checkpoint.

    Its settings were other ones, or it was saved without the optimizer.
    """
    record = read_marker(folder)
    saved = record["settings"]
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
    if not record["resumable"]:
        raise UserError(
            f"{folder} was saved with save_only_model, so nothing can go on from it; choose "
            "another output_dir, or remove the folder"
        )
