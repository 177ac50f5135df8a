"""Reading a run's JSON files for its report: what is malformed is one clear error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; UserError where it is absent or something else."""
    if not path.exists():
        raise UserError(f"{path}: not found; a report needs it (is this the folder of a run?)")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a JSONL file's objects; UserError names the line that is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: must be a JSON object")
            yield row


def get(row: Any, key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """Return a field of this type (never a boolean) of an object read from `path`."""
    if not isinstance(row, dict) or key not in row:
        raise UserError(f"{path}: field {key!r} is missing; write the file again")
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise UserError(f"{path}: field {key!r} is {row[key]!r}, which is of the wrong type")
    return row[key]


def number(row: Any, key: str, path: Path, *, finite: bool = True) -> float:
    """Return a numeric field of an object read from `path`."""
    value = float(get(row, key, (int, float), path))
    if finite and not math.isfinite(value):
        raise UserError(f"{path}: field {key!r} is {value}; it must be a finite number")
    return value
