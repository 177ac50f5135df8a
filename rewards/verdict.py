"""One completion against its gold answers: what is to be compared, and what follows from it.

    Task -> plan_comparisons -> Comparison, .. -> run -> Result, .. -> conclude -> Verdict

Both ends are pure; only the middle takes time, and only it can hang (rewards/pool/pool.py). What is
made for every completion is a named tuple, which takes half the time of a frozen dataclass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from rewards.datasets import DatasetEntry, DatasetTable, load_table
from rewards.extract import STYLES, Extraction, extract, options_in, whole_record
from rewards.match import MATCHERS, CannotJudge, get_matcher
from rewards.match.choices import is_option
from rewards.match.lists import is_list_of_lists
from rewards.match.quantities import read_number
from rewards.match.texts import normalise

_CAPITAL = re.compile(r"\(?[A-Z]\)?\.?")
_FORMULA = re.compile(r"\\[A-Za-z]|\^|[√π]")
# InternVL's own form, or its coordinates alone
_BOX = re.compile(
    r"\s{0,9}(?:<ref>[^<]{0,200}</ref>\s{0,9})?<box>|\s{0,9}\[\[(?:[\d.]{1,9}\s{0,9}[,\]]\s{0,9}){4}\]"
)
_NUMERAL = re.compile(r"(?:(?<!\S)-[$€£¥]?)?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
GROUNDING = ("box", "point")  # their answers are written in a way of their own


class Outcome(StrEnum):
    """How a verdict came out; equal to its own string.

    no_answer: the completion has no final answer. cannot_judge: the gold answer means nothing to
    its matcher, or the judge failed. timeout: a matcher ran past its limit. The last two are
    neither right nor wrong and are never in a pair.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    CANNOT_JUDGE = "cannot_judge"
    TIMEOUT = "timeout"


class Verdict(NamedTuple):
    """What became of one completion.

    extracted: the final answer, None without one. matcher: which matcher decided (or would have).
    score: in [0, 1], None when it cannot be judged. format_ok: the prompt's style was followed.
    reason: why it cannot be judged, else None.
    """

    outcome: Outcome
    extracted: str | None
    matcher: str
    score: float | None
    format_ok: bool
    reason: str | None = None


@dataclass(frozen=True)
class Task:
    """One completion to judge.

    answers: the gold answers; any of them is right. matchers: the names to compare by, where the
    question or its data set names any; one that accepts is enough. options: the texts of a
    multiple-choice question. style: how the prompt asked for the answer (`extract.STYLES`).
    least: the least score that is a match, where it is not the matcher's own. same_digits: a text
    that is merely like the gold answer must still hold the same digits.
    """

    completion: str
    answers: tuple[str, ...]
    matchers: tuple[str, ...] = ()
    options: tuple[str, ...] | None = None
    style: str = "auto"
    least: float | None = None
    same_digits: bool = False


class Comparison(NamedTuple):
    """A prediction and a gold answer under one matcher; what a result is cached by."""

    matcher: str
    prediction: str
    gold: str
    options: tuple[str, ...] | None = None

    def run(self) -> Result:
        """The result, computed here and now, however long it takes."""
        try:
            return Result(MATCHERS[self.matcher](self.prediction, self.gold, self.options))
        except CannotJudge as error:
            return Result(None, str(error))


class Result(NamedTuple):
    """A comparison's score, or None and the reason; timeout: it ran past its limit."""

    score: float | None
    reason: str | None = None
    timeout: bool = False


class Plan(NamedTuple):
    """What is to be compared for one task, fast matchers first; nothing without an answer."""

    found: Extraction
    matcher: str
    comparisons: tuple[Comparison, ...]
    least: float | None = None
    same_digits: bool = False

    def accepts(self, comparison: Comparison, result: Result) -> bool:
        """Whether a result is a match."""
        least = MATCHERS[comparison.matcher].least if self.least is None else self.least
        if result.score is None or result.score < least:
            return False
        if not self.same_digits or result.score == 1.0:
            return True
        return digits_of(comparison.prediction) == digits_of(comparison.gold)


