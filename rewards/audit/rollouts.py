"""Rollouts and verdict records from JSONL, a line at a time; what cannot be used is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from rewards.datasets import DatasetTable
from rewards.judging import without_judge
from rewards.verdict import Outcome, Task, request_fault, task_of

LONGEST_LINE = 64 * 2**20  # bytes
_OUTCOMES = tuple(str(outcome) for outcome in Outcome)


class Request(NamedTuple):
    """How rollouts are to be judged: the prompt's style, the table (None: ours), and a matcher for
    all of them, whatever they name.
    """

    style: str = "auto"
    table: DatasetTable | None = None
    matcher: str | None = None


AUTO = Request()


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be judged, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Rollout:
    """A question with one completion, and where it stands; `record["matcher"]` is what it asks for.

    task: what is to be judged. stored: the outcome that an earlier verdict gave it, None for a
    rollout.
    """

    file: str
    line: int
    record: dict[str, Any]
    task: Task
    stored: str | None = None

    @property
    def dataset(self) -> str | None:
        """The name of its data set, if it has one."""
        name = self.record.get("dataset")
        return name if isinstance(name, str) and name else None


def read_rollouts(
    path: Path,
    on_bad: Callable[[BadLine], None],
    on_bytes: Callable[[int], object] = lambda size: None,
    request: Request = AUTO,
) -> Iterator[Rollout]:
    """The rollouts of a JSONL file, one at a time; every other line but blank ones is `on_bad`.

    on_bytes: told how many bytes were read, line by line. Raises OSError for an unreadable file.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            on_bytes(len(line))
            if not line.strip():
                continue
            found = parse_line(str(path), number, line, request)
            if isinstance(found, Rollout):
                yield found
            else:
                on_bad(found)


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """Lines of bounded length; of a longer one its beginning, which is no JSON."""
    while line := file.readline(LONGEST_LINE):
        yield line
        while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)


def parse_line(file: str, number: int, line: bytes, request: Request = AUTO) -> Rollout | BadLine:
    """The rollout in a line, or what is wrong with it."""
    if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
        return BadLine(file, number, f"longer than {LONGEST_LINE:,} bytes")
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadLine(file, number, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadLine(file, number, f"not JSON: {error.msg} (character {error.pos + 1})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        return BadLine(file, number, f"not JSON that can be read: {error}")
    if not isinstance(record, dict):
        return BadLine(file, number, "not a JSON object")
    stored = record.get("outcome")
    if stored is not None:  # of a verdict, `matcher` is the one that decided
        record["matcher"] = record.get("requested_matcher")
    if request.matcher is not None:
        record["matcher"] = request.matcher
    else:
        record = {**without_judge(record)}  # which is not asked here: what the rules would say
    try:
        task = task_for(record, request.style, request.table)
    except (ValueError, RecursionError) as error:
        return BadLine(file, number, str(error))
    return Rollout(file, number, record, task, stored)


def task_for(
    record: dict[str, Any], style: str = "auto", table: DatasetTable | None = None
) -> Task:
    """The task of judging a record's own completion; ValueError says what keeps it from that."""
    if not isinstance(record.get("completion"), str):
        raise ValueError(
            "field 'completion' is missing or no text; a rollout has one completion a line"
        )
    if record.get("answer") is None:
        raise ValueError("field 'answer', the gold answer, is missing")
    outcome = record.get("outcome")
    if outcome is not None and outcome not in _OUTCOMES:
        raise ValueError(f"outcome {outcome!r} is unknown; one of: {', '.join(_OUTCOMES)}")
    if fault := request_fault(record, table=table):
        raise ValueError(fault)
    return task_of(record, record["completion"], style=style, table=table)


def rollout_at(path: Path, number: int) -> Rollout:
    """The rollout in one line of a file; raises ValueError where there is none."""
    with path.open("rb") as file:
        for at, line in enumerate(_lines(file), 1):
            if at == number:
                found = parse_line(str(path), number, line)
                if isinstance(found, BadLine):
                    raise ValueError(str(found))
                return found
    raise ValueError(f"{path}:{number}: the file has no such line")
