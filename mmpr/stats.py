"""Counts and lengths of a file of questions, rollouts, verdicts or pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl.data import Kind, open_source
from internvl.data.records import list_images
from internvl.errors import DataError


def detect_kind(path: Path) -> Kind:
    """The kind of records that data hold, from the first that can be read (a meta.json's: pairs).

    Raises DataError when the data are missing or their first record is of no known kind.
    """
    if path.suffix == ".json" and path.is_file():
        return "pair"
    source = open_source(path)
    for index in range(len(source)):
        record, fault = source.read(index)
        if fault is not None:
            continue  # read_rows puts it into the quarantine
        for field, kind in _TELLTALES:
            if isinstance(record, dict) and field in record:
                return kind
        raise DataError(f"{path}: its first record is no question, rollout, verdict or pair")
    raise DataError(f"{path}: not one record")


_TELLTALES: tuple[tuple[str, Kind], ...] = (
    ("chosen", "pair"),
    ("outcome", "verdict"),
    ("completion", "rollout"),
    ("answer", "question"),
)


def spread(values: Sequence[float]) -> str:
    """Mean, median and extremes in one cell.

    >>> spread([1, 2, 9])
    'mean 4.0, median 2, 1 to 9'
    """
    if not values:
        return "none"
    ordered = sorted(values)
    mean = sum(ordered) / len(ordered)
    return (
        f"mean {mean:.1f}, median {ordered[len(ordered) // 2]:g}, {ordered[0]:g} to {ordered[-1]:g}"
    )


def _shares(counts: Counter[str]) -> str:
    total = counts.total()
    return ", ".join(
        f"{name} {count} ({count / total:.1%})" for name, count in counts.most_common(8)
    )


def _images(records: Sequence[dict[str, Any]]) -> Counter[str]:
    def number(record: dict[str, Any]) -> int:
        return len(list_images(record))

    return Counter(f"{number(record)} image(s)" for record in records)


def summarise(records: Sequence[dict[str, Any]], kind: Kind) -> dict[str, str]:
    """What there is to know of a file's records at a glance: name -> text."""
    facts = {"kind": kind, "rows": str(len(records)), "images": _shares(_images(records))}
    if kind == "pair":
        chosen = [len(record["chosen"]) for record in records]
        rejected = [len(record["rejected"]) for record in records]
        longer = sum(a > b for a, b in zip(chosen, rejected, strict=True))
        if kinds := Counter(record["kind"] for record in records if "kind" in record):
            facts["kinds"] = _shares(kinds)
        facts["chosen, characters"] = spread(chosen)
        facts["rejected, characters"] = spread(rejected)
        facts["chosen is the longer"] = f"{longer / len(records):.1%}"
        return facts
    facts["question, characters"] = spread([len(record["question"]) for record in records])
    if kind == "question":
        return facts
    samples = Counter(record["id"] for record in records)
    facts["questions"] = str(len(samples))
    facts["samples a question"] = spread(list(samples.values()))
    facts["completion, characters"] = spread([len(record["completion"]) for record in records])
    if tokens := [len(record["token_ids"]) for record in records if "token_ids" in record]:
        facts["completion, tokens"] = spread(tokens)
    reasons = Counter(record["finish_reason"] for record in records if "finish_reason" in record)
    if reasons:
        facts["finish reasons"] = _shares(reasons)
    if kind == "verdict":
        facts["outcomes"] = _shares(Counter(record["outcome"] for record in records))
        facts["matchers"] = _shares(Counter(str(record.get("matcher")) for record in records))
        followed = sum(record.get("format_ok") is True for record in records)
        facts["format followed"] = f"{followed / len(records):.1%}"
    return facts
