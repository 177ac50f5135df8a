"""The questions of an evaluation: which ones, of which data set, and how each is asked.

    files -> rows -> the data sets asked for, each question once -> images decoded -> prompt set

A question is known by its data set and its id. The data set is the record's "dataset", else the
name of its file.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from internvl.data import (
    Quarantine,
    RecordFault,
    Row,
    RowSequence,
    Selection,
    check_images,
    read_rows,
)
from internvl.data.fingerprint import digest_of, fingerprint
from internvl.errors import UserError
from internvl.prompts import PromptStyle, original_question, prompt_record

PromptSet = Literal["as_is", "cot", "direct"]
PROMPT_SETS: tuple[PromptSet, ...] = get_args(PromptSet)
ReasoningStyle = Literal["final", "boxed", "r1"]
REASONING_STYLES: tuple[ReasoningStyle, ...] = get_args(ReasoningStyle)

Key = tuple[str, str]


def key_of(record: dict[str, Any]) -> Key:
    """By what a question, or its prediction, is known: data set and id."""
    return str(record["dataset"]), str(record["id"])


class NamedRows(RowSequence):
    """The rows of several files, one after the other; each names its data set."""

    def __init__(self, parts: Sequence[tuple[str, RowSequence]]):
        self._parts = parts
        self._ends = list(accumulate(len(rows) for _, rows in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Row:
        """The row of a number from 0."""
        number = bisect_right(self._ends, index)
        name, rows = self._parts[number]
        row = rows.row(index - (self._ends[number - 1] if number else 0))
        if isinstance(row.data.get("dataset"), str):
            return row
        return replace(row, data={**row.data, "dataset": name})

    def fingerprint(self) -> str | None:
        """Of all files, and the names that are given to their rows."""
        return digest_of([[name, fingerprint(rows)] for name, rows in self._parts])


class AskedRows(RowSequence):
    """Questions as a prompt set asks them; made as they are read.

    cot asks for reasoning before the answer, in the style given; direct for an option's letter
    where there are options, else for a word or phrase; as_is leaves the question as it is. What
    `mmpr sample` has added to a question is taken off first, and a question that asks for a form by
    itself keeps it (`internvl.prompts`).
    """

    def __init__(self, rows: Sequence[Row], prompt: PromptSet, style: ReasoningStyle = "final"):
        self._rows, self._prompt, self._style = rows, prompt, style

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """The row of a number from 0."""
        row = self._rows[index]
        if self._prompt == "as_is":
            return row
        record = original_question(row.data)
        return replace(row, data=prompt_record(record, self.wanted_style(record)))

    def wanted_style(self, record: dict[str, Any]) -> PromptStyle:
        """The style that a question is to be asked in."""
        from rewards.extract import options_in  # not at the start of every command

        if self._prompt == "cot":
            return self._style
        return "letter" if record.get("options") or options_in(record["question"]) else "short"

    def own_forms(self) -> int:
        """How many questions are asked in a form of their own, and not in the prompt set's."""
        if self._prompt == "as_is":
            return 0
        return sum(
            row.data["prompt_style"] != self.wanted_style(original_question(row.data))
            for row in self
        )


def read_questions(
    files: Sequence[Path],
    *,
    quarantine: Quarantine,
    image_root: Path | None = None,
    record_fault: RecordFault | None = None,
    datasets: Sequence[str] = (),
    limit: int | None = None,
) -> Sequence[Row]:
    """The usable questions of some files, each once whatever its data set's `repeat_time`.

    datasets: only these; then bad records of the whole files are held against the whole files, and
    what is found later against these. limit: only the first so many of each. What is bad goes to
    the quarantine.
    Raises `UserError` for a data set that is not there and for an id that a data set has twice.
    """
    reading = quarantine
    if datasets:
        reading = Quarantine(quarantine.path, quarantine.max_bad, keep=quarantine.count)
    parts = [
        (file.stem, read_rows(file, kind="question", quarantine=reading, image_root=image_root))
        for file in files
    ]
    rows = NamedRows(parts)
    good = Selection(rows, _chosen(rows, datasets, limit))
    return check_images(good, quarantine=quarantine, record_fault=record_fault)


def _chosen(rows: Sequence[Row], datasets: Sequence[str], limit: int | None) -> array[int]:
    """The numbers of the rows that are asked for."""
    places: dict[Key, tuple[Path, int]] = {}
    taken: Counter[str] = Counter()
    seen: dict[str, None] = {}
    chosen = array("q")
    for number, row in enumerate(rows):
        key, place = key_of(row.data), (row.file, row.line)
        seen.setdefault(key[0])
        if datasets and key[0] not in datasets:
            continue
        if key in places:
            file, line = places[key]
            if (file, line) != place:
                raise UserError(
                    f"{row.file}:{row.line}: id {key[1]!r} of data set {key[0]!r} is that of "
                    f"{file}:{line}, too; give each question an id of its own"
                )
            continue
        places[key] = place
        if limit is None or taken[key[0]] < limit:
            taken[key[0]] += 1
            chosen.append(number)
    for name in datasets:
        if name not in seen:
            raise UserError(f"--dataset {name}: not there; there are: {', '.join(seen)}")
    return chosen
