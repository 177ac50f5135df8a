"""What a model replied, kept in a file that several processes may share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

_BUSY_SECONDS = 30.0  # how long to wait for another process's write
_AT_ONCE = 500  # keys of one query


class ReplyCacheError(ValueError):
    """The file is no cache, or it cannot be read or written (now, or any more)."""


class ReplyCache:
    """Replies by key in an SQLite file; a connection is opened for each use.

    So it may be used from any thread and on both sides of a fork, and a kill loses nothing that
    was put. option: what the user calls the file. Raises ReplyCacheError, naming the file, where
    that is none or cannot be written.
    """

    def __init__(self, path: Path, *, option: str = "cache"):
        self.path = path
        self.option = option
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReplyCacheError(f"{option} {path}: {error.strerror}") from None
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        import sqlite3

        try:
            database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS)
            with contextlib.closing(database), database:  # a transaction, then closed
                yield database
        except sqlite3.Error as error:
            raise ReplyCacheError(
                f"{self.option} {self.path}: {error}; free it, or name another file"
            ) from None

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """The replies that are known, by key."""
        wanted, found = list(keys), dict[str, str]()
        with self._open() as database:
            for start in range(0, len(wanted), _AT_ONCE):
                part = wanted[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(part))
                query = f"SELECT key, reply FROM replies WHERE key IN ({marks})"
                found.update(database.execute(query, part))
        return found

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; the last one of a key stands."""
        whole = reply.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, whole))
