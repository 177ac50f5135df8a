"""What the rollouts of a run show: how they were judged, and questions before and after a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cascade.report_data import BeforeAfter, Rollouts
from cascade.report_files import get, read_lines, read_object
from cascade.report_results import Answered, Key, key_of
from cascade.report_run import RunFolder

LEAST_QUESTIONS = 20  # that two rollouts share, to be compared by them
OUTCOMES = ("correct", "wrong", "no_answer", "cannot_judge", "timeout")
_COARSE = 10  # bins where questions have different numbers of samples


@dataclass
class Judged:
    """A stage's verdicts: {(data set, id): [right, all]}, outcomes, and tokens sampled."""

    groups: dict[Key, list[int]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


def read_judged(run: RunFolder) -> dict[str, Judged]:
    """The verdicts of every stage that has some."""
    found = {}
    for name, info in run.stages.items():
        path = run.folder(name) / "verdicts.jsonl"
        if info.kind in ("pairs", "select", "sample", "verify") and path.exists():
            found[name] = _read_verdicts(path)
    return {name: judged for name, judged in found.items() if judged.groups}


def _read_verdicts(path: Path) -> Judged:
    judged = Judged()
    for row in read_lines(path):
        outcome = get(row, "outcome", str, path)
        judged.outcomes[outcome] += 1
        group = judged.groups.setdefault(key_of(row, path), [0, 0])
        group[0] += outcome == "correct"
        group[1] += 1
        judged.tokens += len(row.get("token_ids") or ())
    return judged


def rollouts_of(run: RunFolder, judged: Mapping[str, Judged]) -> list[Rollouts]:
    """How each stage's rollouts were judged, and how many a question were right."""
    return [
        Rollouts(
            run.stages[name],
            run.stages[name].origin,
            _in_order(one.outcomes),
            tuple(histogram(one.groups.values(), size_of(one.groups.values()))),
            _kept(run.folder(name) / "questions.jsonl.stats.json"),
        )
        for name, one in judged.items()
    ]


def _in_order(outcomes: Mapping[str, int]) -> dict[str, int]:
    """The known ones first, in the order from good to unknown."""
    names = [*OUTCOMES, *sorted(set(outcomes).difference(OUTCOMES))]
    return {name: outcomes[name] for name in names if outcomes.get(name)}


def _kept(stats: Path) -> int | None:
    if not stats.exists():
        return None
    found = read_object(stats)
    for key in ("selected", "kept", "written"):
        if isinstance(found.get(key), int):
            return int(found[key])
    return None


def size_of(groups: Iterable[Sequence[int]]) -> int:
    """Answers a question where all have as many, else the number of bins."""
    sizes = {total for _, total in groups}
    return sizes.pop() if len(sizes) == 1 else _COARSE


def histogram(groups: Iterable[Sequence[int]], size: int) -> list[int]:
    """Questions by right answers, 0 to `size`; a question with another number is put in scale."""
    counts = [0] * (size + 1)
    for right, total in groups:
        counts[round(size * right / total)] += 1
    return counts


# -- before and after a stage ------------------------------------------------------------------


def read_changes(
    run: RunFolder, answered: Mapping[str, Answered], judged: Mapping[str, Judged]
) -> list[BeforeAfter]:
    """Each stage's questions before and after it.

    By the rollouts of pairs and select where the model before and the one after were asked at least
    20 of the same questions, else by the samples of the evaluation.
    """
    asked: dict[str, list[str]] = {}  # model -> stages of rollouts
    for name in judged:
        origin = run.stages[name].origin
        if origin is not None:
            asked.setdefault(origin, []).append(name)
    changes = []
    for name in answered:
        start = run.before(name, [*answered])
        if start is None:
            continue
        found = None
        for one in asked.get(start, []):
            for two in asked.get(name, []):
                found = found or _change(
                    run, start, name, judged[one].groups, judged[two].groups,
                    f"rollouts of {one} and {two}", LEAST_QUESTIONS,
                )  # fmt: skip
        held_out = _groups(answered[start]), _groups(answered[name])
        found = found or _change(run, start, name, *held_out, "samples of the evaluation", 1)
        if found is not None:
            changes.append(found)
    return changes


def _groups(answered: Answered) -> dict[Key, list[int]]:
    return {
        key: [answered.right[i], answered.total[i]]
        for key, i in answered.place.items()
        if answered.total[i]
    }


def _change(
    run: RunFolder,
    start: str,
    name: str,
    before: Mapping[Key, Sequence[int]],
    after: Mapping[Key, Sequence[int]],
    source: str,
    least: int,
) -> BeforeAfter | None:
    both = [(before[key], after[key]) for key in before if key in after]
    if len(both) < least:
        return None
    sizes = size_of([one for pair in both for one in pair])
    shares = [(a[0] / a[1], b[0] / b[1]) for a, b in both]
    return BeforeAfter(
        run.stages[name],
        run.stages[start].label,
        source,
        tuple(histogram([a for a, _ in both], sizes)),
        tuple(histogram([b for _, b in both], sizes)),
        sum(b > a for a, b in shares),
        sum(b < a for a, b in shares),
    )
