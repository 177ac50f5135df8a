"""Rollouts: n completions per question, in the order of the questions, resumable.

    question rows --request_of--> sampler.stream --put into order--> a batch on disk --> yielded

How a killed run goes on is told in `mmpr.resumable`. Each question has its own seed, so neither the
batch size nor a restart changes what is sampled. Pictures are decoded when the sampler comes to
them, and no more questions wait for an older one than a few batches: memory does not grow with the
number of questions, but for their ids.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
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
from internvl.data.resumable import check_same_run, meta_path, naming_the_file, whole_lines
from internvl.errors import DataError, UserError
from internvl.hashing import stable_hash
from mmpr.resumable import recover

if TYPE_CHECKING:
    from internvl.sampler import Completion, SampleRequest, SamplingConfig, StreamSampler

AHEAD = 4  # batches of questions that may be done before an older one is
FLUSH_SECONDS = 30.0  # what is in order is written after them, whole batch or not
# of a question, what its rollouts depend on
_COMPARED = ("question", "image", "answer", "system", "video", "num_frames", "max_tiles")


@dataclass
class SampleReport:
    """What a run did.

    sampled: questions sampled now. done_before: by an earlier start. bad: rows in quarantine.
    tokens, cut_off: sampled now; completions that ran into max_tokens. styles: questions sampled
    now by the form that they ask for.
    """

    sampled: int = 0
    done_before: int = 0
    bad: int = 0
    tokens: int = 0
    cut_off: int = 0
    styles: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class SamplePlan:
    """What is to be sampled into a file.

    pending: the questions that it does not hold. done: how many it holds. total: rows read, bad
    ones included.
    run: `describe_run` of this run. root: see `portable_record`.
    """

    output: Path
    config: SamplingConfig
    run: dict[str, Any]
    pending: Sequence[Row]
    done: int
    total: int
    root: Path | None = None


def question_seed(seed: int, question_id: str) -> int:
    """The seed of one question: 31 bits from the run's seed and the question's id."""
    return stable_hash(seed, question_id) % 2**31


def describe_run(
    *,
    model: str,
    fingerprint: str,
    seed: int,
    config: SamplingConfig,
    dtype: str,
    **more: str,
) -> dict[str, Any]:
    """All that the rollouts depend on besides the questions, as written to `.meta.json`.

    more: what else must be the same when the run goes on (the prompt style).
    """
    facts = {"model": model, "fingerprint": fingerprint, "seed": seed, "dtype": dtype}
    return {**facts, **asdict(config), **more}


def plan_sampling(
    rows: Sequence[Row],
    *,
    output: Path,
    config: SamplingConfig,
    run: dict[str, Any],
    root: Path | None = None,
    bad: int = 0,
) -> SamplePlan:
    """What is left to sample; a torn end of `output` is cut off. Nothing is sampled.

    bad: rows that were put aside when `rows` were read.
    Raises UserError when `output` belongs to another run or to other questions.
    """
    check_same_run(output, run)
    done = recover(output, config.n, digest)
    pending = pending_rows(rows, done, output, root)
    return SamplePlan(output, config, run, pending, len(done), len(rows) + bad, root)


def digest(record: Mapping[str, Any]) -> int:
    """A number for what the rollouts of a question depend on."""
    return stable_hash(*(json.dumps(record.get(key), sort_keys=True) for key in _COMPARED))


def first_image(output: Path) -> str | list[str] | None:
    """The image of the first question sampled that has one, as it is written there."""
    for _, _, record in islice(whole_lines(output), 10_000):
        if record.get("image"):
            image: str | list[str] = record["image"]
            return image
    return None


def pending_rows(
    rows: Sequence[Row], done: Mapping[str, int], output: Path, root: Path | None = None
) -> Selection:
    """The questions still to sample, each once whatever its data set's `repeat_time`.

    done: id -> `digest`. root: see `portable_record`. Raises UserError when a done one has changed
    or vanished, or when data sets of a meta.json share an id: rollouts are told apart by it.
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
        now = portable_record(row, output, root, write=False)
        if digest(now) != done[question_id]:
            raise UserError(
                f"{row.file}:{row.line}: {_changed_field(now, output)!r} of question "
                f"{question_id!r} has changed since {output} was begun. Give another --output."
            )
    if vanished := done.keys() - places.keys():
        raise UserError(
            f"{output} holds question {min(vanished)!r}, which is not among the questions now. "
            "Give another --output, or the same questions to go on."
        )
    return Selection(rows, pending)


