"""Verdicts: what `rewards` says of each rollout, and the rates by outcome."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from internvl.data import Quarantine, Row
from mmpr.groups import golds
from rewards import Outcome, Verdict
from rewards.judging import Verifier


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


def as_asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout, or a verdict to be judged again, with the matcher that its question named."""
    # a verdict's own `matcher` is the one that decided
    asked = record.get("requested_matcher" if "outcome" in record else "matcher")
    return {**record, "matcher": asked}


def judged_record(record: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The verdict record of a rollout.

    The verdict's `matcher` is the one that decided; what the question itself named is kept as
    `requested_matcher`, so that `select` can give the question back as it was. A completion cut off
    at max_tokens never followed the format, whatever it holds. A question without a gold answer
    has nothing that a completion without a final answer would fail: that cannot be judged, either.
    """
    asked = as_asked(record)["matcher"]
    if verdict.outcome == Outcome.NO_ANSWER and not any(map(str.strip, golds(record))):
        reason = "the question has no gold answer"
        verdict = verdict._replace(outcome=Outcome.CANNOT_JUDGE, score=None, reason=reason)
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
    rows: Iterable[Row], report: VerifyReport, quarantine: Quarantine, verifier: Verifier
) -> Iterator[dict[str, Any]]:
    """The verdict of each rollout row, counted in `report`; a row that asks for what cannot be done
    (an unknown matcher) goes to the quarantine.
    """
    waiting: deque[dict[str, Any]] = deque()  # handed to the verifier, which keeps the order

    def asked_rows() -> Iterator[tuple[dict[str, Any], str]]:
        for row in rows:
            asked = as_asked(row.data)
            if fault := verifier.fault(asked, unanswered=True):
                quarantine.add(row.file, row.line, fault, row.data)
                continue
            waiting.append(row.data)
            yield asked, row.data["completion"]

    for verdict in verifier.verdicts(asked_rows()):
        record = judged_record(waiting.popleft(), verdict)
        report.add(record)
        yield record
