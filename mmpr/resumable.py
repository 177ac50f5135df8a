"""Completions that are asked for once: a file that is only appended to, and what may go on in it.

The file alone says how far a run came: a question is done when its n completions are there.
Whatever a kill left behind it (a torn line, some completions of a question) is cut off and made
again. What the file depends on is kept beside it: `internvl.data.resumable`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Quarantine, Row
from internvl.data.resumable import whole_lines
from internvl.errors import DataError

if TYPE_CHECKING:
    from internvl.sampler import Completion, Sampler, SampleRequest, SamplingConfig


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
