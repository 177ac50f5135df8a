"""Where rows go that cannot be used."""

from __future__ import annotations

import hashlib
import json
import math
import os
from itertools import islice
from pathlib import Path

from internvl.errors import DataError


def json_value(value: object) -> object:
    """A value as strict JSON can hold it, for a person to read.

    Bytes become their number and SHA-256; what JSON has no form for (dates, NaN, half a surrogate
    pair) becomes its text.
    """
    if isinstance(value, dict):
        return {str(json_value(key)): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, int) or (type(value) is float and math.isfinite(value)):
        return value
    return str(value)


class Quarantine:
    """Where rows go that cannot be used: one JSON line each, and too many of them stop the run.

    path: the file to append to (None: count only). max_bad: the share of rows (< 1) or the number
    of rows (>= 1) that may be bad before `check` raises. keep: go on with the file that is there
    after its first so many rows, which are counted, and not written again; the others are cut off.
    """

    def __init__(self, path: Path | None, max_bad: float = 0.05, *, keep: int = 0):
        if not max_bad >= 0:
            raise DataError(f"max_bad is {max_bad}; give a share (< 1) or a count (>= 1)")
        self.path = path
        self.max_bad = max_bad
        self.count = 0
        self._first = ""  # what is told where no file says it
        self._seen: set[tuple[str, int]] = set()
        if keep and path is not None and path.is_file():
            self._go_on(path, keep)

    def _go_on(self, path: Path, keep: int) -> None:
        with path.open("rb") as lines:
            kept = list(islice(lines, keep))
        if kept and not kept[-1].endswith(b"\n"):  # a kill may have left half a line
            kept.pop()
        for line in kept:
            entry = json.loads(line)
            self._seen.add((entry["file"], entry["line"]))
        self.count = len(self._seen)
        os.truncate(path, sum(map(len, kept)))

    def add(self, file: Path, line: int, reason: str, row: object) -> None:
        """Put one row aside with the reason; a row is counted and written once."""
        if (str(file), line) in self._seen:
            return
        self._seen.add((str(file), line))
        self.count += 1
        self._first = self._first or f"; the first: {file}:{line}: {reason}"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"file": str(file), "line": line, "reason": reason, "row": row}
            text = json.dumps(json_value(entry), ensure_ascii=False, allow_nan=False)
            with self.path.open("a", encoding="utf-8") as out:
                out.write(text + "\n")

    def check(self, total: int, *, at_least: int = 0) -> None:
        """Raise `DataError` when more rows are bad than `max_bad` allows of `total`.

        at_least: a share is taken of no fewer rows than that.
        """
        limit = self.max_bad * max(total, at_least) if self.max_bad < 1 else self.max_bad
        if self.count > limit:
            where = f"; their reasons are in {self.path}" if self.path else self._first
            raise DataError(
                f"{self.count} of {total} rows are bad, more than max_bad={self.max_bad:g} "
                f"allows{where}. Mend them, or raise max_bad."
            )
