"""What a judge said, kept in a file that several processes may share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

_BUSY_SECONDS = 30.0  # how long to wait for another process's write
_AT_ONCE = 500  # keys of one query


class JudgeCacheError(ValueError):
    """The file is no cache, or it cannot be read or written (now, or any more)."""


class JudgeCache:
    """Judgements by key in an SQLite file; a connection is opened for each use.

    So it may be used from any thread and on both sides of a fork, and a kill loses nothing that
    was put. Raises JudgeCacheError, naming the file, where that is none or cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JudgeCacheError(f"judge_cache {path}: {error.strerror}") from None
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, correct INTEGER)"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        import sqlite3

        try:
            database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS)
            with contextlib.closing(database), database:  # a transaction, then closed
                yield database
        except sqlite3.Error as error:
            raise JudgeCacheError(
                f"judge_cache {self.path}: {error}; free it, or name another file"
            ) from None

    def get(self, keys: Iterable[str]) -> dict[str, bool]:
        """The judgements that are known, by key."""
        wanted, found = list(keys), dict[str, bool]()
        with self._open() as database:
            for start in range(0, len(wanted), _AT_ONCE):
                part = wanted[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(part))
                query = f"SELECT key, correct FROM judgements WHERE key IN ({marks})"
                found.update({key: bool(correct) for key, correct in database.execute(query, part)})
        return found

    def put(self, key: str, correct: bool) -> None:
        """Keep a judgement; the first one of a key stands."""
        with self._open() as database:
            database.execute("INSERT OR IGNORE INTO judgements VALUES (?, ?)", (key, int(correct)))
