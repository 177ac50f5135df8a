"""Which questions and pairs a report shows: chosen by rule, never by hand."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, TypeVar

Key = TypeVar("Key", str, tuple[str, str])

# Pairs whose completions share this much of their words differ by a slip.
SLIP = 0.6
# A large file is not compared to its end only to find another kind of pair.
LOOKED_AT = 2000


def fate(right: Sequence[bool], labels: Sequence[str]) -> str:
    """Say in words what became of a question, from whether each stage in turn had it right."""
    if not right[-1]:
        return "right once, wrong in the end" if any(right) else "never right"
    since = len(right) - 1
    while since > 0 and right[since - 1]:
        since -= 1
    return f"right from {labels[since]} on" if since else "right throughout"


def fate_words(labels: Sequence[str]) -> list[str]:
    """Return every fate that `fate` can give, the telling ones first."""
    gained = [f"right from {label} on" for label in labels[1:]]
    return [*gained, "right throughout", "right once, wrong in the end", "never right"]


def choose_examples(fates: dict[Key, str], words: Sequence[str], wanted: int) -> list[Key]:
    """Return the ids of `wanted` questions: by fate in turn, each time the next in file order.

    No hand chooses, and failures are shown with successes: every fate that occurs has a row
    before any has a second; what is left goes round again. Sorted by fate, as in `words`.
    """
    queues = {word: [id_ for id_, fate_ in fates.items() if fate_ == word] for word in words}
    chosen: list[Key] = []
    turn = 0
    while len(chosen) < min(wanted, len(fates)):
        chosen.extend(queue[turn] for queue in queues.values() if turn < len(queue))
        turn += 1
    return sorted(chosen[:wanted], key=lambda id_: words.index(fates[id_]))


def choose_pairs(rows: Sequence[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
    """Return up to `wanted` pairs of different questions in file order.

    Half have a rejected completion that shares most words with the chosen one (a slip),
    half one that does not (another way of answering), as far as the first 2,000 rows hold both.
    """
    slips: list[int] = []
    others: list[int] = []
    seen: set[str] = set()
    for index, row in enumerate(rows[:LOOKED_AT]):
        question = f"{row.get('image')}\n{row.get('question')}"
        if question in seen:
            continue
        seen.add(question)
        words = str(row.get("chosen")).split(), str(row.get("rejected")).split()
        (slips if SequenceMatcher(None, *words).ratio() >= SLIP else others).append(index)
        if min(len(slips), len(others)) >= wanted:
            break
    take = max(wanted // 2, wanted - len(others))
    kept = slips[:take]
    return [rows[index] for index in [*kept, *others[: wanted - len(kept)]]]
