r"""Questions (or pairs) as a spreadsheet writes them: CSV, its columns named like the fields.

    image,question,answer
    photos/7.png,How many bars are red?,3
    photos/8.png,Which is the highest?,"[""the red one"", ""red""]"

The header decides whether cells are separated by commas, semicolons or tabs; its capitals do not
count. An empty cell is an absent field. A cell that begins with "[" or "{" is JSON where the field
may be a list: several images, answers, options, matchers; an answer that is no JSON list of texts
is the text that stands there.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from internvl.data.delimited import DelimitedTable
from internvl.data.records import IMAGE_PLACEHOLDER
from internvl.errors import DataError

_EXAMPLE = "a table with a header: image, question, answer"
_LISTS = ("image", "images", "options", "matcher", "history", "conversations")
_NUMBERS = ("max_tiles", "num_frames")
_FIRST_ROWS = 100  # that tell how a file writes its images


class CsvTable(DelimitedTable):
    """The rows of a CSV file by number from 0; see `internvl.data.sources.Source`.

    A row without an id has the file's name and its own number. Raises `DataError` for a file whose
    header has no `question`.
    """

    def __init__(self, path: Path):
        super().__init__(path, _delimiter(path), needed=("question",), example=_EXAMPLE)
        named = [name for name in self.columns if name]  # spreadsheets add columns without one
        if len(set(named)) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise DataError(f"{path}: two columns are called {twice!r}")

    @property
    def image_in_front(self) -> bool:
        """Whether one image without `<image>` belongs in front; see `implies_placeholder`."""
        first = (self.read(number)[0] for number in range(min(len(self), _FIRST_ROWS)))
        return not any(IMAGE_PLACEHOLDER in record.get("question", "") for record in first)

    def column(self, name: str) -> str:
        """A field's name: what the header says, in small letters."""
        return name.strip().lower()

    def read(self, index: int) -> tuple[Any, str | None]:
        """A record by its number; see `Source`."""
        try:
            cells = self.cells(index)
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            return {}, f"not a row of the table: {error}"
        given = {name: cell.strip() for name, cell in cells.items() if name and cell.strip()}
        try:
            record: dict[str, Any] = {name: _value(name, cell) for name, cell in given.items()}
        except ValueError as error:
            return given, str(error)
        record.setdefault("id", f"{self.path.stem}-{index + 1}")
        return record, None


def _delimiter(path: Path) -> str:
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", "surrogateescape")
    return max(",;\t", key=header.count)


def _value(name: str, cell: str) -> Any:
    """A cell as the field's value; raises ValueError for what is none."""
    if name in _NUMBERS:
        if not cell.isdecimal():
            raise ValueError(f"column {name!r}: {cell[:60]!r} is no whole number")
        return int(cell)
    if name == "answer" and cell.startswith("["):
        return _answers(cell)
    if name in _LISTS and cell.startswith(("[", "{")):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column {name!r} begins like JSON and is none: {error}") from None
    return cell


def _answers(cell: str) -> str | list[str]:
    """Several answers, where a JSON list of texts stands; "[1, 2]" is an answer."""
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    texts = isinstance(found, list) and found and all(isinstance(item, str) for item in found)
    return found if texts else cell
