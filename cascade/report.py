"""The report of a cascade run: one HTML file that needs nothing else, written into its folder.

    write_report(Path("runs/demo"))        # -> runs/demo/report.html

It reads (`collect`) what the stages left in the run's folder and turns it into a page (`render`):

    summary.json                      seed, seconds, the stages in order              required
    manifest.json                     preset; each stage's command and seconds        required
    eval/<stage>/metrics.json         rates and their standard errors                 required
    eval/<stage>/predictions.jsonl    the held-out questions with their answers
    eval/{sft-careful,control}/...    the model before careless data; the control
    stages/<stage>/trainer_state.json training curves
    stages/pairs/pairs.jsonl          preference pairs
    stages/{pairs,select}/verdicts.jsonl   offline rollouts, judged
    *.yaml                            the recipe
    stages/<stage>/config.resolved.json   every option as it was used, the tile budget among them
    stages/<stage>/config.json        the model's own: the side of a tile

Completions are untrusted text: jinja2 escapes everything, and the page's own content policy
forbids scripts and every request to a network.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from cascade.report_charts import Z95, Charts
from cascade.report_collect import collect
from cascade.report_data import (
    Curve,
    Difference,
    ReportData,
    StageResult,
    difference,
    label,
)

__all__ = ["ReportData", "collect", "headline", "render", "write_report"]

LONGEST_TEXT = 1500  # characters of a completion that are shown


def write_report(run: Path) -> Path:
    """Write report.html into the folder of a run and return its path.

    Raises UserError when the run lacks what a report needs, or what it holds cannot be read.
    """
    page = render(collect(run))
    path = run / "report.html"
    partial = run / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def render(data: ReportData) -> str:
    """Return the page as HTML; the same data gives the same bytes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("cascade", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration, clip=clip, words=mark_words)
    charts = Charts()

    def both(draw: Any, *args: Any) -> Markup:
        """A chart drawn twice: for a wide page, and for a phone."""
        wide, narrow = draw(*args, wide=True), draw(*args, wide=False)
        return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')

    return environment.get_template("report.html.j2").render(
        data=data,
        headline=headline(data),
        tiles=tiles(data),
        accuracy=both(charts.accuracy, data.shown),
        histograms=[(one, Markup(charts.histogram(one))) for one in data.histograms],
        curves=[
            (label(stage), stage, [(one, Markup(charts.curve(one))) for one in group])
            for stage, group in _by_stage(data.curves)
        ],
        times=both(charts.times, data.manifest) if data.manifest else None,
        label=label,
        join=shlex.join,
        z95=Z95,
    )


def _by_stage(curves: Sequence[Curve]) -> Iterable[tuple[str, list[Curve]]]:
    return [(stage, list(group)) for stage, group in groupby(curves, key=lambda one: one.stage)]


# -- the result in words -----------------------------------------------------------------------


def headline(data: ReportData) -> list[str]:
    """Return three sentences: what was run, how accuracy moved, what the control says.

    Computed, and as sober as the numbers: a step of no more than 3 standard errors of the
    difference is called that.
    """
    return [_what_was_run(data), _what_came_out(data), _what_the_control_says(data)]


def _what_was_run(data: ReportData) -> str:
    names = listing([stage.label for stage in data.stages])
    n = listing(sorted({f"{stage.n:,}" for stage in data.stages}))
    k = listing(sorted({str(stage.k) for stage in data.stages}))
    return (
        f"One model was trained by {names} in turn (preset {data.preset}, seed {data.seed}, "
        f"{duration(data.seconds)} in all), and each stage's checkpoint answered the same {n} "
        f"held-out questions: once greedily and {k} times sampled at temperature 1."
    )


def _what_came_out(data: ReportData) -> str:
    stages = data.stages
    course = " to ".join(f"{percent(stage.sampled)} ({stage.label})" for stage in stages)
    greedy = " to ".join(percent(stage.greedy) for stage in stages)
    if len(stages) == 1:
        return f"Sampled accuracy is {course}, greedy {greedy}."
    steps = [(b, a, difference(a, b)) for a, b in pairwise(stages)]
    if all(step.proven for _, _, step in steps):
        gains = "; ".join(f"{after.label} {_amount(step)}" for after, _, step in steps)
        each = "each step" if len(steps) > 1 else "the step"
        verdict = f"{each} is up by more than 3 standard errors of the difference ({gains})"
    else:
        verdict = listing([_step_in_words(*step) for step in steps])
    return f"Sampled accuracy went from {course}, greedy {greedy}: {verdict}."


def _step_in_words(after: StageResult, before: StageResult, step: Difference) -> str:
    if step.proven:
        return f"{after.label} improved on {before.label} ({_amount(step)})"
    if step.sigmas < -3:
        return f"{after.label} made it worse than {before.label} ({_amount(step)})"
    return (
        f"{after.label} did not improve on {before.label} by more than 3 standard errors "
        f"({_amount(step)})"
    )


def _what_the_control_says(data: ReportData) -> str:
    followed = listing([percent(stage.format) for stage in data.stages])
    formats = f"the answer format is followed in {followed} of the sampled answers"
    mpo = next((stage for stage in data.stages if stage.name == "mpo"), None)
    if data.control is None or mpo is None:
        return (
            f"No control was evaluated, so what MPO's preference terms add is not known; {formats}."
        )
    step = difference(data.control, mpo)
    control = (
        "The control, SFT continued on the chosen completions alone for as many steps as MPO, "
        f"reaches {percent(data.control.sampled)}"
    )
    if step.proven:
        verdict = f"so MPO's preference and quality terms add {_amount(step)}"
    elif step.sigmas < -3:
        verdict = f"so MPO's preference and quality terms did harm here ({_amount(step)})"
    else:
        verdict = (
            "so nothing is shown to come from MPO's preference and quality terms: "
            f"{_amount(step)}, no more than 3 standard errors"
        )
    return f"{control}, {verdict}; {formats}."


def _amount(step: Difference) -> str:
    return f"{100 * step.gain:+.1f} points, {abs(step.sigmas):.1f} s.e."


def tiles(data: ReportData) -> list[tuple[StageResult, Difference | None]]:
    """Return each stage with its step from the one before."""
    stages = data.stages
    steps = [difference(a, b) for a, b in pairwise(stages)]
    return list(zip(stages, [None, *steps], strict=True))


# -- small pieces of text ----------------------------------------------------------------------


def listing(words: Sequence[str]) -> str:
    """Join words as English does: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def percent(rate: float | None) -> str:
    """Return a rate in 0..1 as a percentage with one decimal; None (not measured) as a dash."""
    return "-" if rate is None else f"{100 * rate:.1f}%"


def duration(seconds: float | None) -> str:
    """Return seconds as "9.5 s", "47 s", "6 min 12 s" or "2 h 5 min"; None as a dash."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clip(text: str) -> str:
    """Return a text, cut where it is too long for the page, and then saying so."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} ... ({len(text) - LONGEST_TEXT:,} more characters)"


def mark_words(text: str, other: str) -> list[tuple[str, bool]]:
    """Cut `text` into runs of words: (run, True where `other` has other words there).

    >>> mark_words("The red bar is 2.", "The red bar is 3.")
    [('The red bar is', False), ('2.', True)]
    """
    words, others = clip(text).split(), clip(other).split()
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
    return [
        (" ".join(words[start:end]), kind != "equal")
        for kind, start, end, _, _ in blocks
        if end > start
    ]
