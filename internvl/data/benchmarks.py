r"""VLMEvalKit's benchmark files: tab-separated tables of questions, their images inside as base64.

    index  image            question          hint   A    B     answer  category  ..
    0      /9j/4AAQSk..     What is shown?           cat  dog   B       animals
    1      0                And how many?                       3       animals

One row becomes one question record:

    id        the file's name and `index`: "MMStar-0"; `dataset` is the file's name ("_local" is
              left off), by which a table chooses the matcher
    image     `image`: base64, a list of it, or the index of the row that holds it; without that
              column `image_path`, from the image root
    question  "Hint: .." and "Question: .." and "Options:", a line each, "A. .." and a last line
              that asks for an option, as VLMEvalKit asks; without hint and options the question
              as it is. Images go in front, several as InternVL reads them: "Image-1: <image>"
    answer    `answer`; a written list of texts is a list of answers
    options   the texts of A, B, ..

All other columns that hold something are kept. In MMMU's questions "<image 2>" says which image is
meant: it becomes "<Image-2>" as in InternVL's own evaluation, and with one image it is left out.

Nothing of a file is evaluated as code. A file is read once for the places of its rows, which stay
in it until they are asked for: memory does not grow with its images.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import re
import string
from pathlib import Path
from typing import Any

from internvl.data.delimited import DelimitedTable
from internvl.data.records import IMAGE_PLACEHOLDER

LETTERS = string.ascii_uppercase
CHOOSE = "Please select the correct answer from the options above."
_EXAMPLE = (
    "a table as VLMEvalKit's: index, image, question, A, B, .., answer, separated by tabs (a plain "
    "one of image, question, answer is named *.csv)"
)
_INDEX_LENGTH = 64  # an `image` cell up to here names another row: VLMEvalKit's rule
_IMAGE_NUMBER = re.compile(r"<image (\d{1,3})>")
_DATA_URI = re.compile(r"data:image/[\w.+-]{1,20};base64,")
# what pandas, by which VLMEvalKit reads its files, takes for an empty cell
_EMPTY = {"", "nan", "NaN"}
_NO_TEXT = _EMPTY | {"None", "null", "NULL", "NA", "N/A", "<NA>"}  # of a cell that holds no answer


class BenchmarkTable(DelimitedTable):
    """The questions of a TSV file by number from 0; see `internvl.data.sources.Source`.

    Raises `DataError` for a file whose header has no `index` and `question`.
    """

    image_in_front = True

    def __init__(self, path: Path):
        self.name = path.stem.removesuffix("_local")
        self._numbers: dict[str, int] = {}  # of an index, the number of its first row
        super().__init__(path, "\t", needed=("index", "question"), example=_EXAMPLE)

    def read(self, index: int) -> tuple[Any, str | None]:
        """A question by its number; see `Source`."""
        try:
            cells = self.cells(index)
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            return {}, f"not a row of the table: {error}"
        try:
            return self._record(cells), None
        except ValueError as error:
            shown = {name: cell[:200] for name, cell in cells.items() if cell}
            return shown, str(error)

    def found(self, number: int, cells: dict[str, str]) -> None:
        """Remember a row by its index: another may name it as the holder of its image."""
        self._numbers.setdefault(cells["index"].strip(), number)

    def _record(self, cells: dict[str, str]) -> dict[str, Any]:
        """A row as a question. Raises ValueError for what makes it none."""
        number = cells["index"].strip()
        if number in _EMPTY:
            raise ValueError("column 'index' is empty")
        options = _options(cells)
        record: dict[str, Any] = {
            name: cell
            for name, cell in cells.items()
            if name not in _TAKEN and cell.strip() not in _EMPTY
        }
        record["id"] = f"{self.name}-{number}"
        record["index"] = number
        record.setdefault("dataset", self.name)
        images = self._images(cells)
        if images:
            record["image"] = images
        record["question"] = _question(cells, options, len(images))
        answer = cells.get("answer", "")
        record["answer"] = "" if answer.strip() in _EMPTY else _texts(answer, several=True)
        if options:
            record["options"] = options
        return record

    def _images(self, cells: dict[str, str]) -> list[bytes] | list[str]:
        if "image" not in cells:
            paths = cells.get("image_path", "")
            if paths.strip() in _NO_TEXT:
                if "image_path" in cells:
                    raise ValueError("column 'image_path' is empty")
                return []
            found = _texts(paths)
            return [found] if isinstance(found, str) else found
        cell = cells["image"].strip()
        if cell in _NO_TEXT:
            raise ValueError("column 'image' is empty (VLMEvalKit leaves such a row out)")
        if len(cell) <= _INDEX_LENGTH:
            cell = self._image_of(cell)
        texts = _texts(cell)
        return [_decoded(text) for text in ([texts] if isinstance(texts, str) else texts)]

    def _image_of(self, index: str) -> str:
        """The `image` cell of another row, by its index."""
        if index not in self._numbers:
            raise ValueError(f"column 'image' names row {index!r}, which is not in the file")
        try:
            cell = self.cells(self._numbers[index])["image"].strip()
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"column 'image' names row {index!r}, which is none: {error}"
            ) from None
        if len(cell) <= _INDEX_LENGTH:
            raise ValueError(f"column 'image' names row {index!r}, which holds no image itself")
        return cell


_TAKEN = {"index", "image", "image_path", "question", "hint", "answer", *LETTERS}


def _options(cells: dict[str, str]) -> list[str]:
    """The texts of A, B, ..; raises ValueError where one is missing before another."""
    found = [letter for letter in LETTERS if cells.get(letter, "").strip() not in _EMPTY]
    for letter, expected in zip(found, LETTERS, strict=False):
        if letter != expected:
            raise ValueError(f"there is an option {letter} but no {expected}")
    return [cells[letter].strip() for letter in found]


def _question(cells: dict[str, str], options: list[str], images: int) -> str:
    """The question as it is asked: images, hint, question, options."""
    question, hint = cells["question"].strip(), cells.get("hint", "").strip()
    if not question:
        raise ValueError("column 'question' is empty")
    lines = []
    if hint not in _NO_TEXT:
        lines.append(f"Hint: {hint}")
    lines.append(f"Question: {question}" if lines or options else question)
    if options:
        lines.append("Options:")
        lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
        lines.append(CHOOSE)
    text = "\n".join(lines)
    for found in _IMAGE_NUMBER.findall(text):
        if not 1 <= int(found) <= images:
            raise ValueError(f"the question speaks of <image {found}>, and there are {images}")
    if IMAGE_PLACEHOLDER in text:  # it says itself where its images go
        return text
    if images < 2:
        front = f"{IMAGE_PLACEHOLDER}\n" * images
        return front + re.sub(r" {2,}", " ", _IMAGE_NUMBER.sub("", text))
    front = "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, images + 1))
    return front + _IMAGE_NUMBER.sub(r"<Image-\1>", text)


def _texts(cell: str, *, several: bool = False) -> str | list[str]:
    """A cell's text, or the texts of a list that is written in it as Python writes one.

    several: a list of other things than texts is a text itself ("[1, 2]" may be an answer).
    """
    stripped = cell.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return stripped
    try:
        found = ast.literal_eval(stripped)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if isinstance(found, list) and found and all(isinstance(item, str) for item in found):
        return found
    if several:
        return stripped
    raise ValueError(f"a list of texts was expected: {stripped[:60]!r}")


def _decoded(text: str) -> bytes:
    """The bytes of one image; raises ValueError for what is no base64."""
    text = _DATA_URI.sub("", text.strip(), count=1)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"column 'image' is no base64: {error}") from None
