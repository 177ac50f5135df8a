"""Files that are made once from a data file and found again: line offsets, row-wise copies.

They lie in $XDG_CACHE_HOME/internvl-posttraining (by default ~/.cache/internvl-posttraining), never
beside the user's data; deleting them costs the time to make them again. Their names hold a hash of
the data file's path, size and time of change, so what was made of an older file is never read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from internvl.errors import UserError

CACHED_FROM = 256 * 2**20  # bytes of a data file; what smaller ones need is made in no time


def cache_folder() -> Path:
    """Where cached files lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "internvl-posttraining"


def file_stamp(path: Path) -> tuple[int, int]:
    """(size, time of change in nanoseconds): what tells a changed file from the same one."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def cached_file(
    sources: Sequence[Path], suffix: str, make: Callable[[Path], None], *, version: object
) -> Path:
    """The cached file made from `sources`; `make(path)` writes it where there is none yet.

    version: of the format that `make` writes. One process makes it, others wait; what was made
    from older states of the same files is deleted. Raises `UserError` where it cannot be written.
    """
    names = [os.path.realpath(source) for source in sources]
    stamps = [file_stamp(source) for source in sources]
    place = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:20]
    state = hashlib.sha256(repr((version, stamps)).encode()).hexdigest()[:20]
    folder = cache_folder()
    path = folder / f"{place}-{state}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{place}{suffix}.lock"):
            if not path.exists():
                for stale in folder.glob(f"{place}-*{suffix}*"):
                    stale.unlink()
                partial = path.with_name(path.name + ".partial")
                make(partial)
                partial.replace(path)
    except OSError as error:
        if error.filename in map(str, sources):
            raise  # the data cannot be read, which another cache would not mend
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; it would hold what is made "
            f"of {sources[0]}. Set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time is inside; the system frees it when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
