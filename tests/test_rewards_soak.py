"""Mutated completions: nothing crashes, hangs or grows, and what hangs costs its limit alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("count", "hangs"), [(600, 3), pytest.param(10_000, 30, marks=pytest.mark.slow)]
)
def test_mutated_completions(count, hangs):
    done = subprocess.run(
        [sys.executable, HERE / "soak.py", "--count", str(count), "--hangs", str(hangs)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["completions"] == count and report["families"]["hang"] == hangs
    assert report["longest_completion"] > 10**6
    assert report["faults"] == []
    # exactly those that are made to hang time out, each once (a second may be short for another one
    # of thousands on a machine with much else to do)
    assert report["hung_not"] == []
    by_accident = report["hung_by_accident"]
    assert len(by_accident) <= count // 5000, by_accident
    assert report["timeouts"] == report["outcomes"]["timeout"] == hangs + len(by_accident)
    # none died, and none was loaded twice
    assert report["deaths"] == 0 and report["processes_started"] == 2
    assert report["grown_mib"] < 150
    assert report["worker_peak_mib"] < 400
    # every outcome occurs, or the set is too tame
    assert set(report["outcomes"]) == {"correct", "wrong", "no_answer", "cannot_judge", "timeout"}
