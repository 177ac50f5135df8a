"""Verdicts: what `rewards` says of each rollout, and the rates by outcome."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from internvl.data import Quarantine, Row
from rewards import Outcome, Task, Verdict, VerifierPool, request_fault, task_of


@dataclass
class VerifyReport:
    """Counts over a file of verdicts."""

    outcomes: Counter[str] = field(default_factory=Counter)
    matchers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # why some cannot be judged
    format_ok: int = 0
    cut_off: int = 0
    questions: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        """The number of verdicts."""
        return sum(self.outcomes.values())

    def add(self, record: dict[str, Any]) -> None:
        """Count one verdict record."""
        self.outcomes[record["outcome"]] += 1
        self.matchers[record["matcher"]] += 1
        self.format_ok += record["format_ok"]
        self.cut_off += record.get("finish_reason") == "length"
        self.questions.add(record["id"])
        if "reason" in record:
            self.reasons[record["reason"]] += 1

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON."""
        return {
            "rollouts": self.total,
            "questions": len(self.questions),
            "outcomes": {str(name): self.outcomes[name] for name in Outcome},
            "format_ok": self.format_ok,
            "cut_off": self.cut_off,
            "matchers": dict(self.matchers),
            "cannot_judge_reasons": dict(self.reasons.most_common(20)),
        }


def rollout_task(record: dict[str, Any], style: str = "auto") -> Task:
    """What is to be judged of a rollout, or again of a verdict, by the matcher that it asked for.

    Raises ValueError for an unknown matcher.
    """
    # a verdict's own `matcher` is the one that decided
    asked = record.get("requested_matcher" if "outcome" in record else "matcher")
    return task_of({**record, "matcher": asked}, record["completion"], style=style)


def judged_record(record: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The verdict record of a rollout.

    The verdict's `matcher` is the one that decided; what the question itself named is kept as
    `requested_matcher`, so that `select` can give the question back as it was. A completion cut off
    at max_tokens never followed the format, whatever it holds.
    """
    asked = record.get("requested_matcher" if "outcome" in record else "matcher")
    judged = {
        **record,
        "outcome": str(verdict.outcome),
        "extracted": verdict.extracted,
        "matcher": verdict.matcher,
        "score": verdict.score,
        "format_ok": verdict.format_ok and record.get("finish_reason") != "length",
    }
    if verdict.reason is not None:
        judged["reason"] = verdict.reason
    else:
        judged.pop("reason", None)  # of an earlier verdict
    if asked is not None:
        judged["requested_matcher"] = asked
    return judged


def verify_rows(
    rows: Iterable[Row],
    report: VerifyReport,
    quarantine: Quarantine,
    pool: VerifierPool,
    style: str = "auto",
) -> Iterator[dict[str, Any]]:
    """The verdict of each rollout row, counted in `report`; a row that asks for an unknown matcher
    goes to the quarantine.
    """
    waiting: deque[dict[str, Any]] = deque()  # handed to the pool, which keeps the order

    def tasks() -> Iterator[Task]:
        for row in rows:
            if fault := request_fault(row.data, unanswered=True):
                quarantine.add(row.file, row.line, fault, row.data)
                continue
            waiting.append(row.data)
            yield rollout_task(row.data, style)

    for verdict in pool.map(tasks()):
        record = judged_record(waiting.popleft(), verdict)
        report.add(record)
        yield record
