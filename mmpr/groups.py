"""Verdicts by question, and what a question keeps once its rollouts' own fields are taken off."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from internvl.data import Quarantine, Row
from rewards import Outcome

ROLLOUT_FIELDS = (
    "sample", "completion", "token_ids", "finish_reason", "model", "seed", "temperature",
    "top_p", "top_k", "max_tokens",
)  # fmt: skip
VERDICT_FIELDS = (
    "outcome", "extracted", "matcher", "score", "format_ok", "reason",
    "requested_matcher",
)  # fmt: skip
OUTCOMES = tuple(str(outcome) for outcome in Outcome)
JUDGED = ("correct", "wrong", "no_answer")  # cannot_judge and timeout are neither right nor wrong


def verdict_fault(record: dict[str, Any]) -> str | None:
    """What keeps a verdict record from being used, or None."""
    outcome = record.get("outcome")
    if outcome not in OUTCOMES:
        return f"outcome {outcome!r} is unknown; one of: {', '.join(OUTCOMES)}"
    if not isinstance(record.get("format_ok"), bool):
        return "field 'format_ok' is not a boolean"
    if outcome in ("correct", "wrong") and not isinstance(record.get("extracted"), str):
        return f"outcome is {outcome!r} but field 'extracted' is not a string"
    return None


def usable_groups(rows: Sequence[Row], quarantine: Quarantine) -> Iterator[list[dict[str, Any]]]:
    """The verdict records of each question, in order of first appearance.

    Those that are not whole are in the quarantine when this returns. Of the others only the numbers
    are held: a question's are read when its turn comes.
    """
    numbers: dict[str, array[int]] = {}
    for number, row in enumerate(rows):
        if fault := verdict_fault(row.data):
            quarantine.add(row.file, row.line, fault, row.data)
        else:
            numbers.setdefault(row.data["id"], array("q")).append(number)
    return ([rows[number].data for number in group] for group in numbers.values())


def golds(record: dict[str, Any]) -> list[str]:
    """The gold answers of a rollout or verdict; the items of a list are one answer.

    >>> golds({"answer": ["NYC", "New York"]}), golds({"answer": ["a", "b"], "matcher": "list"})
    (['NYC', 'New York'], ['a, b'])
    """
    answer = record["answer"]
    if isinstance(answer, str):
        return [answer]
    named = record.get("matcher")
    return [", ".join(answer)] if named in ("list", ["list"]) else list(answer)


def strip_rollout(verdict: dict[str, Any]) -> dict[str, Any]:
    """The question that a verdict belongs to, with the matcher it asked for, if any."""
    question = {
        key: value
        for key, value in verdict.items()
        if key not in ROLLOUT_FIELDS and key not in VERDICT_FIELDS
    }
    if "requested_matcher" in verdict:
        question["matcher"] = verdict["requested_matcher"]
    return question
