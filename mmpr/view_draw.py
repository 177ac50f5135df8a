"""Which rows of a large set a page shows: as many of each sort as there can be, by a seed.

10 rows of 100 a, 4 b, 2 c  ->  4 a, 4 b, 2 c
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmpr.columns import MISSING, Columns
from mmpr.groups import JUDGED
from mmpr.stats import question_accuracy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def even_shares(counts: Sequence[int], most: int) -> list[int]:
    """How many of each group are taken, `most` in all, as even as their sizes allow.

    >>> even_shares([100, 4, 2], 10)
    [4, 4, 2]
    """
    shares = [0] * len(counts)
    left = most
    ordered = sorted(range(len(counts)), key=lambda index: counts[index])
    for place, index in enumerate(ordered):
        shares[index] = min(counts[index], left // (len(ordered) - place))
        left -= shares[index]
    return shares


def draw_evenly(sorts: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """Numbers of at most `most` items, in order, drawn evenly from those of each sort."""
    import numpy as np

    if len(sorts) <= most:
        return np.arange(len(sorts))
    _, groups, counts = np.unique(sorts, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    shares = even_shares(counts.tolist(), most)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(counts)[:-1])
    drawn = [
        rng.choice(group, share, replace=False)
        for group, share in zip(members, shares, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def item_sorts(columns: Columns) -> NDArray[np.int64]:
    """The sort of each item that a page shows: a number for its data set and its kind.

    An item is a row; of rollouts and verdicts it is a question, by its number, and its kind is
    whether it was always, sometimes or never answered right, or could not be judged.
    """
    import numpy as np

    data_sets = columns.get("data_set")
    if columns.kind not in ("rollout", "verdict"):
        kinds = columns.get("kind" if columns.kind == "pair" else "matcher")
        return data_sets * (int(kinds.max()) + 2) + kinds - MISSING
    _, first = np.unique(columns.get("question"), return_index=True)
    if columns.kind == "rollout":
        return data_sets[first]
    accuracy = question_accuracy(columns)
    kinds = np.select([np.isnan(accuracy), accuracy == 0, accuracy == 1], [0, 1, 2], 3)
    return data_sets[first] * 4 + kinds


def item_rows(columns: Columns, items: NDArray[np.int64]) -> list[list[int]]:
    """The numbers, in the listing, of each item's rows."""
    import numpy as np

    numbers = columns.get("number")
    if columns.kind not in ("rollout", "verdict"):
        return [[int(numbers[item])] for item in items]
    questions = columns.get("question")
    wanted = np.flatnonzero(np.isin(questions, items))
    rows: dict[int, list[int]] = {item: [] for item in items.tolist()}
    for question, number in zip(questions[wanted].tolist(), numbers[wanted].tolist(), strict=True):
        rows[question].append(number)
    return list(rows.values())


def is_mixed(outcomes: Sequence[str]) -> bool:
    """Whether some of a question's judged completions are right and some are not."""
    judged = [outcome == "correct" for outcome in outcomes if outcome in JUDGED]
    return any(judged) and not all(judged)
