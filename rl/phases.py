"""Where the time of an online run goes: seconds of an optimizer step in each phase.

    next_step:  sync | sampling | rewards | old_logprobs | ref_logprobs
    then train (forward, backward, optimizer) | evaluation | other (logs, saves, files)

A phase is what passed since the one before was noted, so that all of them add up to the wall time.
Completions are judged while others are sampled: "sampling" ends with the last completion, "rewards"
is what is then still waited for. A rollout batch made one ahead costs what it is waited for.
"""

from __future__ import annotations

import threading
import time

from training.metrics import Metrics

PHASES: tuple[str, ...] = ("sync", "sampling", "rewards", "old_logprobs", "ref_logprobs")
PHASES += ("train", "evaluation", "other")


class Phases:
    """A stop watch of the thread that makes it; to all other threads it is deaf."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._last: float | None = None
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def note(self, phase: str) -> None:
        """The time since the last note was spent in this phase; the first note only starts."""
        if threading.get_ident() != self._thread:
            return
        now = time.perf_counter()
        if self._last is not None:
            self._seconds[phase] += now - self._last
        self._last = now

    def add_to(self, metrics: Metrics) -> None:
        """Add an optimizer step's seconds as `time/<phase>`, and begin the next one's.

        Every phase is there on every rank; the metrics are means over ranks and logged steps.
        """
        for phase, seconds in self._seconds.items():
            metrics.ratio(f"time/{phase}", seconds, 1.0)
        self._seconds = dict.fromkeys(PHASES, 0.0)
