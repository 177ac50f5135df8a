"""The data tools killed for real, again and again: no row is lost, none comes twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from data_tool_cases import accounted, command, endpoint, row
from judge_server import Server, replies
from test_sft_filter import judge
from test_sft_translate import translate

from internvl.data import write_jsonl

WORKERS = 4
ROWS = [
    row(n, f"<image>\nWhat is number {n}?", f"quality {n % 10}, it is no. {n}", image="a.png")
    for n in range(120)
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with endpoint(monkeypatch) as running:
        yield running


def start_and_kill(words: list[str], server: Server, requests: int) -> None:
    """Start the command; kill it once so many more requests have come."""
    number = len(server.requests) + requests
    process = subprocess.Popen(
        [sys.executable, "-m", "sft", *words],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while len(server.requests) < number and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


TOOLS = {
    "filter": (judge, ["--domain", "general", "--quality-of-images"]),
    "translate": (translate, ["--language", "Chinese"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_killed_again_and_again(server: Server, tmp_path: Path, tool: str) -> None:
    says, more = TOOLS[tool]
    data, out, other = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    write_jsonl(data, ROWS)
    words = [tool, str(data), "--base-url", server.url, "--model", "m", *more]
    words += ["--workers", str(WORKERS), "--output"]
    server.answers = [replies(says)]
    assert command(*words, other) == 0  # never interrupted
    server.requests.clear()

    server.answers = [replies(says, after=0.05)]
    kills = (1, 40, 30, 50)
    for requests in kills:
        start_and_kill([*words, str(out)], server, requests)
        assert not out.exists()
    assert command(*words, out) == 0
    accounted(out, [one["id"] for one in ROWS])
    for tail in ("", ".rejected.jsonl"):
        here, there = (Path(f"{path}{tail}") for path in (out, other))
        assert here.exists() == there.exists()
        assert not here.exists() or here.read_bytes() == there.read_bytes()
    times = Counter(json.dumps(body) for _, _, body in server.requests)
    # only what was under way at a kill is asked again
    assert sum(times.values()) - len(times) <= WORKERS * len(kills)
    number = len(server.requests)
    assert command(*words, out) == 0 and len(server.requests) == number