def _changed_field(now: Mapping[str, Any], output: Path) -> str:
    """The field of a question that is not as in its rollouts."""
    before = next(record for _, _, record in whole_lines(output) if record["id"] == now["id"])
    return next(key for key in _COMPARED if before.get(key) != now.get(key))


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
    """The sampler's request for one question; its images are decoded when they are asked for."""
    from internvl.sampler import request_of

    return request_of(row, question_seed(seed, row.data["id"]))


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


class _Writer:
    """Answers in any order to records on disk in the order of the questions."""

    def __init__(self, plan: SamplePlan, model: str, quarantine: Quarantine, report: SampleReport):
        self.plan, self.model = plan, model
        self.quarantine, self.report = quarantine, report
        self.records: list[dict[str, Any]] = []  # in order, and not yet on disk
        self.questions = 0  # that `records` stand for, those put aside included
        self._asked: dict[int, Row] = {}
        self._found: dict[int, list[Completion] | DataError] = {}
        self._next = 0
        self._flushed = time.monotonic()

    def late(self) -> bool:
        """Whether records wait for the disk for long."""
        return bool(self.records) and time.monotonic() - self._flushed > FLUSH_SECONDS

    def requests(self) -> Iterator[SampleRequest]:
        """The requests of all pending questions."""
        for number, row in enumerate(self.plan.pending):
            self._asked[number] = row
            yield make_request(row, self.plan.run["seed"])

    def put(self, number: int, answer: list[Completion] | DataError) -> None:
        """Take the answer to a question."""
        self._found[number] = answer
        while self._next in self._found:
            self._take(self._asked.pop(self._next), self._found.pop(self._next))
            self._next += 1

    def _take(self, row: Row, answer: list[Completion] | DataError) -> None:
        plan = self.plan
        self.questions += 1
        try:
            if isinstance(answer, DataError):
                raise answer
            with naming_the_file(plan.output.parent):
                question = portable_record(row, plan.output, plan.root)
        except DataError as error:
            with naming_the_file(self.quarantine.path or plan.output):
                self.quarantine.add(row.file, row.line, str(error), row.data)
            return
        self.records += rollout_records(
            question,
            answer,
            model=self.model,
            seed=question_seed(plan.run["seed"], row.data["id"]),
            config=plan.config,
        )
        self.report.sampled += 1
        self.report.styles[question.get("prompt_style", "none")] += 1
        self.report.tokens += sum(len(completion.token_ids) for completion in answer)
        self.report.cut_off += sum(one.finish_reason == "length" for one in answer)

    def flush(self) -> list[dict[str, Any]]:
        """Write and sync what is in order; returns its records."""
        records, self.records, self.questions = self.records, [], 0
        with naming_the_file(self.plan.output), append_jsonl(self.plan.output) as out:
            out.writelines(map(dump_line, records))
        self._flushed = time.monotonic()
        return records


def sample_batches(
    plan: SamplePlan,
    sampler: StreamSampler,
    quarantine: Quarantine,
    *,
    report: SampleReport | None = None,
    batch_questions: int = 256,
    progress: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """Sample what is pending; yields the rollout records of each batch once they are on disk.

    The engine has requests in flight while a batch is with the caller, but an engine in this
    process does not compute until the next one is asked for. report: filled on the way. Questions
    with a bad image, or too long for the model, go to the quarantine.
    Raises UserError when the file belongs to another run or cannot be written, DataError when too
    many rows are bad; what was sampled and is in order is on disk then, too.
    """
    from tqdm import tqdm

    run = {**plan.run, "backend": sampler.name}
    model = run["model"] = check_same_run(plan.output, run)
    with naming_the_file(meta_path(plan.output)):
        write_json(meta_path(plan.output), run)
    report = SampleReport() if report is None else report
    report.done_before = plan.done
    writer = _Writer(plan, model, quarantine, report)
    total = plan.done + len(plan.pending)
    bar = tqdm(
        total=total, initial=plan.done, desc="sampling", unit="question", disable=not progress
    )
    answers = sampler.stream(writer.requests(), plan.config, ahead=AHEAD * batch_questions)
    try:
        with closing(answers), bar:
            for number, answer in answers:
                writer.put(number, answer)
                bar.update()
                if writer.questions >= batch_questions or writer.late():
                    records = writer.flush()
                    quarantine.check(plan.total)  # after writing: what was sampled is kept
                    yield records
    finally:
        report.bad = quarantine.count
        last = writer.flush() if writer.records else []  # none where writing has failed
    quarantine.check(plan.total)
    if last:
        yield last
