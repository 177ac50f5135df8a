"""The lines of a file by number, without the file in memory: byte offsets, found once and kept.

    file -> blocks of 1 MiB -> offsets of the lines that are not blank -> a cached file
                                                                             -> line i by pread

A large file's offsets are found at the speed of the disk and kept in the cache (8 bytes a line),
from where they are mapped into memory: opening it again takes milliseconds, whatever its size.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from internvl.data.cache import CACHED_FROM, cached_file, file_stamp
from internvl.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_BYTES = 2**20
_VERSION = 1  # of the cached format
_NEWLINE, _SPACE = 10, 32


class Lines:
    """The non-blank lines of a file, by number from 0.

    table: int64 [1 or 2, n + 1]: where each line begins, then the file's size; below it, where
    there are blank lines, the lines' own numbers from 0. stamp: of the file that it was made of.
    """

    def __init__(self, path: Path, table: NDArray[np.int64], stamp: tuple[int, int]):
        self.path = path
        self._starts = table[0]
        self._numbers = table[1] if len(table) > 1 else None
        self._stamp = stamp
        self._opened: dict[str, BinaryIO] = {}  # the file, opened by the process that reads

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}

    def read(self, index: int) -> bytes:
        """One line's bytes, with its line break and any blank lines behind it.

        Safe in threads and in forked processes. Raises `DataError` when the file has changed.
        """
        file = self._opened.get("file")
        if file is None:
            # of threads that come here at once all go on with one's; none is closed in use
            file = self._opened.setdefault("file", self.path.open("rb", buffering=0))
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != self._stamp:
            raise DataError(f"{self.path}: it was changed while it was read; start again")
        return _read_whole(file, int(self._starts[index]), int(self._starts[index + 1]))

    def number(self, index: int) -> int:
        """The line's number in the file, from 1."""
        return 1 + (index if self._numbers is None else int(self._numbers[index]))


def open_lines(path: Path, *, cached_from: int = CACHED_FROM, quiet: bool = False) -> Lines:
    """The lines of a file; a large one's offsets come from the cache, or go there.

    cached_from: the file size in bytes from which they are cached. quiet: no progress bar.
    """
    import numpy as np

    stamp = file_stamp(path)
    if stamp[0] < cached_from:
        return Lines(path, find_lines(path, quiet=quiet), stamp)

    def make(target: Path) -> None:
        with target.open("wb") as out:
            np.save(out, find_lines(path, quiet=quiet))

    kept = cached_file([path], ".lines.npy", make, version=_VERSION)
    table = np.load(kept, mmap_mode="r", allow_pickle=False)
    if table[0, -1] != stamp[0]:
        raise DataError(f"{path}: it was changed while it was opened; start again")
    return Lines(path, table, stamp)


def find_lines(
    path: Path, *, block_bytes: int = BLOCK_BYTES, quiet: bool = False
) -> NDArray[np.int64]:
    """The table of `Lines`: where the non-blank lines begin, and their numbers where some are.

    Blocks are read and searched in threads; numpy lets them run side by side.
    """
    import numpy as np
    from tqdm import tqdm

    size = path.stat().st_size
    parts = [np.zeros(1, np.int64)]
    maybe_blank = [np.zeros(1, np.int64)]  # numbers of lines that begin with white space, or may
    lines = 1
    bar = tqdm(
        *(), total=size, desc=f"indexing {path.name}", unit="B", unit_scale=True, delay=2,
        disable=quiet,
    )  # fmt: skip
    with path.open("rb", buffering=0) as file, bar, ThreadPoolExecutor(_threads()) as pool:

        def search(start: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
            raw = _read_whole(file, start, min(start + block_bytes, size))
            block = np.frombuffer(raw, np.uint8)
            firsts = np.flatnonzero(block == _NEWLINE) + 1  # where the next lines begin
            inside = firsts[firsts < len(block)]
            return firsts + start, np.flatnonzero(block[inside] <= _SPACE), len(inside)

        for firsts, white, inside in pool.map(search, range(0, size, block_bytes)):
            maybe_blank.append(lines + white)
            if inside < len(firsts):  # the next block says how the last line begins
                maybe_blank.append(np.array([lines + inside]))
            parts.append(firsts)
            lines += len(firsts)
            bar.update(block_bytes)
    starts = np.concatenate([*parts, [size]])
    if starts[-2] == size:  # nothing follows the last line break
        starts = starts[:-1]
    return _without_blanks(path, starts, np.concatenate(maybe_blank))


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _read_whole(file: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file; raises `DataError` where it ends before."""
    pieces = []
    while start < stop:  # a read may return less than it was asked for
        piece = os.pread(file.fileno(), stop - start, start)
        if not piece:
            raise DataError(f"{file.name}: it ends at byte {start}, expected {stop}")
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)


def _without_blanks(
    path: Path, starts: NDArray[np.int64], candidates: NDArray[np.int64]
) -> NDArray[np.int64]:
    import numpy as np

    blank = []
    with path.open("rb", buffering=0) as file:
        for index in candidates.tolist():
            if index >= len(starts) - 1:
                continue
            start, stop = int(starts[index]), int(starts[index + 1])
            if not _read_whole(file, start, stop).strip():
                blank.append(index)
    if not blank:
        return starts[None]
    keep = np.ones(len(starts), bool)
    keep[blank] = False
    return np.stack([starts[keep], np.flatnonzero(keep)])