def digits_of(text: str) -> str:
    """The digits of a text, with the signs and decimal points of its numbers.

    >>> digits_of("May 12, 1998"), digits_of("$1,234.50"), digits_of("a loss of -3")
    ('121998', '1234.50', '-3')
    """
    return "".join(_NUMERAL.findall(_THOUSANDS.sub("", normalise(text))))


def choose_matcher(gold: str, options: Sequence[str] | None = None) -> str:
    """The matcher for a gold answer when none is named.

    choice when there are options or the gold is one capital letter, box for <box>, number when the
    gold is a number (with a known unit or none), math for a formula, otherwise exact.

    >>> choose_matcher("B"), choose_matcher("12 cm"), choose_matcher("3 Doors Down")
    ('choice', 'number', 'exact')
    """
    if options or _CAPITAL.fullmatch(gold.strip()):
        return "choice"
    if _BOX.match(gold):
        return "box"
    if read_number(gold, known_units=True) is not None:
        return "number"
    return "math" if _FORMULA.search(gold) else "exact"


def matcher_names(matcher: object) -> tuple[str, ...]:
    """The names in a "matcher" field: one name, or a list of names; () for None.

    Raises ValueError, naming the known ones, for anything else.
    """
    names = [matcher] if isinstance(matcher, str) else [] if matcher is None else matcher
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"matcher {matcher!r} is neither a name nor a list of names")
    for name in names:
        get_matcher(name)
    return tuple(names)


def gold_answers(answer: object, matchers: Sequence[str] = ()) -> tuple[str, ...]:
    """The gold answers of a field that holds one or several; any of them is right.

    A number is its own text. Under list, box and point a list may itself be one gold answer:
    ["a", "b"] are the two items of a list unless an item is a list of its own ("a, b").
    Raises ValueError for an empty list or another type.

    >>> gold_answers(["NYC", "New York"]), gold_answers(["a", "b"], ["list"])
    (('NYC', 'New York'), ('["a", "b"]',))
    """
    if isinstance(answer, str):
        return (answer,)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return (str(answer),)
    if isinstance(answer, Mapping) and "list" in matchers:  # a record of SROIE
        return (json.dumps(answer, ensure_ascii=False),)
    if not isinstance(answer, list | tuple):
        raise ValueError(f"answer {answer!r} is neither a text nor a list of texts")
    if not answer:
        raise ValueError("answer is an empty list; give at least one gold answer")
    one_list = "list" in matchers and not is_list_of_lists(answer)
    if one_list or (set(matchers) & set(GROUNDING) and not isinstance(answer[0], str)):
        return (json.dumps(answer, ensure_ascii=False),)
    return tuple(gold for item in answer for gold in gold_answers(item, matchers))


def option_texts(options: object) -> tuple[str, ...] | None:
    """The options of a question as a task holds them; None for none.

    Raises ValueError for anything but a list of texts.

    >>> option_texts(["Paris", "London"])
    ('Paris', 'London')
    """
    if options is None:
        return None
    if not isinstance(options, list | tuple) or not all(isinstance(text, str) for text in options):
        raise ValueError(f"options {options!r} is not a list of texts")
    return tuple(options)


def _names_no_option(found: Extraction, task: Task) -> bool:
    """Whether nothing was read, or in a sentence something that is none of the options."""
    return found.text is None or (
        found.style == "prose" and not is_option(found.text, task.options)
    )


def plan_comparisons(task: Task) -> Plan:
    """Read a completion's final answer and say what it is to be compared with."""
    pairs = [
        (name, gold)
        for gold in task.answers
        for name in task.matchers or (choose_matcher(gold, task.options),)
    ]
    grounded = pairs[0][0] in GROUNDING
    found = extract(task.completion, "box" if grounded and task.style == "auto" else task.style)
    if pairs[0][0] == "choice" and task.style == "auto" and _names_no_option(found, task):
        line = extract(task.completion, "letter")  # the first or the last line; or prose
        found = line if line.text and is_option(line.text, task.options) else found
    if pairs[0][0] == "list":
        found = whole_record(task.completion, found)
    if found.text is None:
        return Plan(found, pairs[0][0], ())
    matcher = pairs[0][0]
    if len(pairs) > 1:
        pairs.sort(key=lambda pair: MATCHERS[pair[0]].slow)
    comparisons = [
        Comparison(name, found.text, gold, task.options if name == "choice" else None)
        for name, gold in pairs
    ]
    return Plan(found, matcher, tuple(comparisons), task.least, task.same_digits)


