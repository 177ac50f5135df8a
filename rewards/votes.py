"""Which of several completions give the same answer: the classes that a majority is counted by.

Two answers are the same where they are equal after normalisation, or where a matcher of the
question says so in either direction. Only matchers that ask for equality take part: a tolerance
(relaxed, anls, box, point) forgives a distance from the gold answer, and would make one class of
answers that differ. The gold answer itself takes no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice

from rewards.match.texts import normalise
from rewards.pool import VerifierPool
from rewards.verdict import Comparison, Outcome, Task, choose_matcher

_EQUALITIES = ("vqa", "choice", "number", "math", "list")
_AT_ONCE = 256  # questions whose answers are compared together

Votes = list[int | None]


def vote_classes(
    asked: Iterable[tuple[Task, Sequence[str | None]]], pool: VerifierPool
) -> Iterator[Votes]:
    """Of each question's extracted answers the class: its number from 0, None for no answer.

    asked: a task of the question (its completion is not read) and the answers, in order. An answer
    joins the first class whose first answer it equals. What cannot be compared is another answer.
    """
    questions = iter(asked)
    while part := list(islice(questions, _AT_ONCE)):
        texts = [_distinct(answers) for _, answers in part]
        comparisons = [
            _comparisons(task, known[i], known[j])
            for (task, _), distinct in zip(part, texts, strict=True)
            for known in [list(distinct.values())]
            for i, j in combinations(range(len(known)), 2)
        ]
        same = (verdict.outcome == Outcome.CORRECT for verdict in pool.compare(comparisons))
        for (_, answers), distinct in zip(part, texts, strict=True):
            pairs = list(combinations(range(len(distinct)), 2))
            found = zip(pairs, islice(same, len(pairs)), strict=True)
            equal = {pair for pair, is_same in found if is_same}
            numbers = dict(zip(distinct, _classes(len(distinct), equal), strict=True))
            yield [None if text is None else numbers[normalise(text)] for text in answers]


def _distinct(answers: Sequence[str | None]) -> dict[str, str]:
    """The answers that differ after normalisation, by that, as they were first given."""
    found: dict[str, str] = {}
    for text in answers:
        if text is not None:
            found.setdefault(normalise(text), text)
    return found


def _classes(number: int, equal: set[tuple[int, int]]) -> list[int]:
    """The class of each of so many answers; equal: the pairs (i < j) that are the same."""
    firsts: list[int] = []
    classes = []
    for j in range(number):
        joined = next((c for c, i in enumerate(firsts) if (i, j) in equal), len(firsts))
        if joined == len(firsts):
            firsts.append(j)
        classes.append(joined)
    return classes


def _comparisons(task: Task, one: str, other: str) -> list[Comparison]:
    """What is to be asked of two answers: one of these is enough."""
    names = task.matchers or tuple(choose_matcher(gold, task.options) for gold in task.answers)
    if "relaxed" in names:
        names = (*names, "number")
    asked = [name for name in _EQUALITIES if name in names]
    return [
        Comparison(name, prediction, gold, task.options if name == "choice" else None)
        for name in asked or ["exact"]
        for prediction, gold in ((other, one), (one, other))
    ]
