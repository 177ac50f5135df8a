"""Completions are judged while others are sampled.

    sampler.stream --as they are done--> queue --one thread--> verdicts
                                                 put into the order of the questions

Mathematics is compared in processes and a judge is asked over the network, so the thread mostly
waits; what comes out depends on neither side's speed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from internvl.errors import DataError
from internvl.sampler import Completion, SampleRequest, SamplingConfig, StreamSampler
from rewards import Verdict
from rl.phases import Phases
from rl.rewarding import Verify

Answers = list[list[Completion] | DataError]


def sample_and_judge(
    sampler: StreamSampler,
    verify: Verify,
    requests: Sequence[SampleRequest],
    records: Sequence[Mapping[str, Any]],
    config: SamplingConfig,
    times: Phases,
) -> tuple[Answers, list[list[Verdict]]]:
    """The completions of each request and their verdicts, in the order of the requests.

    records: the questions', one a request. A request that cannot be answered has its `DataError`
    and no verdicts. What `verify` raises is raised here, and nothing is sampled any further.
    """
    answers: Answers = [[] for _ in requests]
    with _Judge(verify) as judge, closing(sampler.stream(requests, config)) as stream:
        for number, answer in stream:
            answers[number] = answer
            if not isinstance(answer, DataError):
                judge.put(number, [(records[number], done.text) for done in answer])
            judge.check()
        times.note("sampling")
        verdicts = judge.finish()
    return answers, [verdicts.get(number, []) for number in range(len(requests))]


class _Judge:
    """A thread that judges what it is given, in that order."""

    def __init__(self, verify: Verify):
        self._verify = verify
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._verdicts: dict[int, list[Verdict]] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Judge:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._waiting.put(None)

    def put(self, number: int, asked: list[tuple[Mapping[str, Any], str]]) -> None:
        self._waiting.put((number, asked))

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self) -> dict[int, list[Verdict]]:
        """All verdicts, by number."""
        self._waiting.put(None)
        self._thread.join()
        self.check()
        return self._verdicts

    def _work(self) -> None:
        try:
            while (item := self._waiting.get()) is not None and not self._stopped:
                number, asked = item
                self._verdicts[number] = list(self._verify(asked))
        except BaseException as error:  # who waits for the verdicts raises it
            self._error = error
