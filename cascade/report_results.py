"""The results of a run: rates with their intervals, and the steps between stages."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import hypot
from pathlib import Path
from typing import Any

from cascade.report_data import Gap, Measures, Rate, StageResult, Step
from cascade.report_files import get, number, read_lines, read_object
from cascade.report_run import RunFolder

Z95 = 1.959963984540054
MOST_OTHERS = 12  # pairs of stages that are compared besides the steps
_SHARES = {
    "format": "format",
    "truncated": "cut short",
    "no_answer": "no answer",
    "unjudged": "not judged",
    "chain_correct": "right chain",
}
_RARE = ("truncated", "no_answer", "unjudged")  # told of only where there are some

Key = tuple[str, str]


@dataclass
class Answered:
    """What a predictions file says of each question, in small: outcomes, not texts.

    place: {(data set, id): number}. greedy: 1 where right. right, total: of the samples.
    """

    place: dict[Key, int] = field(default_factory=dict)
    greedy: array[int] = field(default_factory=lambda: array("b"))
    right: array[int] = field(default_factory=lambda: array("i"))
    total: array[int] = field(default_factory=lambda: array("i"))
    tokens: int = 0


def key_of(row: Mapping[str, Any], path: Path) -> Key:
    """By what a question is known; runs of before have one data set without a name."""
    return str(row.get("dataset", "")), str(get(row, "id", (str, int), path))


def read_answered(path: Path) -> Answered:
    """Read a predictions file once, a line at a time."""
    found = Answered()
    for row in read_lines(path):
        greedy = get(row, "greedy", dict, path)
        sampled = get(row, "sampled", list, path)
        found.place[key_of(row, path)] = len(found.greedy)
        found.greedy.append(get(greedy, "outcome", str, path) == "correct")
        found.right.append(sum(get(one, "outcome", str, path) == "correct" for one in sampled))
        found.total.append(len(sampled))
        found.tokens += sum(int(one.get("tokens", 0)) for one in (greedy, *sampled))
    return found


# -- rates -------------------------------------------------------------------------------------


def read_result(run: RunFolder, name: str) -> StageResult:
    """The result of an evaluated stage, from its metrics.json."""
    path = run.path / "eval" / name / "metrics.json"
    metrics = read_object(path)
    seconds = [one.seconds for one in run.processes if one.name == name]
    datasets, prompts = metrics.get("datasets") or {}, metrics.get("prompts") or {}
    return StageResult(
        info=run.stages[name],
        whole=_measures(metrics, path),
        datasets={key: _measures(one, path) for key, one in datasets.items()},
        prompts={key: _measures(one, path) for key, one in prompts.items()},
        gaps=_gaps(metrics, path),
        seconds=seconds[0] if seconds else None,
    )


def _measures(metrics: dict[str, Any], path: Path) -> Measures:
    return Measures(
        n=get(metrics, "n", int, path),
        k=get(metrics, "k", int, path),
        greedy=rate(metrics, "greedy", path),
        sampled=rate(metrics, "sampled", path),
        mean_tokens=number(metrics, "mean_tokens", path),
        passes=_by_size(metrics, "pass@", path),
        majorities=_by_size(metrics, "majority@", path),
        shares=_shares(metrics, path),
    )


def rate(metrics: dict[str, Any], key: str, path: Path) -> Rate:
    """A metric and its interval: as it stands there, else of its standard error."""
    value, interval = number(metrics, key, path), metrics.get(f"{key}_ci")
    if isinstance(interval, list) and len(interval) == 2:
        low, high = (number({key: bound}, key, path) for bound in interval)
        return Rate(value, low, high)
    error = metrics.get(f"{key}_se")
    if error is None:
        return Rate(value, value, value)
    half = Z95 * number(metrics, f"{key}_se", path)
    return Rate(value, max(0.0, value - half), min(1.0, value + half))


def _by_size(metrics: dict[str, Any], start: str, path: Path) -> dict[int, Rate]:
    sizes = sorted(int(key[len(start):]) for key in metrics
                   if key.startswith(start) and key[len(start):].isdigit())  # fmt: skip
    return {size: rate(metrics, f"{start}{size}", path) for size in sizes}


def _shares(metrics: dict[str, Any], path: Path) -> dict[str, float]:
    """Known shares by the reader's word, then those that the recipe counts by name."""
    counted = [
        key
        for key in metrics
        if (f"{key}_ci" in metrics or key == "careless")
        and key not in (*_SHARES, "greedy", "sampled")
        and "@" not in key
    ]
    shares = {}
    for key in (*_SHARES, *counted):
        if metrics.get(key) is None or (key in _RARE and not metrics[key]):
            continue
        shares[_SHARES.get(key, key.replace("_", " "))] = number(metrics, key, path)
    return shares


