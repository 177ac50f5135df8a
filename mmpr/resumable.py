"""Completions that are asked for once: a file that is only appended to, and what may go on in it.

The file alone says how far a run came: a question is done when its n completions are there.
Whatever a kill left behind it (a torn line, some completions of a question) is cut off and made
again. Beside the file, `<output>.meta.json` says what it depends on; a run with another model or
setting is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Quarantine, Row
from internvl.errors import DataError, UserError

if TYPE_CHECKING:
    from internvl.sampler import Completion, Sampler, SampleRequest, SamplingConfig


def meta_path(output: Path) -> Path:
    """Where the description of a file of completions lies."""
    return output.with_name(output.name + ".meta.json")


def check_same_run(output: Path, wanted: dict[str, Any]) -> str:
    """The model name to write into records; raises UserError when `output` is of another run.

    A model is compared by its fingerprint, not by its path; the name first given stays.
    """
    path = meta_path(output)
    if not path.exists():
        if output.exists() and output.stat().st_size:
            raise UserError(
                f"{output} exists without {path.name}: it is not known what made it. "
                "Give another --output."
            )
        return str(wanted["model"])
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    changed = [
        f"{key} was {found.get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if key != "model" and found.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{output} was made by another run ({'; '.join(changed)}). "
            "Give another --output, or the same options to go on."
        )
    return str(found["model"])


def whole_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, end offset, record) of every line; stops before a torn last line."""
    with path.open("rb") as lines:
        position = 0
        torn: str | None = None
        for number, raw in enumerate(lines, start=1):
            if torn is not None:
                raise DataError(f"{path}:{number - 1}: {torn}, and more lines follow")
            position += len(raw)
            if not raw.endswith(b"\n"):
                return
            try:
                record = json.loads(raw)
            except ValueError as error:
                torn = f"not valid JSON ({error})"
                continue
            yield number, position, record


def recover(output: Path, n: int, keep: Callable[[dict[str, Any]], Any] = dict) -> dict[str, Any]:
    """Cut an interrupted file back to whole questions; id -> what is kept of each that is done.

    keep: what of its first record (all of it by default).
    Raises DataError when the file is not what a run with n samples a question writes.
    """
    if not output.exists():
        return {}
    done: dict[str, Any] = {}
    end_of_whole = count = 0
    first: dict[str, Any] = {}
    for number, end, record in whole_lines(output):
        question_id = record.get("id")
        same = count == 0 or question_id == first["id"]
        if record.get("sample") != count or not same or question_id in done:
            raise DataError(
                f"{output}:{number}: sample {record.get('sample')!r} of question "
                f"{question_id!r} where sample {count} was expected; the file was changed"
            )
        first = record if count == 0 else first
        count += 1
        if count == n:
            done[first["id"]] = keep(first)
            count, end_of_whole = 0, end
    if end_of_whole < output.stat().st_size:
        os.truncate(output, end_of_whole)
    return done


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """A file that cannot be written (a full disk) as a `UserError` that says how to go on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written: {error.strerror}. What was sampled "
            "before is kept; make room, and start the same command again to go on"
        ) from error


@dataclass(frozen=True)
class Asked:
    """A question, its request, and its record as the file repeats it."""

    row: Row
    request: SampleRequest
    record: dict[str, Any]


def sample_good(
    sampler: Sampler,
    requests: Sequence[Asked],
    config: SamplingConfig,
    quarantine: Quarantine,
) -> list[tuple[Asked, list[Completion]]]:
    """Sample a batch; a request that the sampler refuses (too long) goes to the quarantine.

    It refuses the whole batch, so halves are tried until the culprit is alone.
    """
    if not requests:
        return []
    try:
        answers = sampler.sample([asked.request for asked in requests], config)
    except DataError as error:
        if len(requests) == 1:
            row = requests[0].row
            quarantine.add(row.file, row.line, str(error), row.data)
            return []
        half = len(requests) // 2
        return [
            *sample_good(sampler, requests[:half], config, quarantine),
            *sample_good(sampler, requests[half:], config, quarantine),
        ]
    return list(zip(requests, answers, strict=True))
