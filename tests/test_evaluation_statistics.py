"""The statistics of evaluations, against closed forms, scipy, and plain other versions."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cascade.comparison import compare_results
from cascade.metrics import Result, measure, powers_of_two, summarise
from cascade.recipe_stage import metric_names
from cascade.statistics import (
    mean_and_se,
    mean_interval,
    paired_means,
    paired_proportions,
    percentile,
    proportion_interval,
)

OUTCOMES = st.lists(st.booleans(), min_size=1, max_size=40)
SHARES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=40)


@given(OUTCOMES)
def test_proportions_have_wilson_s_interval(right: list[bool]) -> None:
    wanted = stats.binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
    found = proportion_interval(sum(right) / len(right), len(right))
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@given(SHARES)
def test_means_have_student_s_interval(values: list[float]) -> None:
    mean, se = mean_and_se(values)
    assert (mean, se) == pytest.approx((np.mean(values), stats.sem(values)), abs=1e-12)
    low, high = mean_interval(values)
    assert 0 <= low <= mean <= high <= 1
    if se:
        wanted = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=se)
        assert (low, high) == pytest.approx(np.clip(wanted, 0, 1), abs=1e-12)
    else:
        assert (low, high) == proportion_interval(mean, len(values))
        assert low < high


def test_one_question_has_no_error_and_a_wide_interval() -> None:
    assert mean_and_se([1.0]) == (1.0, None)
    assert mean_interval([1.0]) == proportion_interval(1.0, 1)
    assert mean_interval([1.0])[0] == pytest.approx(0.2065, abs=1e-4)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.sampled_from([0.5, 0.9, 0.99, 1]))
def test_percentiles_are_values_that_occur(values: list[int], share: float) -> None:
    found = percentile(values, share)
    assert found == np.quantile(values, share, method="inverted_cdf")


def mcnemar(b: int, c: int) -> float:
    """The exact test as it is in textbooks: twice the smaller tail of the coin."""
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n
    return min(1.0, 2 * tail)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_proportions(pairs: list[tuple[bool, bool]]) -> None:
    a, b = map(list, zip(*pairs, strict=True))
    found = paired_proportions(a, b)
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    n = len(pairs)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(mcnemar(only_a, only_b), abs=1e-12)
    assert found.difference == pytest.approx(found.b - found.a, abs=1e-12)
    # Bonett and Price 2012, eq. 4, by a table of four cells
    low = {"10": (only_a + 1) / (n + 2), "01": (only_b + 1) / (n + 2)}
    spread = math.sqrt((low["01"] + low["10"] - (low["01"] - low["10"]) ** 2) / (n + 2))
    half = NormalDist().inv_cdf(0.975) * spread
    middle = low["01"] - low["10"]
    wanted = (max(-1.0, middle - half), min(1.0, middle + half))
    assert found.ci == pytest.approx(wanted, abs=1e-12)
    swapped = paired_proportions(b, a)
    assert (swapped.p, swapped.difference) == (found.p, -found.difference)


def test_paired_means_are_the_bootstrap_s() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 80) / 4, rng.integers(0, 5, 80) / 4 + 0.0
    found = paired_means(a.tolist(), b.tolist(), seed=7)
    assert found == paired_means(a.tolist(), b.tolist(), seed=7)
    assert found.ci != paired_means(a.tolist(), b.tolist(), seed=8).ci
    scipy_s = stats.bootstrap(
        (b - a,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.ci == pytest.approx((scipy_s.low, scipy_s.high), abs=0.01)
    assert found.difference == pytest.approx(float(np.mean(b - a)), abs=1e-12)
    # the p of the bootstrap is near that of the paired t-test where the mean is near normal
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)


def test_paired_means_of_equals() -> None:
    found = paired_means([0.5] * 9, [0.5] * 9, seed=0)
    assert (found.difference, found.ci, found.p) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize(("differ", "p"), [(1, 1.0), (2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_a_few_questions_show_little(differ: int, p: float) -> None:
    """Where m questions differ, signs by chance are all alike with 2^(1-m)."""
    found = paired_means([0.25] * (differ + 3), [0.75] * differ + [0.25] * 3, seed=0)
    assert found.p >= p and found.p < 1.2 * p + 0.1
    only = paired_means([0.25] * differ, [0.75] * differ, seed=0)
    assert only.p == p
    assert (only.ci[0] <= 0.0) == (p > 0.05) and only.ci[1] == 0.5


def test_pairing_finds_what_two_means_cannot() -> None:
    """A gain of 2 points on hard and easy questions alike, which spread by 50."""
    rng = random.Random(1)
    a = [rng.choice([0.0, 0.5, 1.0]) for _ in range(300)]
    b = [min(1.0, x + (0.125 if rng.random() < 0.2 else 0.0)) for x in a]
    found = paired_means(a, b, seed=0)
    assert found.ci[0] > 0 and found.p < 0.001
    assert stats.ttest_ind(a, b).pvalue > 0.5


# ---- of results ----


def result(
    question: str, right: list[bool], *, dataset: str = "d", greedy: bool = False, **rates: float
) -> Result:
    """A question's result; what was right is one answer, what was wrong is another."""
    votes = tuple(int(not one) for one in right)
    tokens = tuple(range(1, len(right) + 1))
    return Result(
        (dataset, question), greedy, True, False, 5, tuple(right), votes, tokens,
        {"format": 1.0, **rates},
    )  # fmt: skip


