"""What the tests of sft's data tools share: rows, the command, an endpoint, its faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from judge_server import Server, breaks, drops, fails, gives, says, serve

SOON = {"retry_after_ms": "5"}  # the server says how long to wait: no half second
TAILS = ("rejected.jsonl", "undecided.jsonl", "quarantine.jsonl")


def row(number: int, *texts: str, **more: Any) -> dict[str, Any]:
    """A conversation; texts: human and gpt in turn."""
    turns = [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
    ]
    return {"id": f"s{number}", "conversations": turns, **more}


def command(*words: object) -> int:
    """`sft ...` in this process; its exit code."""
    from sft.cli import main

    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none where it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def beside(output: Path, tail: str) -> list[dict[str, Any]]:
    return read(output.with_name(f"{output.name}.{tail}"))


def summary(output: Path) -> dict[str, Any]:
    return json.loads(output.with_name(output.name + ".summary.json").read_text())


def accounted(output: Path, ids: list[str]) -> dict[str, list[str]]:
    """The ids in each file, which are all that there are, each once and in order."""
    found = {"kept": [one["id"] for one in read(output)]}
    for tail in TAILS:
        found[tail.split(".")[0]] = [one["row"]["id"] for one in beside(output, tail)]
    assert sorted(name for names in found.values() for name in names) == sorted(ids)
    assert all(names == [name for name in ids if name in names] for names in found.values())
    facts = summary(output)
    names = {"quarantined" if name == "quarantine" else name: found[name] for name in found}
    assert {name: facts[name] for name in names} == {n: len(some) for n, some in names.items()}
    assert facts["read"] == len(ids)
    return found


@contextmanager
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine, no proxy in between, and a key for it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serve() as server:
        yield server


FAULTS = [
    fails(500, **SOON),
    fails(429, **SOON),
    drops,
    breaks,
    gives(b"<html>busy</html>", Content_Type="text/html"),
    says("Certainly! Here you are:"),
    says('{"score": "high"'),
    says("", after=1.0),  # later than the client waits
]
