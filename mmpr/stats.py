"""Numbers of a set of questions, rollouts, verdicts, pairs or conversations, from its columns.

Each number is given for all rows and for each data set: `describe` of the rows chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmpr.columns import MISSING, Columns
from mmpr.groups import JUDGED, OUTCOMES
from mmpr.select import BUCKETS, bucket

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHARS = ("question", "chosen", "rejected", "completion", "reply")  # columns *_chars
TOKENS = ("prompt", "image", "chosen", "rejected", "completion")  # columns *_tokens


def spread(values: NDArray[np.int64]) -> dict[str, float] | None:
    """Mean, median, 5th and 95th percentile and extremes of numbers, MISSING ones left out.

    Percentiles are values that occur. None where there is no value.
    """
    import numpy as np

    values = values[values != MISSING]
    if not len(values):
        return None
    low, middle, high = np.percentile(values, (5, 50, 95), method="lower").tolist()
    return {
        "mean": float(values.mean()),
        "median": middle,
        "p5": low,
        "p95": high,
        "min": int(values.min()),
        "max": int(values.max()),
    }


def describe(columns: Columns, chosen: NDArray[np.bool_] | None = None) -> dict[str, Any]:
    """What there is to know of some rows (None: of all), as JSON.

    Duplicates are rows whose text came before: a pair with its question and images, a completion
    within its question.
    """
    import numpy as np

    pick = _Pick(columns, np.ones(columns.rows, dtype=bool) if chosen is None else chosen)
    rows = pick.rows
    repeated = rows - len(np.unique(pick("text")))
    facts: dict[str, Any] = {
        "rows": rows,
        "questions": len(np.unique(pick("question"))),
        "pictures": _counted(pick("images")),
        "duplicates": {"rows": repeated, "share": repeated / rows if rows else 0.0},
        "characters": _spreads(pick, CHARS, "chars"),
    }
    if tokens := _spreads(pick, TOKENS, "tokens"):
        facts["tokens"] = tokens
    if tiles := spread(pick("tiles")):
        facts["tiles"] = {**tiles, "counts": _counted(pick("tiles"))}
    for name in ("kind", "outcome", "matcher", "finish_reason"):
        if name in columns.names:
            facts[f"{name}s"] = pick.categories(name)
    if columns.kind == "pair" and rows:
        facts["chosen_longer"] = float((pick("chosen_chars") > pick("rejected_chars")).mean())
    if columns.kind in ("rollout", "verdict"):
        each = np.unique(pick("question"), return_counts=True)[1]
        facts["rollouts_per_question"] = spread(each)
    if columns.kind == "verdict":
        facts["format_followed"] = float((pick("format_ok") == 1).mean()) if rows else 0.0
        facts["accuracy"] = _accuracies(pick)
    return facts


class _Pick:
    """The chosen rows' part of every column."""

    def __init__(self, columns: Columns, chosen: NDArray[np.bool_]):
        self._columns = columns
        self._chosen = chosen
        self.rows = int(chosen.sum())

    def __call__(self, name: str) -> NDArray[np.int64]:
        return self._columns.get(name)[self._chosen]

    def categories(self, name: str) -> dict[str, int]:
        """{category: rows}, the most frequent first; outcomes are all there, in their order."""
        import numpy as np

        names = self._columns.names[name]
        codes = self(name)
        counts = np.bincount(codes[codes != MISSING], minlength=len(names)).tolist()
        found = dict(zip(names, counts, strict=True))
        if name == "outcome":
            return {outcome: found.get(outcome, 0) for outcome in OUTCOMES}
        ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        return {name: count for name, count in ordered if count}


def _counted(values: NDArray[np.int64]) -> dict[str, int]:
    import numpy as np

    numbers, counts = np.unique(values[values != MISSING], return_counts=True)
    return {str(n): count for n, count in zip(numbers.tolist(), counts.tolist(), strict=True)}


def _spreads(pick: _Pick, names: tuple[str, ...], unit: str) -> dict[str, Any]:
    spreads = {name: spread(pick(f"{name}_{unit}")) for name in names}
    return {name: value for name, value in spreads.items() if value is not None}


def question_accuracy(columns: Columns) -> NDArray[np.float64]:
    """The share of correct rollouts of each question, of those judged; NaN where none was.

    By the question's number, of which `columns` holds all rollouts.
    """
    import numpy as np

    questions, outcomes = columns.get("question"), columns.get("outcome")
    names = columns.names["outcome"]
    judged = np.isin(outcomes, [names.index(name) for name in JUDGED if name in names])
    right = judged & (outcomes == (names.index("correct") if "correct" in names else MISSING))
    size = int(questions.max()) + 1
    total = np.bincount(questions[judged], minlength=size)
    correct = np.bincount(questions[right], minlength=size)
    return np.where(total > 0, correct / np.maximum(total, 1), np.nan)


def _accuracies(pick: _Pick) -> dict[str, Any]:
    import numpy as np

    values = question_accuracy(pick._columns)[np.unique(pick("question"))]
    known = values[~np.isnan(values)]
    histogram = dict.fromkeys(BUCKETS, 0)
    for value, count in zip(*np.unique(known, return_counts=True), strict=True):
        histogram[bucket(float(value))] += int(count)
    return {
        "mean": float(known.mean()) if len(known) else None,
        "histogram": histogram,
        "questions_not_judged": len(values) - len(known),
    }


def by_data_set(columns: Columns) -> dict[str, NDArray[np.bool_]]:
    """Which rows belong to which data set, in order of first appearance."""
    codes = columns.get("data_set")
    return {name: codes == code for code, name in enumerate(columns.names["data_set"])}


def summarise(columns: Columns) -> dict[str, Any]:
    """{"all": facts, "data_sets": {name: facts}}; see `describe`."""
    chosen = by_data_set(columns)
    return {
        "all": describe(columns),
        "data_sets": {name: describe(columns, rows) for name, rows in chosen.items()},
    }
