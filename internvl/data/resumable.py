"""Files that a command only appends to, so that it can be killed and go on where it was.

Beside such a file lies a description of what it depends on (`<output>.meta.json`): a run with
another model or setting is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl.errors import DataError, UserError


def meta_path(output: Path) -> Path:
    """Where the description of a file of completions lies."""
    return output.with_name(output.name + ".meta.json")


def check_same_run(output: Path, wanted: dict[str, Any], path: Path | None = None) -> str:
    """The model name to write into records; raises UserError when `output` is of another run.

    A model is compared by its fingerprint, not by its path; the name first given stays. path: of
    the description, where it is not `meta_path`.
    """
    path = path or meta_path(output)
    if not path.exists():
        if output.exists() and output.stat().st_size:
            raise UserError(
                f"{output} exists without {path.name}: it is not known what made it. "
                "Give another --output."
            )
        return str(wanted["model"])
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    changed = [
        f"{key} was {found.get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if key != "model" and found.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{output} was made by another run ({'; '.join(changed)}). "
            "Give another --output, or the same options to go on."
        )
    return str(found["model"])


def whole_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, end offset, record) of every line; stops before a torn last line."""
    with path.open("rb") as lines:
        position = 0
        torn: str | None = None
        for number, raw in enumerate(lines, start=1):
            if torn is not None:
                raise DataError(f"{path}:{number - 1}: {torn}, and more lines follow")
            position += len(raw)
            if not raw.endswith(b"\n"):
                return
            try:
                record = json.loads(raw)
            except ValueError as error:
                torn = f"not valid JSON ({error})"
                continue
            yield number, position, record


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """A file that cannot be written (a full disk) as a `UserError` that says how to go on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written: {error.strerror}. What was sampled "
            "before is kept; make room, and start the same command again to go on"
        ) from error
