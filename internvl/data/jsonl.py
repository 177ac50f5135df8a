"""Writing JSONL and JSON: whole or not at all, or appended and synced to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from internvl.data.quarantine import json_value
from internvl.errors import DataError


def dump_line(record: dict[str, Any]) -> str:
    """One record as one line of JSONL, newline included.

    Raises `DataError` for what JSON has no form for.
    """
    try:
        line = json.dumps(record, ensure_ascii=False)
        line.encode()
    except TypeError as error:
        wrong = [name for name, value in record.items() if json_value(value) != value]
        raise DataError(f"field {', '.join(map(repr, wrong))} cannot be written: {error}") from None
    except UnicodeEncodeError:  # half a surrogate pair: only an escape can hold it
        line = json.dumps(record)
    return line + "\n"


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records whole or not at all (a temporary file, then a rename); returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(dump_line(record))
            count += 1
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
    return count


def write_json(path: Path, value: object) -> None:
    """Write one JSON document whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


@contextmanager
def append_jsonl(path: Path) -> Iterator[TextIO]:
    """Open a JSONL file to append; flushed and synced to disk on leaving."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
