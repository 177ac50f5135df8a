"""Majority votes: which answers are one, and what a majority of them says."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.datasets import load_table
from rewards.estimates import majority, majority_at_k
from rewards.judging import Verifier
from rewards.pool import VerifierPool
from rewards.verdict import Comparison, Outcome
from rewards.votes import Votes


@pytest.fixture(scope="module")
def verifier() -> Any:
    """One pool for all; its process starts for the first mathematics."""
    with Verifier(VerifierPool(1), table=load_table()) as made:
        yield made


CHARTQA = {"answer": "100", "dataset": "ChartQA_TEST"}
CITY = {"answer": "B", "options": ["Paris", "London", "Rome"]}
CASES: list[tuple[dict[str, Any], list[str | None], Votes]] = [
    ({"answer": "9"}, ["9", "8", "9.0", None, " 9 "], [0, 1, 0, None, 0]),
    # a tolerance of 5% makes no class of two answers
    (CHARTQA, ["96", "100", "92", "100.0"], [0, 1, 2, 1]),
    (CITY, ["B", "London", "(b)", "Paris", "a", "York"], [0, 0, 0, 1, 1, 2]),
    ({"answer": "x", "dataset": "DocVQA_VAL"}, ["total", "totals", "Total."], [0, 1, 0]),
    ({"answer": "two dogs", "matcher": "vqa"}, ["2 dogs", "the two dogs", "dogs"], [0, 0, 1]),
    (
        {"answer": r"\frac{x}{2}", "matcher": "math"},
        ["x/2", "2x", r"\frac{1}{2}x", "x+x"],
        [0, 1, 0, 1],
    ),
    ({"answer": ["a", "b"], "matcher": "list"}, ["a, b", "b, a", "a"], [0, 0, 1]),
    ({"answer": "red", "matcher": "judge"}, ["red", "crimson", "Red"], [0, 1, 0]),
    ({"answer": "red", "matcher": ["judge", "vqa"]}, ["red", "the red"], [0, 0]),
    ({"answer": "1"}, [None, None], [None, None]),
]


def test_answers_that_are_one(verifier: Verifier) -> None:
    found = verifier.votes((record, answers) for record, answers, _ in CASES)
    assert list(found) == [votes for _, _, votes in CASES]


def test_comparisons_are_of_texts_as_they_are(verifier: Verifier) -> None:
    """What an extraction would take from a text is not taken."""
    text = "Final answer: 9"
    asked = [
        [Comparison("exact", text, "9")],
        [Comparison("exact", "8", "9"), Comparison("number", "9.0", "9")],
        [Comparison("number", "9", "no number")],
    ]
    found = list(verifier.pool.compare(asked))
    assert [verdict.outcome for verdict in found] == [
        Outcome.WRONG,
        Outcome.CORRECT,
        Outcome.CANNOT_JUDGE,
    ]
    assert found[0].extracted == text


def plain_majority(votes: list[int | None], right: list[bool]) -> Fraction:
    """Each tied answer drawn in turn, in another way of writing it."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return Fraction(0)
    tied = [vote for vote in counts if counts[vote] == max(counts.values())]
    total = Fraction(0)
    for winner in tied:
        own = [r for vote, r in zip(votes, right, strict=True) if vote == winner]
        total += Fraction(sum(own), len(own))
    return total / len(tied)


BALLOTS = st.lists(st.tuples(st.none() | st.integers(0, 3), st.booleans()), min_size=1, max_size=9)


@given(BALLOTS, st.randoms(use_true_random=False))
def test_majority(ballots: list[tuple[int | None, bool]], rng: random.Random) -> None:
    votes, right = [vote for vote, _ in ballots], [is_right for _, is_right in ballots]
    value = majority(votes, right)
    assert value == pytest.approx(float(plain_majority(votes, right)), abs=1e-12)
    shuffled = rng.sample(ballots, len(ballots))  # no order has a say
    assert majority(*map(list, zip(*shuffled, strict=True))) == pytest.approx(value, abs=1e-12)
    renamed = [None if vote is None else 7 - vote for vote in votes]
    assert majority(renamed, right) == pytest.approx(value, abs=1e-12)


@given(BALLOTS)
def test_majority_of_one_is_the_mean(ballots: list[tuple[int | None, bool]]) -> None:
    """An answer is right or wrong alike in all its class here, and no answer is never right."""
    votes = [vote for vote, _ in ballots]
    right = [vote is not None and vote % 2 == 0 for vote in votes]
    mean = sum(right) / len(right)
    assert majority_at_k(votes, right, 1) == pytest.approx(mean, abs=1e-12)
    assert majority_at_k(votes, right, len(votes)) == majority(votes, right)


def test_majority_at_k_uses_runs_that_do_not_overlap() -> None:
    votes, right = [0, 0, 1, 1, 1], [True, True, False, False, False]
    assert majority_at_k(votes, right, 2) == 0.5  # [0, 0] and [1, 1]; the fifth is left over
    assert majority_at_k(votes, right, 5) == 0.0
