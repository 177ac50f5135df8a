"""What n sampled completions of a question say of it: pass@k, and the answer that most gave."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k completions is right, unbiased, from n of them.

    1 - C(n - c, k) / C(n, k); Chen et al. 2021, arXiv 2107.03374, eq. 1.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2), pass_at_k(4, 0, 1)
    (0.5, 1.0, 0.0)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(votes: Sequence[int | None], right: Sequence[bool]) -> float:
    """Whether the answer that most completions gave is right: 1 or 0, or between them on a tie.

    votes: which answer each completion gave (equal numbers: the same), None for no answer, which
    is no vote. right: whether each was judged correct. On a tie it is the share of the tied
    answers that are right: what a fair draw among them gives in the mean. Without a vote it is 0.
    Self-consistency (Wang et al. 2022, arXiv 2203.11171).

    >>> majority([0, 1, 1], [True, False, False]), majority([0, 1, None], [True, False, False])
    (0.0, 0.5)
    """
    classes: dict[int, list[bool]] = defaultdict(list)
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            classes[vote].append(is_right)
    if not classes:
        return 0.0
    most = max(map(len, classes.values()))
    # answers that are the same are nearly always judged alike; where not, by their share
    tied = [sum(found) / most for found in classes.values() if len(found) == most]
    return math.fsum(tied) / len(tied)


def majority_at_k(votes: Sequence[int | None], right: Sequence[bool], k: int) -> float:
    """The mean of `majority` over the n // k runs of k completions that follow one another.

    k: from 1 to n. Completions are drawn independently, so each run is a fair sample of k.
    """
    starts = range(0, len(votes) - k + 1, k)
    found = [majority(votes[at : at + k], right[at : at + k]) for at in starts]
    return math.fsum(found) / len(found)
