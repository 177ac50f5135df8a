"""A judge beside the rules: who is asked what."""

from __future__ import annotations

import json
from typing import Any

import pytest
from judge_server import MakeJudge, Server, fails, judges, make, server

from rewards import Outcome, VerifierPool
from rewards.judging import judge_records, judging_fault

__all__ = ["make", "server"]  # fixtures

NUMBER = {"question": "How many?", "answer": "9", "matcher": "number"}
CITY = {"question": "Which city?", "answer": ["New York", "NYC"], "matcher": "judge"}
BOTH = {**CITY, "matcher": ["exact", "judge"], "options": ["London", "New York"]}
NO_GOLD = {"question": "Describe it.", "answer": ""}
OPEN = {"question": "How many?", "answer": "a few", "matcher": "number"}  # gold is no number
MIXED: list[tuple[dict[str, Any], str, str, str]] = [
    (NUMBER, "Final answer: 9", "correct", "number"),
    (CITY, "Final answer: new york", "correct", "exact"),  # as the rules say: not asked
    (CITY, "Final answer: the Big Apple", "correct", "judge"),
    (CITY, "Final answer: Paris", "wrong", "judge"),
    (CITY, "I cannot tell.", "no_answer", "exact"),
    (BOTH, "Final answer: Gotham", "correct", "judge"),
    (NUMBER, "Final answer: 8", "wrong", "number"),  # what a rule calls wrong is not asked
    (NO_GOLD, "Final answer: 3", "cannot_judge", "exact"),  # never asked
    (OPEN, "Final answer: 3", "cannot_judge", "number"),
]


def test_judge_and_rules(server: Server, make: MakeJudge) -> None:
    right = ("the Big Apple", "Gotham", "3")
    server.answers = [judges(lambda data: data["prediction"] in right)]
    judge, pairs = make(max_concurrency=1), [(record, text) for record, text, *_ in MIXED]
    with VerifierPool() as pool:
        verdicts = list(judge_records(iter(pairs), pool, judge))
        assert [(str(v.outcome), v.matcher) for v in verdicts] == [row[2:] for row in MIXED]
        scores = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, None, None]
        assert [verdict.score for verdict in verdicts] == scores
        sent = [json.loads(body["messages"][1]["content"]) for _, _, body in server.requests]
        assert [one["prediction"] for one in sent] == ["the Big Apple", "Paris", "Gotham"]
        assert sent[2]["options"] == ["London", "New York"] and sent[0]["gold"] == CITY["answer"]

        asked = list(judge_records(pairs, pool, judge, ask_when="cannot_judge"))
        assert asked[:-1] == verdicts[:-1]
        assert (asked[-1].outcome, asked[-1].matcher) == (Outcome.CORRECT, "judge")

        server.answers = [fails(400)]
        failed = list(judge_records(pairs, pool, judge))[2]
        assert (failed.outcome, failed.score) == (Outcome.CANNOT_JUDGE, None)
        assert (failed.extracted, failed.reason) == ("the Big Apple", "judge: HTTP 400")
        assert failed.format_ok


def test_a_question_that_names_the_judge_without_one() -> None:
    message = "matcher 'judge' needs a judge: give judge_base_url and judge_model"
    assert judging_fault(CITY, has_judge=False) == message
    assert judging_fault(CITY, has_judge=True) is None
    assert judging_fault(BOTH, has_judge=True) is None
    assert "psychic" in str(judging_fault({"matcher": ["judge", "psychic"]}, has_judge=True))
    assert judging_fault(NUMBER, has_judge=False) is None
    assert "'answer' is empty" in str(judging_fault(NO_GOLD, has_judge=True))
    assert judging_fault(NO_GOLD, has_judge=True, unanswered=True) is None
    with VerifierPool() as pool:
        with pytest.raises(ValueError, match=message):
            list(judge_records([(CITY, "Final answer: Paris")], pool))
        with pytest.raises(ValueError, match="ask_when is 'always'; one of: named, cannot_judge"):
            list(judge_records([], pool, ask_when="always"))
