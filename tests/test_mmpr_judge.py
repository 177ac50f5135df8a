"""`mmpr verify` with tables of one's own and a judge behind an endpoint."""

import json
import sqlite3

import pytest
from judge_server import judges, serve
from sampling_cases import command

from internvl.data import write_jsonl


def rollout(number, completion, answer, **more):
    return {
        "id": f"q{number}", "question": "What?", "answer": answer, "sample": 0,
        "completion": f"Final answer: {completion}", "finish_reason": "stop", **more,
    }  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch):
    """A judge that holds "big" for large."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serve() as server:
        server.answers = [judges(lambda data: data["prediction"] == "big")]
        yield server


ROLLOUTS = [
    rollout(0, "big", "large", matcher="judge"),
    rollout(1, "small", "large", matcher="judge"),
    rollout(2, "large", "large", matcher="judge"),  # the rule is enough
    rollout(3, "small", "large"),  # nobody asks
    rollout(4, "b, a", "a, b", dataset="pairs_of_mine"),
]


def test_a_judge_and_a_table(endpoint, tmp_path, capsys):
    write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    (tmp_path / "mine.yaml").write_text('- {match: "pairs*", matcher: list, why: two items}\n')
    words = ("verify", tmp_path / "r.jsonl", "--output", tmp_path / "v.jsonl")
    words += ("--datasets", tmp_path / "mine.yaml", "--judge-base-url", endpoint.url)
    words += ("--judge-cache", tmp_path / "kept.sqlite")
    assert command(*words) == 2
    assert "judge_model" in capsys.readouterr().err
    assert command(*words, "--judge-model", "m") == 0
    verdicts = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [(v["outcome"], v["matcher"]) for v in verdicts] == [
        ("correct", "judge"),
        ("wrong", "judge"),
        ("correct", "exact"),
        ("wrong", "exact"),
        ("correct", "list"),
    ]
    asked = len(endpoint.requests)
    assert command(*words, "--judge-model", "m") == 0
    assert len(endpoint.requests) == asked + 1  # the check at the start alone


def test_without_a_judge_its_questions_are_put_aside(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    words = ("verify", tmp_path / "r.jsonl", "--output", tmp_path / "v.jsonl", "--max-bad", 3)
    assert command(*words) == 0
    text = (tmp_path / "v.jsonl.quarantine.jsonl").read_text()
    bad = [json.loads(line) for line in text.splitlines()]
    assert [one["line"] for one in bad] == [1, 2, 3]
    assert {one["reason"] for one in bad} == {
        "matcher 'judge' needs a judge: give judge_base_url and judge_model"
    }


def test_a_cache_that_breaks_is_one_line(endpoint, tmp_path, capsys):
    def answer(data):
        with sqlite3.connect(tmp_path / "kept.sqlite") as database:
            database.execute("DROP TABLE IF EXISTS replies")
        database.close()
        return True

    write_jsonl(tmp_path / "r.jsonl", ROLLOUTS[:1])
    endpoint.answers = [judges(answer)]
    words = ("verify", tmp_path / "r.jsonl", "--output", tmp_path / "v.jsonl")
    words += ("--judge-base-url", endpoint.url, "--judge-model", "m")
    assert command(*words, "--judge-cache", tmp_path / "kept.sqlite") == 2
    told = capsys.readouterr().err
    assert "kept.sqlite: no such table" in told and "Traceback" not in told
