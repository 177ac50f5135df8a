"""The completions of an evaluation on their way: one line a question, in their order, resumable.

    rows --request_of--> sampler.stream --put into order--> completions-greedy.jsonl, -sampled.jsonl

A file is only appended to. What a kill left half written is cut off and sampled again; each
question has its own seed, so it comes out as it would have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.questions import key_of
from internvl.data import Quarantine, Row, append_jsonl, dump_line
from internvl.data.resumable import naming_the_file, whole_lines
from internvl.errors import DataError
from internvl.hashing import stable_hash

if TYPE_CHECKING:
    from internvl.sampler import Completion, SampleRequest, SamplingConfig, StreamSampler

FLUSH_QUESTIONS = 256  # written and synced together,
FLUSH_SECONDS = 30.0  # or what is in order after so long
AHEAD = 1024  # questions that may be done before an older one is


@dataclass
class Pace:
    """What was sampled now, and how long it took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def question_seed(seed: int, question_id: str) -> int:
    """The seed of one question: 31 bits from the evaluation's seed and the question's id."""
    return stable_hash(seed, question_id) % 2**31


@dataclass(frozen=True)
class Pass:
    """One pass over all questions, and the file that its completions go to."""

    path: Path
    rows: Sequence[Row]
    config: SamplingConfig
    seed: int

    def done(self) -> int:
        """How many questions are on disk; a torn end of the file is cut off.

        Raises `DataError` where the file holds other questions.
        """
        if not self.path.exists():
            return 0
        done = end = 0
        for number, position, record in whole_lines(self.path):
            row = self.rows[done] if done < len(self.rows) else None
            if row is None or [record.get("dataset"), record.get("id")] != [*key_of(row.data)]:
                raise DataError(f"{self.path}:{number}: another question than was expected there")
            done, end = done + 1, position
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return done

    def run(
        self, open_sampler: Callable[[], StreamSampler], quarantine: Quarantine, total: int
    ) -> Pace:
        """Sample what is not on disk yet; the sampler is opened only where there is any.

        total: the rows that the quarantine's share is taken of. Raises `DataError` when the sampler
        refuses more questions than the quarantine allows; what is in order is on disk then, too.
        """
        done, pace = self.done(), Pace()
        if done < len(self.rows):
            started = time.monotonic()
            self._sample(done, open_sampler(), quarantine, pace, total)
            pace.seconds = time.monotonic() - started
        return pace

    def _sample(
        self, done: int, sampler: StreamSampler, quarantine: Quarantine, pace: Pace, total: int
    ) -> None:
        from tqdm import tqdm

        found: dict[int, list[Completion] | DataError] = {}
        lines: list[str] = []
        upcoming, flushed = done, time.monotonic()
        what = "greedy" if self.config.temperature == 0 else f"{self.config.n} samples"
        bar = tqdm(total=len(self.rows), initial=done, desc=what, unit="question")
        answers = sampler.stream(self._requests(done), self.config, ahead=AHEAD)
        try:
            with closing(answers), bar:
                for number, answer in answers:
                    found[done + number] = answer
                    if not isinstance(answer, DataError):
                        pace.tokens += sum(len(one.token_ids) for one in answer)
                    bar.set_postfix_str(_rate(pace.tokens, bar), refresh=False)
                    bar.update()
                    while upcoming in found:
                        lines.append(self._line(upcoming, found.pop(upcoming), quarantine))
                        upcoming += 1
                    late = time.monotonic() - flushed > FLUSH_SECONDS
                    if len(lines) >= FLUSH_QUESTIONS or (lines and late):
                        lines, flushed = self._write(lines), time.monotonic()
                        quarantine.check(total)
        finally:
            self._write(lines)
        quarantine.check(total)

    def _requests(self, start: int) -> Iterator[SampleRequest]:
        from internvl.sampler import request_of

        for number in range(start, len(self.rows)):
            row = self.rows[number]
            yield request_of(row, question_seed(self.seed, row.data["id"]))

    def _line(
        self, number: int, answer: list[Completion] | DataError, quarantine: Quarantine
    ) -> str:
        row = self.rows[number]
        dataset, question_id = key_of(row.data)
        record: dict[str, Any] = {"dataset": dataset, "id": question_id}
        if isinstance(answer, DataError):
            quarantine.add(row.file, row.line, str(answer), row.data)
            return dump_line({**record, "fault": str(answer)})
        completions = [
            {"text": one.text, "tokens": len(one.token_ids), "finish_reason": one.finish_reason}
            for one in answer
        ]
        return dump_line({**record, "completions": completions})

    def _write(self, lines: list[str]) -> list[str]:
        """Append lines and sync; returns the empty list to go on with."""
        if lines:
            with naming_the_file(self.path), append_jsonl(self.path) as out:
                out.writelines(lines)
        return []

    def answers(self) -> Iterator[list[dict[str, Any]] | str]:
        """Of each question the completions that are on disk, or why it has none, in order."""
        for _, _, record in whole_lines(self.path):
            yield record["fault"] if "fault" in record else record["completions"]


def _rate(tokens: int, bar: Any) -> str:
    elapsed = bar.format_dict["elapsed"]
    return f"{tokens / elapsed:,.0f} tokens/s" if elapsed else ""
