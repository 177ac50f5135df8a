"""Questions for online RL: those that the model sometimes gets right (MMPR-Tiny).

A question that is always right or always wrong has no spread within its group, so it teaches
nothing; MMPR-Tiny keeps an accuracy over the offline rollouts in [0.2, 0.8].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from internvl.errors import UserError
from mmpr.groups import JUDGED, strip_rollout

BUCKETS = (
    "0", "0-0.1", "0.1-0.2", "0.2-0.3", "0.3-0.4", "0.4-0.5", "0.5-0.6", "0.6-0.7", "0.7-0.8",
    "0.8-0.9", "0.9-1", "1",
)  # fmt: skip


@dataclass
class SelectReport:
    """What was selected, and all questions by their accuracy (`BUCKETS`; 0 and 1 apart)."""

    questions: int = 0
    selected: int = 0
    too_hard: int = 0
    too_easy: int = 0
    not_judged: int = 0
    histogram: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "questions": self.questions,
            "selected": self.selected,
            "too_hard": self.too_hard,
            "too_easy": self.too_easy,
            "not_judged": self.not_judged,
            "histogram": dict(self.histogram),
        }


def accuracy(verdicts: Iterable[dict[str, Any]]) -> float | None:
    """The share of correct rollouts among those that could be judged; None without any."""
    judged = [verdict["outcome"] for verdict in verdicts if verdict["outcome"] in JUDGED]
    return judged.count("correct") / len(judged) if judged else None


def bucket(value: float) -> str:
    """The histogram's bucket of an accuracy (a bucket holds its lower edge).

    >>> bucket(0.0), bucket(0.05), bucket(0.8), bucket(1.0)
    ('0', '0-0.1', '0.8-0.9', '1')
    """
    if value in (0, 1):
        return BUCKETS[0] if value == 0 else BUCKETS[-1]
    return BUCKETS[1 + int(value * 10 + 1e-9)]


def check_bounds(min_accuracy: float, max_accuracy: float) -> None:
    """Raise UserError for bounds that no accuracy can meet."""
    if not 0 <= min_accuracy <= max_accuracy <= 1:
        raise UserError(
            f"accuracy bounds are {min_accuracy} and {max_accuracy}; "
            "they must be in [0, 1], the lower one first"
        )


def select_questions(
    groups: Iterable[list[dict[str, Any]]],
    *,
    min_accuracy: float = 0.2,
    max_accuracy: float = 0.8,
) -> tuple[list[dict[str, Any]], SelectReport]:
    """The question records whose accuracy lies in [min_accuracy, max_accuracy], and a report.

    groups: the verdict records of each question.
    Raises UserError for bounds that no accuracy can meet.
    """
    check_bounds(min_accuracy, max_accuracy)
    report = SelectReport()
    selected = []
    for group in groups:
        report.questions += 1
        value = accuracy(group)
        if value is None:
            report.not_judged += 1
            continue
        report.histogram[bucket(value)] += 1
        if value < min_accuracy:
            report.too_hard += 1
        elif value > max_accuracy:
            report.too_easy += 1
        else:
            selected.append(strip_rollout(group[0]))
    report.selected = len(selected)
    return selected, report
