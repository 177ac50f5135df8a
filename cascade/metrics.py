"""The numbers of an evaluation, from its predictions: over all questions and by data set.

    predictions.jsonl -> Result of each question -> rates, pass@k, majority@k, lengths, intervals

Every rate is in 0..1. A standard error or interval is over questions: the samples of one question
are averaged first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade.questions import Key, key_of
from cascade.statistics import mean_and_se, mean_interval, percentile, proportion_interval
from rewards.estimates import majority_at_k, pass_at_k

UNJUDGED = ("cannot_judge", "timeout")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Result:
    """What one question's prediction comes to.

    greedy, greedy_format, greedy_truncated, greedy_tokens: of the greedy completion. right, votes,
    tokens: of each sampled one. rates: of the sampled ones the shares that a metric names.
    """

    key: Key
    greedy: bool
    greedy_format: bool
    greedy_truncated: bool
    greedy_tokens: int
    right: tuple[bool, ...]
    votes: tuple[int | None, ...]
    tokens: tuple[int, ...]
    rates: Mapping[str, float]

    @property
    def mean_right(self) -> float:
        """The share of the samples that are right."""
        return sum(self.right) / len(self.right)


def result_of(record: dict[str, Any], count: Mapping[str, str] | None = None) -> Result:
    """The result of a prediction record; count: see `EvaluationConfig`."""
    greedy, sampled = record["greedy"], record["sampled"]

    def share(found: Iterable[bool]) -> float:
        return sum(found) / len(sampled)

    rates = {
        "format": share(one["format_ok"] for one in sampled),
        "truncated": share(one["truncated"] for one in sampled),
        "no_answer": share(one["outcome"] == "no_answer" for one in sampled),
        "unjudged": share(one["outcome"] in UNJUDGED for one in sampled),
    }
    for name, text in (count or {}).items():
        rates[name] = share(text in one["completion"] for one in sampled)
    if "solution" in record:
        rates["chain_correct"] = share(one["completion"] == record["solution"] for one in sampled)
    return Result(
        key_of(record),
        greedy["outcome"] == "correct",
        greedy["format_ok"],
        greedy["truncated"],
        greedy["tokens"],
        tuple(one["outcome"] == "correct" for one in sampled),
        tuple(one["vote"] for one in sampled),
        tuple(one["tokens"] for one in sampled),
        rates,
    )


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, .. up to n, and n.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return sorted({2**power for power in range(n.bit_length())} | {n})


def measure(results: Sequence[Result]) -> dict[str, Any]:
    """The metrics of some questions' results, at least one; see docs/evaluation.md.

    A rate that only some of the questions have (`chain_correct`) is left out.
    """
    n, k = len(results), len(results[0].right)
    metrics: dict[str, Any] = {"n": n, "k": k}
    greedy = [float(result.greedy) for result in results]
    metrics["greedy"], metrics["greedy_se"] = mean_and_se(greedy)
    metrics["greedy_ci"] = proportion_interval(metrics["greedy"], n)
    _add_mean(metrics, "sampled", [result.mean_right for result in results])
    for name in results[0].rates:
        if all(name in result.rates for result in results):
            values = [result.rates[name] for result in results]
            metrics[name], metrics[f"{name}_ci"] = mean_and_se(values)[0], mean_interval(values)
    means = [sum(result.tokens) / k for result in results]
    metrics["mean_tokens"] = mean_and_se(means)[0]
    lengths = sorted(tokens for result in results for tokens in result.tokens)
    for share in PERCENTILES:
        metrics[f"tokens_p{share}"] = percentile(lengths, share / 100)
    metrics["max_tokens"] = lengths[-1]
    for size in powers_of_two(k):
        _add_mean(
            metrics,
            f"pass@{size}",
            [pass_at_k(k, sum(result.right), size) for result in results],
        )
    for size in powers_of_two(k):
        if size > 1:
            _add_mean(
                metrics,
                f"majority@{size}",
                [majority_at_k(result.votes, result.right, size) for result in results],
            )
    metrics["greedy_format"] = sum(result.greedy_format for result in results) / n
    metrics["greedy_truncated"] = sum(result.greedy_truncated for result in results) / n
    metrics["greedy_mean_tokens"] = sum(result.greedy_tokens for result in results) / n
    return metrics


def _add_mean(metrics: dict[str, Any], name: str, values: Sequence[float]) -> None:
    metrics[name], metrics[f"{name}_se"] = mean_and_se(values)
    metrics[f"{name}_ci"] = mean_interval(values)


def summarise(results: Sequence[Result], **facts: Any) -> dict[str, Any]:
    """The metrics of an evaluation: its facts, those of all questions, and those by data set."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.key[0], []).append(result)
    datasets = {name: measure(own) for name, own in by_name.items()}
    return {**facts, **measure(results), "datasets": datasets}