def _gaps(metrics: dict[str, Any], path: Path) -> list[Gap]:
    gaps = []
    for other, found in (metrics.get("gap") or {}).items():
        sampled = get(found, "sampled", dict, path)
        low, high = get(sampled, "ci", list, path)
        gain = Rate(number(sampled, "difference", path), float(low), float(high))
        p = number(sampled, "p", path)
        gaps.append(Gap(str(metrics.get("prompt", "")), str(other), gain, p))
    return gaps


# -- steps -------------------------------------------------------------------------------------


def read_steps(
    run: RunFolder, results: Sequence[StageResult], answered: Mapping[str, Answered]
) -> tuple[list[Step], list[Step]]:
    """Each result against that of the stage it began from; then other pairs that tell something.

    Those are the stages that began from the same one, and those from which nothing went on.
    """
    by_name = {result.name: result for result in results}
    before = {name: run.before(name, [*by_name]) for name in by_name}
    steps = [
        compare(by_name[start], by_name[name], answered)
        for name, start in before.items()
        if start is not None
    ]
    ends = [name for name in by_name if name not in before.values()]
    pairs = [
        (a, b)
        for a, b in combinations(by_name, 2)
        if before[b] != a and before[a] != b
        and (before[a] == before[b] is not None or (a in ends and b in ends))
    ]  # fmt: skip
    others = [compare(by_name[a], by_name[b], answered) for a, b in pairs[:MOST_OTHERS]]
    return steps, others


def compare(a: StageResult, b: StageResult, answered: Mapping[str, Answered]) -> Step:
    """What b has over a: paired where both left their predictions, else as two samples."""
    common: list[tuple[int, int]] = []
    if a.name in answered and b.name in answered:
        place = answered[b.name].place
        common = [(i, place[key]) for key, i in answered[a.name].place.items() if key in place]
    if len(common) < 2:
        return _unpaired(a, b)
    from cascade.statistics import paired_means, paired_proportions

    one, two = answered[a.name], answered[b.name]
    greedy = paired_proportions(
        [bool(one.greedy[i]) for i, _ in common], [bool(two.greedy[j]) for _, j in common]
    )
    sampled, p = _unpaired(a, b).sampled, None
    if all(one.total[i] and two.total[j] for i, j in common):
        before = [one.right[i] / one.total[i] for i, _ in common]
        after = [two.right[j] / two.total[j] for _, j in common]
        means = paired_means(before, after, seed=0)
        sampled, p = Rate(means.difference, *means.ci), means.p
    return Step(
        before=a.info,
        after=b.info,
        n=len(common),
        paired=True,
        sampled=sampled,
        sampled_p=p,
        greedy=Rate(greedy.difference, *greedy.ci),
        greedy_p=greedy.p,
        only_before=greedy.only_a,
        only_after=greedy.only_b,
    )


def _unpaired(a: StageResult, b: StageResult) -> Step:
    sampled, greedy = (
        _difference(x, y)
        for x, y in ((a.whole.sampled, b.whole.sampled), (a.whole.greedy, b.whole.greedy))
    )
    return Step(a.info, b.info, min(a.whole.n, b.whole.n), False, sampled, None, greedy, None)


def _difference(a: Rate, b: Rate) -> Rate:
    """Newcombe's square-and-add interval of a difference, from the two intervals."""
    gain = b.value - a.value
    down = hypot(b.value - b.low, a.high - a.value)
    up = hypot(b.high - b.value, a.value - a.low)
    return Rate(gain, gain - down, gain + up)
