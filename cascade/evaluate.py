"""Held-out accuracy of a checkpoint: greedy and sampled at temperature 1.

questions -> sampler (greedy; k samples) -> rewards -> predictions.jsonl, metrics.json
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Row, store_images, write_json, write_jsonl

if TYPE_CHECKING:
    from internvl.sampler import Completion, Sampler
    from rewards import Verdict
    from rewards.judging import Verifier

QUESTIONS_AT_ONCE = 256  # their images are in memory together


@dataclass(frozen=True)
class EvaluationConfig:
    """How to evaluate.

    samples: k completions a question at temperature 1. max_tokens: of a completion. seed: of the
    sampling. count: {name: text}; for each, the share of sampled completions that hold the text is
    reported under the name.
    """

    samples: int = 2
    max_tokens: int = 1024
    max_tiles: int = 12
    seed: int = 0
    count: dict[str, str] = field(default_factory=dict)


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean over questions and its standard error (unbiased variance).

    >>> mean_and_se([0.0, 1.0, 1.0, 0.0])
    (0.5, 0.28867513459481287)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, float("nan")
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def _judged(completion: Completion, verdict: Verdict) -> dict[str, Any]:
    return {
        "completion": completion.text,
        "outcome": str(verdict.outcome),
        # one that was cut never followed the format, whatever it holds
        "format_ok": verdict.format_ok and completion.finish_reason == "stop",
        "tokens": len(completion.token_ids),
    }


def predict(
    rows: Sequence[Row],
    sampler: Sampler,
    config: EvaluationConfig,
    verifier: Verifier,
    *,
    output: Path,
) -> list[dict[str, Any]]:
    """Answer and judge every question: one prediction record each, in the rows' order.

    verifier: judges the completions of many questions at once. output: the folder where images go
    that are no files.
    """
    from tqdm import tqdm

    from internvl.sampler import SamplingConfig, request_of

    limits: dict[str, Any] = {"max_tokens": config.max_tokens, "max_tiles": config.max_tiles}
    greedy = SamplingConfig(temperature=0.0, **limits)
    sampled = SamplingConfig(n=config.samples, temperature=1.0, **limits)
    records = []
    with tqdm(total=len(rows), desc="evaluating", unit="question") as bar:
        for start in range(0, len(rows), QUESTIONS_AT_ONCE):
            part = rows[start : start + QUESTIONS_AT_ONCE]
            requests = [
                request_of(row, config.seed + 1_000_003 * number)
                for number, row in enumerate(part, start=start)
            ]
            ones, many = sampler.sample(requests, greedy), sampler.sample(requests, sampled)
            answered = [
                (row, completion)
                for row, *both in zip(part, ones, many, strict=True)
                for completion in chain.from_iterable(both)
            ]
            verdicts = verifier.verdicts((row.data, done.text) for row, done in answered)
            judged = (
                _judged(done, verdict)
                for (_, done), verdict in zip(answered, verdicts, strict=True)
            )
            records += [_record(row, islice(judged, 1 + config.samples), output) for row in part]
            bar.update(len(part))
    return records


def _record(row: Row, judged: Iterable[dict[str, Any]], output: Path) -> dict[str, Any]:
    """The prediction record of a question; the first completion is the greedy one."""
    files = row.image_sources()
    if any(isinstance(file, bytes) for file in files):
        files = [*store_images(row, output)]
    greedy, *sampled = judged
    return {
        "id": row.data["id"],
        "image": [str(file.resolve()) for file in files if isinstance(file, Path)],
        "question": row.data["question"],
        "answer": row.data["answer"],
        **({"solution": row.data["solution"]} if "solution" in row.data else {}),
        "greedy": greedy,
        "sampled": sampled,
    }


def summarise(
    records: Sequence[dict[str, Any]], name: str, model: str, config: EvaluationConfig
) -> dict[str, Any]:
    """The metrics of a set of predictions; every rate in 0..1.

    A standard error is over questions: the k samples of one question are averaged first.
    """

    def rate(test: Any) -> list[float]:
        return [sum(map(test, r["sampled"])) / len(r["sampled"]) for r in records]

    greedy, greedy_se = mean_and_se([float(r["greedy"]["outcome"] == "correct") for r in records])
    sampled, sampled_se = mean_and_se(rate(lambda p: p["outcome"] == "correct"))
    metrics: dict[str, Any] = {
        "name": name,
        "model": model,
        "n": len(records),
        "k": config.samples,
        "greedy": greedy,
        "greedy_se": greedy_se,
        "sampled": sampled,
        "sampled_se": sampled_se,
        "format": mean_and_se(rate(lambda p: p["format_ok"]))[0],
        "mean_tokens": mean_and_se(rate(lambda p: p["tokens"]))[0],
    }
    for key, text in config.count.items():
        metrics[key] = mean_and_se(rate(lambda p, text=text: text in p["completion"]))[0]
    if all("solution" in record for record in records):
        right = [
            sum(p["completion"] == r["solution"] for p in r["sampled"]) / len(r["sampled"])
            for r in records
        ]
        metrics["chain_correct"] = mean_and_se(right)[0]
    return metrics


def evaluate(
    rows: Sequence[Row],
    sampler: Sampler,
    config: EvaluationConfig,
    verifier: Verifier,
    *,
    model: str,
    output: Path,
) -> dict[str, Any]:
    """Evaluate and write `predictions.jsonl` and `metrics.json` into `output`."""
    records = predict(rows, sampler, config, verifier, output=output)
    metrics = summarise(records, output.name, model, config)
    write_jsonl(output / "predictions.jsonl", records)
    write_json(output / "metrics.json", metrics)
    return metrics
