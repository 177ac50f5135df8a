"""Two evaluations of the same questions, question by question: pure, from their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cascade.metrics import Result
from cascade.statistics import paired_means, paired_proportions


def compare_results(a: Sequence[Result], b: Sequence[Result], seed: int) -> dict[str, Any]:
    """How b does against a, on the questions that both have: over all, and by data set.

    n: those questions. greedy: `PairedProportions`, McNemar's exact test. sampled: `PairedMeans`,
    the bootstrap of each question's mean over its samples. seed: of the bootstrap.
    """
    of_a = {result.key: result for result in a}
    pairs = [(of_a[result.key], result) for result in b if result.key in of_a]
    by_name: dict[str, list[tuple[Result, Result]]] = {}
    for pair in pairs:
        by_name.setdefault(pair[1].key[0], []).append(pair)
    datasets = {name: _compare(own, seed) for name, own in by_name.items()}
    return {**_compare(pairs, seed), "datasets": datasets} if pairs else {"n": 0, "datasets": {}}


def _compare(pairs: Sequence[tuple[Result, Result]], seed: int) -> dict[str, Any]:
    greedy = paired_proportions([a.greedy for a, _ in pairs], [b.greedy for _, b in pairs])
    sampled = paired_means([a.mean_right for a, _ in pairs], [b.mean_right for _, b in pairs], seed)
    return {"n": len(pairs), "greedy": asdict(greedy), "sampled": asdict(sampled)}
