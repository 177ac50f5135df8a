"""Tables of text: rows of cells by number, read from their place in the file when asked for.

A file is read once for the places of its rows, so memory does not grow with their cells.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from internvl.errors import DataError


class _Place(NamedTuple):
    """Where a row stands in the file. line: its first one, from 1."""

    start: int
    stop: int
    line: int


class DelimitedTable:
    """The rows of a file of separated cells, by number from 0.

    needed: columns that must be there. example: what was expected, where one is not.
    Raises `DataError` for a file whose header has not got them.
    """

    def __init__(self, path: Path, delimiter: str, *, needed: Sequence[str], example: str):
        self.path = path
        self.columns: list[str] = []
        self._delimiter = delimiter
        self._places: list[_Place] = []
        with _whole_fields():
            self._find_rows(needed, example)

    def __len__(self) -> int:
        return len(self._places)

    def origin(self, index: int) -> tuple[Path, int]:
        """A row's file and its first line."""
        return self.path, self._places[index].line

    def files(self) -> list[Path]:
        """The one file."""
        return [self.path]

    def column(self, name: str) -> str:
        """What a column is called whose header says this."""
        return name.strip()

    def found(self, number: int, cells: dict[str, str]) -> None:
        """A whole row was found, in order."""

    def cells(self, index: int) -> dict[str, str]:
        """A row's cells by column. Raises csv.Error or ValueError for a row that is none."""
        place = self._places[index]
        with self.path.open("rb") as file:
            file.seek(place.start)
            raw = file.read(place.stop - place.start)
        with _whole_fields():
            # newline="": a line break inside a cell stays what it is
            rows = list(self._reader(io.StringIO(raw.decode(), newline="")))
        if len(rows) != 1 or len(rows[0]) != len(self.columns):
            found = len(rows[0]) if rows else 0
            raise ValueError(f"{found} cells, expected {len(self.columns)}")
        return dict(zip(self.columns, rows[0], strict=True))

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _find_rows(self, needed: Sequence[str], example: str) -> None:
        with self.path.open("rb") as file:
            lines = _Lines(file)
            reader = self._reader(lines)
            try:
                self.columns = [self.column(name) for name in next(reader, [])]
            except csv.Error as error:
                raise DataError(f"{self.path}: its header cannot be read: {error}") from None
            if missing := [name for name in needed if name not in self.columns]:
                raise DataError(f"{self.path}: no column {missing[0]!r}; expected {example}")
            while True:
                start, line = lines.position, lines.number + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    cells = ["broken"]  # found again, and told, when the row is read
                if not any(map(str.strip, cells)):
                    continue  # a blank line, or separators alone
                if len(cells) == len(self.columns):
                    self.found(len(self._places), dict(zip(self.columns, cells, strict=True)))
                elif lines.number > line:
                    # an open quote has swallowed rows: only its own line is lost
                    lines.back_to(start, line)
                    reader = self._reader(lines)
                self._places.append(_Place(start, lines.position, line))


class _Lines:
    """The lines of a file as texts for csv.reader, which asks for no more than a row needs.

    position: bytes handed out. number: lines handed out. What is no UTF-8 becomes surrogates here
    and is told where the row is read.
    """

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self.position = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def back_to(self, start: int, line: int) -> None:
        """Go on behind the line that starts at a byte."""
        self._file.seek(start)
        self.position, self.number = start + len(self._file.readline()), line

    def __next__(self) -> str:
        raw = self._file.readline()
        if not raw:
            raise StopIteration
        text = raw.decode("utf-8", "surrogateescape")
        if not self.position:
            text = text.removeprefix("\ufeff")
        self.position += len(raw)
        self.number += 1
        return text


@contextmanager
def _whole_fields() -> Iterator[None]:
    """Let csv read a cell of any length: an image is longer than its limit, which is a global."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
