"""Rollouts: n completions per question, written a batch of questions at a time, resumable.

How a killed run goes on is told in `mmpr.resumable`. Each question has its own seed, so neither the
batch size nor a restart changes what is sampled.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import (
    Quarantine,
    Row,
    Selection,
    append_jsonl,
    dump_line,
    image_fault,
    portable_record,
    write_json,
)
from internvl.errors import DataError, UserError
from mmpr.hashing import stable_hash
from mmpr.resumable import (
    Asked,
    check_same_run,
    meta_path,
    recover,
    sample_good,
    whole_lines,
)

if TYPE_CHECKING:
    from internvl.sampler import Completion, Sampler, SampleRequest, SamplingConfig


@dataclass(frozen=True)
class SampleReport:
    """What a run did: questions sampled now, done before, put into quarantine; tokens sampled."""

    sampled: int
    done_before: int
    bad: int
    tokens: int
    cut_off: int  # completions that ran into max_tokens


def question_seed(seed: int, question_id: str) -> int:
    """The seed of one question: 31 bits from the run's seed and the question's id."""
    return stable_hash(seed, question_id) % 2**31


def describe_run(
    *, model: str, fingerprint: str, seed: int, config: SamplingConfig, dtype: str
) -> dict[str, Any]:
    """All that the rollouts depend on besides the questions, as written to `.meta.json`."""
    return {
        "model": model,
        "fingerprint": fingerprint,
        "seed": seed,
        "dtype": dtype,
        **asdict(config),
    }


def first_image(output: Path) -> str | list[str] | None:
    """The image of the first question sampled that has one, as it is written there."""
    for _, _, record in islice(whole_lines(output), 10_000):
        if record.get("image"):
            image: str | list[str] = record["image"]
            return image
    return None


def pending_rows(
    rows: Sequence[Row], done: dict[str, dict[str, Any]], output: Path, root: Path | None = None
) -> Selection:
    """The questions still to sample, each once whatever its data set's `repeat_time`.

    root: see `portable_record`. Raises UserError when a done one has changed or vanished, or when
    data sets of a meta.json share an id: rollouts are told apart by it.
    """
    places: dict[str, tuple[Path, int]] = {}
    pending = array("q")
    for number, row in enumerate(rows):
        question_id, place = row.data["id"], (row.file, row.line)
        if question_id in places:
            file, line = places[question_id]
            if (file, line) != place:
                raise UserError(
                    f"{row.file}:{row.line}: id {question_id!r} is that of {file}:{line}, too; "
                    "give each question an id of its own, or sample the data sets one by one"
                )
            continue
        places[question_id] = place
        if question_id not in done:
            pending.append(number)
            continue
        record, now = done[question_id], portable_record(row, output, root, write=False)
        for key in ("question", "image", "answer", "system", "video", "num_frames", "max_tiles"):
            if record.get(key) != now.get(key):
                raise UserError(
                    f"{row.file}:{row.line}: {key!r} of question {question_id!r} has changed since "
                    f"{output} was begun. Give another --output."
                )
    if vanished := done.keys() - places.keys():
        raise UserError(
            f"{output} holds question {min(vanished)!r}, which is not among the questions now. "
            "Give another --output, or the same questions to go on."
        )
    return Selection(rows, pending)


def only_bad_left(pending: Sequence[Row], quarantine: Quarantine) -> bool:
    """Whether no pending question has usable images; those looked at go to the quarantine.

    So a finished run that is started again need not load the model to find its bad rows again.
    """
    for row in pending:
        fault = image_fault(row)
        if fault is None:
            return False
        quarantine.add(row.file, row.line, fault, row.data)
    return True


def make_request(row: Row, seed: int) -> SampleRequest:
    """The sampler's request for one question; raises DataError for an image that is no good."""
    from internvl.sampler import request_of

    request = request_of(row, question_seed(seed, row.data["id"]))
    return replace(request, images=tuple(row.load_images()))


def rollout_records(
    question: dict[str, Any],
    completions: Sequence[Completion],
    *,
    model: str,
    seed: int,
    config: SamplingConfig,
) -> list[dict[str, Any]]:
    """One rollout record per completion of a question record; seed: the question's own."""
    return [
        {
            **question,
            "sample": index,
            "completion": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "model": model,
            "seed": seed,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_tokens": config.max_tokens,
        }
        for index, completion in enumerate(completions)
    ]


def _requests(
    rows: Sequence[Row], seed: int, quarantine: Quarantine, output: Path, root: Path | None
) -> list[Asked]:
    """The requests of the questions whose images are good; the others go to the quarantine."""
    asked = []
    for row in rows:
        try:
            request = make_request(row, seed)
            asked.append(Asked(row, request, portable_record(row, output, root)))
        except DataError as error:
            quarantine.add(row.file, row.line, str(error), row.data)
    return asked


def sample_questions(
    rows: Sequence[Row],
    sampler: Sampler,
    *,
    output: Path,
    config: SamplingConfig,
    run: dict[str, Any],
    quarantine: Quarantine,
    root: Path | None = None,
    batch_questions: int = 256,
    progress: bool = True,
) -> SampleReport:
    """Sample every question that `output` does not hold yet and append its rollouts.

    run: `describe_run` of this run. root: see `portable_record`. Questions with a bad image, or too
    long for the model, go to the quarantine.
    Raises UserError when `output` belongs to another run, DataError when too many rows are bad.
    """
    from tqdm import tqdm

    run = {**run, "backend": sampler.name}
    run["model"] = check_same_run(output, run)
    done = recover(output, config.n)
    pending = pending_rows(rows, done, output, root)
    write_json(meta_path(output), run)
    total = len(rows) + quarantine.count
    sampled = tokens = cut_off = 0
    bar = tqdm(
        total=len(rows), initial=len(done), desc="sampling", unit="question", disable=not progress
    )
    for start in range(0, len(pending), batch_questions):
        chunk = pending[start : start + batch_questions]
        requests = _requests(chunk, run["seed"], quarantine, output, root)
        answered = sample_good(sampler, requests, config, quarantine)
        with append_jsonl(output) as out:
            for asked, completions in answered:
                for record in rollout_records(
                    asked.record,
                    completions,
                    model=run["model"],
                    seed=asked.request.seed,
                    config=config,
                ):
                    out.write(dump_line(record))
                    tokens += len(record["token_ids"])
                    cut_off += record["finish_reason"] == "length"
        sampled += len(answered)
        bar.update(len(chunk))
        quarantine.check(total)  # after writing: what was sampled is kept
    bar.close()
    return SampleReport(sampled, len(done), quarantine.count, tokens, cut_off)
