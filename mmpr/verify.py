"""Verdicts: what `rewards` says of each rollout, and the rates by outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from internvl.data import Quarantine, Row
from rewards import Outcome, request_fault, verify


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

    def add(self, record: dict[str, Any], reason: str | None) -> None:
        """Count one verdict record."""
        self.outcomes[record["outcome"]] += 1
        self.matchers[record["matcher"]] += 1
        self.format_ok += record["format_ok"]
        self.cut_off += record.get("finish_reason") == "length"
        self.questions.add(record["id"])
        if reason is not None:
            self.reasons[reason] += 1

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


def verify_rollout(
    record: dict[str, Any], style: str = "auto"
) -> tuple[dict[str, Any], str | None]:
    """The verdict record of a rollout, and the reason when it cannot be judged.

    The verdict's `matcher` is the one that decided; a matcher that the question itself named is
    kept as `requested_matcher`, so that `select` can give the question back as it was. A
    completion cut off at max_tokens never followed the format, whatever it holds.
    Raises ValueError for an unknown matcher or style.
    """
    if "outcome" in record:  # a verdict, verified again
        requested = record.get("requested_matcher")
    else:
        requested = record.get("matcher")
    verdict = verify(
        record["completion"],
        record["answer"],
        matcher=requested,
        options=record.get("options"),
        style=style,
    )
    judged = {
        **record,
        "outcome": str(verdict.outcome),
        "extracted": verdict.extracted,
        "matcher": verdict.matcher,
        "score": verdict.score,
        "format_ok": verdict.format_ok and record.get("finish_reason") != "length",
    }
    if requested is not None:
        judged["requested_matcher"] = requested
    return judged, verdict.reason


def verify_rows(
    rows: Iterable[Row], report: VerifyReport, quarantine: Quarantine, style: str = "auto"
) -> Iterator[dict[str, Any]]:
    """The verdict of each rollout row, counted in `report`; a row that asks for an unknown matcher
    goes to the quarantine.
    """
    for row in rows:
        if fault := request_fault(row.data):
            quarantine.add(row.file, row.line, fault, row.data)
            continue
        record, reason = verify_rollout(row.data, style)
        report.add(record, reason)
        yield record
