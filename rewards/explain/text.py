"""An explanation as a person reads it at a glance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rewards.display import number, one_line, print_lines, quoted, visible
from rewards.explain.explain import Explanation, Step

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = {
    "correct": "green",
    "wrong": "red",
    "no_answer": "yellow",
    "cannot_judge": "magenta",
    "timeout": "magenta",
}
MOST_STEPS = 12  # comparisons that are printed, matches first where there are more
_AROUND = 160  # characters of the completion before and after its final answer
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def print_explanation(told: Explanation) -> None:
    """The explanation on stdout, a label and a value a line."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in _rows(told):
        grid.add_row(label, value)
    print_lines(grid)


def _rows(told: Explanation) -> Iterator[tuple[str, Text]]:
    from rich.text import Text

    if told.question:
        yield "question", Text(one_line(told.question, 300))
    golds = " or ".join(quoted(gold) for gold in dict.fromkeys(told.answers[:MOST_STEPS]))
    yield "gold answer", Text(golds)
    yield "completion", _completion(told)
    yield "final answer", _found(told)
    yield "format", _format(told)
    yield "options", Text(_options(told))
    yield "matcher", Text(visible(told.matcher_from))
    steps = sorted(told.steps, key=lambda step: not step.accepted)
    for step in told.steps if len(steps) <= MOST_STEPS else steps[:MOST_STEPS]:
        yield f"  {step.matcher}", _step(step)
    if len(steps) > MOST_STEPS:
        yield "", Text(f"and {len(steps) - MOST_STEPS} more, which change nothing")
    if told.others:
        yield "others say", _others(told)
    verdict = told.verdict
    line = Text(str(verdict.outcome), style=f"bold {COLOURS[verdict.outcome]}")
    if verdict.extracted is not None:
        line.append(f", decided by {verdict.matcher}", style="default")
    if verdict.score is not None and verdict.extracted is not None:
        line.append(f", score {number(verdict.score)}", style="default")
    if verdict.reason:
        line.append(f": {visible(verdict.reason)}", style="default")
    yield "outcome", line
    kept = "none: not judged, so in no pair and no average"
    yield "reward", Text(kept if told.reward is None else number(told.reward))


def _completion(told: Explanation) -> Text:
    """The end of the completion, the final answer marked."""
    from rich.text import Text

    text = told.completion
    if not text.strip():
        return Text("(empty)", style="dim")
    if told.span is None:
        return Text(_cut(visible(text[-8 * _AROUND :]), 2 * _AROUND, from_end=True))
    start, end = told.span
    line = Text(_cut(visible(text[max(0, start - 4 * _AROUND) : start]), _AROUND, from_end=True))
    line.append(f"⟦{visible(text[start:end])}⟧", style="bold reverse")
    line.append(_cut(visible(text[end : end + 4 * _AROUND]), _AROUND, from_end=False))
    return line


def _cut(text: str, longest: int, *, from_end: bool) -> str:
    if len(text) <= longest:
        return text
    return f"…{text[-longest:]}" if from_end else f"{text[:longest]}…"


def _found(told: Explanation) -> Text:
    from rich.text import Text

    found = told.extraction
    if found.text is None:
        why = visible(found.fault) if found.fault else f"nothing reads as one (style {told.style})"
        return Text(f"none: {why}", style="yellow")
    line = Text(quoted(found.text, 1000), style="bold")
    return line.append(f", found as {found.style} (asked for: {told.style})", style="default")


def _format(told: Explanation) -> Text:
    from rich.text import Text

    if told.extraction.format_ok:
        return Text("followed", style="green")
    why = f": {visible(told.extraction.fault)}" if told.extraction.fault else ""
    return Text(f"not followed{why}", style="yellow")


def _options(told: Explanation) -> str:
    if not told.options:
        return told.options_from
    listed = zip(_LETTERS, told.options, strict=False)
    shown = " · ".join(f"{letter} {one_line(option)}" for letter, option in listed)
    return f"{shown} ({told.options_from})"


def _step(step: Step) -> Text:
    from rich.text import Text

    line = Text(f"gold {quoted(step.gold)} read as {one_line(step.gold_read, 300)}\n")
    line.append(f"answer read as {one_line(step.answer_read, 300)}\n")
    style = "green" if step.accepted else COLOURS[step.outcome]
    if step.score is None:
        line.append(step.outcome.replace("_", " "), style=style)
    else:
        sign = "match" if step.accepted else "no match"
        line.append(f"score {number(step.score)} (a match from {number(step.least)} on): ")
        line.append(sign, style=style)
    if step.note:
        line.append(f"; {visible(step.note)}")
    return line


def _others(told: Explanation) -> Text:
    """Who else would have said what, those that disagree with the verdict first."""
    from rich.text import Text

    said: dict[str, list[str]] = {}
    for one in told.others:
        partly = f" ({number(one.score)})" if one.outcome == "wrong" and one.score else ""
        said.setdefault(one.outcome, []).append(f"{one.matcher}{partly}")
    line = Text()
    for outcome, names in sorted(said.items(), key=lambda pair: pair[0] == told.verdict.outcome):
        line.append("\n" if line else "")
        line.append(outcome.replace("_", " "), style=COLOURS[outcome])
        line.append(f": {', '.join(names)}")
    return line