def test_metrics_by_hand() -> None:
    results = [
        result("a", [True, False, False, False], greedy=True, dataset="x"),
        result("b", [True, True, True, False], greedy=True, dataset="y"),
        result("c", [False] * 4, dataset="x"),
        result("d", [True, True, False, False], greedy=True, dataset="x"),
    ]
    found = summarise(results, name="e")
    assert (found["name"], found["n"], found["k"], found["greedy"]) == ("e", 4, 4, 0.75)
    assert found["sampled"] == found["pass@1"] == pytest.approx((1 + 3 + 0 + 2) / 16)
    # pairs of 4 that hold a right one: 3/6, 6/6, 0/6, 5/6
    assert found["pass@2"] == pytest.approx((3 + 6 + 0 + 5) / 24)
    assert found["pass@4"] == 0.75
    # of 2, runs (1, 2) and (3, 4): a 1/2 and 0, b 1 and 1/2, c 0 and 0, d 1 and 0
    assert found["majority@2"] == pytest.approx((0.25 + 0.75 + 0 + 0.5) / 4)
    assert found["majority@4"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    assert (found["tokens_p50"], found["tokens_p99"], found["max_tokens"]) == (2, 4, 4)
    assert found["mean_tokens"] == 2.5
    assert {name: own["n"] for name, own in found["datasets"].items()} == {"x": 3, "y": 1}
    assert found["datasets"]["y"]["greedy_se"] is None
    assert found["datasets"]["x"]["greedy"] == pytest.approx(2 / 3)


@settings(max_examples=40)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_against_every_draw(n: int, data: st.DataObject) -> None:
    one = st.lists(st.booleans(), min_size=n, max_size=n)
    rights = data.draw(st.lists(one, min_size=1, max_size=10))
    found = measure([result(str(i), right) for i, right in enumerate(rights)])
    for k in powers_of_two(n):
        draws = [any(draw) for right in rights for draw in combinations(right, k)]
        assert found[f"pass@{k}"] == pytest.approx(sum(draws) / len(draws), abs=1e-12)
        low, high = found[f"pass@{k}_ci"]
        assert low <= found[f"pass@{k}"] <= high


def test_a_rate_that_some_questions_lack_is_left_out() -> None:
    whole = [result("a", [True], chain_correct=1.0), result("b", [True], chain_correct=0.0)]
    assert measure(whole)["chain_correct"] == 0.5
    assert "chain_correct" not in measure([whole[0], result("c", [True])])


def test_a_gate_knows_the_names_of_the_numbers() -> None:
    rates = ("truncated", "no_answer", "unjudged", "chain_correct", "careless")
    found = measure([result("a", [True] * 6, **dict.fromkeys(rates, 0.5))])
    numbers = {name for name in found if not name.endswith(("_se", "_ci"))} - {"n", "k"}
    assert set(metric_names({"samples": 6, "count": {"careless": "clear"}})) == numbers


def test_comparisons_use_the_questions_of_both() -> None:
    a = [result("1", [True, False]), result("2", [False] * 2, greedy=True), result("3", [True] * 2)]
    b = [result("2", [True] * 2), result("1", [True, False], greedy=True), result("4", [True] * 2)]
    found = compare_results(a, b, seed=0)
    assert found["n"] == found["datasets"]["d"]["n"] == 2
    assert (found["greedy"]["only_a"], found["greedy"]["only_b"]) == (1, 1)
    assert (found["sampled"]["a"], found["sampled"]["b"]) == (0.25, 0.75)
    assert compare_results(a, [result("5", [True])], seed=0) == {"n": 0, "datasets": {}}