def conclude(plan: Plan, results: Sequence[Result]) -> Verdict:
    """The verdict from the results of a plan's comparisons (as many as were needed, in order).

    A match by any of them is correct. Otherwise one that ran out of time leaves it open, and one
    that was judged makes it wrong, whatever the others could not judge.
    """
    found = plan.found
    if found.text is None:
        return Verdict(Outcome.NO_ANSWER, None, plan.matcher, 0.0, found.format_ok)
    best: tuple[bool, float] | None = None  # the best that was judged: accepted, its score
    left: Result | None = None  # that could not be judged; the first that ran out of time, if any
    matcher, open_matcher = plan.matcher, plan.matcher
    for comparison, result in zip(plan.comparisons, results, strict=False):
        if result.score is None:
            if left is None or result.timeout > left.timeout:
                left, open_matcher = result, comparison.matcher
            continue
        rank = (plan.accepts(comparison, result), result.score)
        if best is None or rank > best:
            best, matcher = rank, comparison.matcher
    if best is not None and (best[0] or left is None or not left.timeout):
        outcome = Outcome.CORRECT if best[0] else Outcome.WRONG
        return Verdict(outcome, found.text, matcher, best[1], found.format_ok)
    assert left is not None  # there is a result at least
    outcome = Outcome.TIMEOUT if left.timeout else Outcome.CANNOT_JUDGE
    return Verdict(outcome, found.text, open_matcher, None, found.format_ok, left.reason)


def names_option(gold: str, options: Sequence[str]) -> bool:
    """Whether a gold answer is one of the options, by letter or by text."""
    return Comparison("choice", gold, gold, tuple(options)).run().score == 1.0


def entry_of(record: Mapping[str, Any], table: DatasetTable | None = None) -> DatasetEntry | None:
    """The table's entry for a record's "dataset"; None where the record names a matcher itself."""
    name = record.get("dataset")
    if record.get("matcher") or not isinstance(name, str):
        return None
    return (table or load_table()).find(name)


def task_of(
    record: Mapping[str, Any],
    completion: str,
    *,
    style: str = "auto",
    table: DatasetTable | None = None,
) -> Task:
    """The task of judging a completion of a question's record.

    Read are its fields answer, matcher (a name or a list of names), dataset (what the table says of
    it, where no matcher is named; `load_table`) and options (without them, those that the question
    itself lists, where each gold answer is one of them); style "auto" is the record's prompt_style.
    Raises ValueError for a matcher or an answer that is none.
    """
    if style == "auto" and record.get("prompt_style") in STYLES:
        style = record["prompt_style"]
    entry = entry_of(record, table)
    matchers = entry.matchers if entry else matcher_names(record.get("matcher"))
    answers = gold_answers(record["answer"], matchers)
    options = record.get("options")
    if options is None and isinstance(record.get("question"), str):
        listed = options_in(record["question"])
        # a list in a question is not always one of options: then the gold answer is none of them
        if listed and all(names_option(gold, listed) for gold in answers):
            options = listed
    chosen = option_texts(options)
    if entry is None:
        return Task(completion, answers, matchers, chosen, style)
    return Task(completion, answers, matchers, chosen, style, entry.least, entry.same_digits)


def request_fault(
    record: Mapping[str, Any], *, unanswered: bool = False, table: DatasetTable | None = None
) -> str | None:
    """What keeps a question's completions from being judged as it asks for, or None.

    unanswered: whether a question without a gold answer will do (nothing is right or wrong then).
    table: see `task_of`.

    >>> request_fault({"matcher": ["psychic"]})[:30]
    "matcher 'psychic' is unknown; "
    """
    options = record.get("options")
    answer = record.get("answer", "")
    try:
        entry = entry_of(record, table)
        golds = gold_answers(
            answer, entry.matchers if entry else matcher_names(record.get("matcher"))
        )
    except ValueError as error:
        return str(error)
    if not unanswered and not any(gold.strip() for gold in golds):
        return "field 'answer' is empty: there is nothing to judge completions by"
    try:
        option_texts(options)
    except ValueError:
        return "field 'options' is not a list of strings"
    return None
