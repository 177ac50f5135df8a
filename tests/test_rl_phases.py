"""The stop watch of an online run: every second is somebody's, and other threads count nothing."""

from __future__ import annotations

import threading

import pytest

from rl import phases
from rl.phases import PHASES, Phases
from training.metrics import Metrics


def test_every_second_is_of_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    times, metrics = Phases(), Metrics()
    steps = [("sampling", 3.0), ("rewards", 1.0), ("train", 4.0)], [("train", 2.0)]
    times.note("other")  # what was before is nobody's
    for step in steps:
        for phase, seconds in step:
            now[0] += seconds
            thread = threading.Thread(target=times.note, args=("sync",))
            thread.start()
            thread.join()
            times.note(phase)
        times.add_to(metrics)
    values = metrics.values()
    assert values.keys() == {f"time/{phase}" for phase in PHASES}  # the same on every rank
    means = {"time/sampling": 1.5, "time/rewards": 0.5, "time/train": 3.0}  # of the two steps
    assert {name: value for name, value in values.items() if value} == means
