"""Rollouts and verdict records from JSONL, a line at a time; what cannot be used is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from rewards.verdict import Outcome, gold_answers, matcher_names, request_fault

LONGEST_LINE = 64 * 2**20  # bytes
_OUTCOMES = tuple(str(outcome) for outcome in Outcome)


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

    stored: the outcome that an earlier verdict gave it, None for a rollout.
    """

    file: str
    line: int
    record: dict[str, Any]
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
    *,
    matcher: str | None = None,
) -> Iterator[Rollout]:
    """The rollouts of a JSONL file, one at a time; every other line but blank ones is `on_bad`.

    on_bytes: told how many bytes were read, line by line. matcher: asked for by all of them,
    whatever they name. Raises OSError for an unreadable file.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            on_bytes(len(line))
            if not line.strip():
                continue
            found = parse_line(str(path), number, line, matcher)
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


def parse_line(
    file: str, number: int, line: bytes, matcher: str | None = None
) -> Rollout | BadLine:
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
    if matcher is not None:
        record["matcher"] = matcher
    if fault := rollout_fault(record):
        return BadLine(file, number, fault)
    return Rollout(file, number, record, stored)


def rollout_fault(record: dict[str, Any]) -> str | None:
    """What keeps a record from being judged, or None."""
    if not isinstance(record.get("completion"), str):
        return "field 'completion' is missing or no text; a rollout has one completion a line"
    if record.get("answer") is None:
        return "field 'answer', the gold answer, is missing"
    outcome = record.get("outcome")
    if outcome is not None and outcome not in _OUTCOMES:
        return f"outcome {outcome!r} is unknown; one of: {', '.join(_OUTCOMES)}"
    if fault := request_fault(record):
        return fault
    try:
        gold_answers(record["answer"], matcher_names(record.get("matcher")))
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


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
