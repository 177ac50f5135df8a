"""What a run's data are, whatever their files are called: a hash of what was written there.

Of pictures that lie in files of their own only the path counts: reading them all would take as long
as an epoch. MPO reads them once anyway, for its reference, and hashes them there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from internvl.data.cache import CACHED_FROM, cached_file
from internvl.data.quarantine import json_value
from internvl.data.rows import Row


def digest_of(parts: Sequence[object]) -> str:
    """A hash of some values, by their JSON."""
    text = json.dumps(parts, default=json_value)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def digest_of_each(parts: Iterable[object]) -> str:
    """The same of values that come one after the other, of which one is held at a time."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(digest_of([part]).encode())
    return digest.hexdigest()


def file_digest(path: Path, *, cached_from: int = CACHED_FROM) -> str:
    """A hash of a file's bytes; that of a file of `cached_from` bytes or more is kept."""
    if path.stat().st_size < cached_from:
        return _read_digest(path)

    def make(target: Path) -> None:
        target.write_text(_read_digest(path), encoding="ascii")

    return cached_file([path], ".digest", make, version=1).read_text(encoding="ascii")


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fingerprint(rows: Sequence[Any]) -> str | None:
    """What tells these rows from others: their files' bytes, and which of their rows are taken.

    None for rows of a kind that is not known here.
    """
    own = getattr(rows, "fingerprint", None)
    if own is not None:
        return str(own())
    if all(isinstance(row, Row) for row in rows):
        return digest_of([[row.data, row.max_tiles] for row in rows])
    return None
