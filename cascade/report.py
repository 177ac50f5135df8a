"""The report of a run: one HTML file that needs nothing else, written into its folder.

    write_report(Path("runs/mine"))        # -> runs/mine/report.html

It reads (`collect`) what the stages left in the run's folder and turns it into a page (`render`):

    manifest.json                     the processes: kinds, commands, times        required
    summary.json                      which stages the recipe reports, in order
    recipe.yaml                       gates, stages that were not begun
    eval/<stage>/metrics.json         rates and their intervals
    eval/<stage>/predictions.jsonl    the held-out questions with their answers
    stages/<stage>/trainer_state.json training curves (else the last checkpoint's)
    stages/<stage>/{pairs,dropout}.jsonl   preference pairs
    stages/<stage>/verdicts.jsonl     rollouts, judged
    stages/<stage>/rollouts/          those of online RL
    stages/<stage>/config.resolved.json    every option as it was used, the tile budget among them
    stages/<stage>/config.json        the model's own: the side of a tile

A folder with a run for each seed (seed-0, seed-1, ...) has a page of its own, over those of its
seeds (cascade/report_seeds.py). Every number is told in docs/report.md.

Completions are untrusted text: jinja2 escapes everything, and the page's own content policy
forbids scripts and every request to a network.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.report_charts import Charts, line_colour
from cascade.report_collect import collect
from cascade.report_data import TONES, Panel, ReportData, StageInfo
from cascade.report_svg import variable
from cascade.report_words import (
    chance,
    clip,
    count,
    duration,
    headline,
    mark_words,
    measured,
    percent,
    remarks,
    signed,
    span,
    troubles,
)

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["ReportData", "collect", "headline", "render", "write_report"]


def write_report(run: Path, *, many: bool = False) -> Path:
    """Write report.html into the folder of a run, or of the runs of several seeds; its path.

    many: of several seeds, even where the folder is that of a run, too.

    Raises UserError when the folder is none of the two, or what it holds cannot be read.
    """
    from cascade.report_seeds import collect_seeds, render_seeds, seed_folders

    many = many or bool(not (run / "manifest.json").exists() and seed_folders(run))
    page = render_seeds(collect_seeds(run)) if many else render(collect(run))
    path = run / "report.html"
    partial = run / "report.html.partial"
    # half a surrogate pair, which a completion may hold, no file can
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
    return path


def environment() -> Environment:
    """The templates of the pages; everything is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("cascade", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        percent=percent, duration=duration, clip=clip, words=mark_words, chance=chance,
        count=count, signed=signed, span=span,
        measured=measured,
    )  # fmt: skip
    return templates


def both(draw: Any, *args: Any) -> Markup:
    """A chart drawn twice: for a wide page, and for a phone."""
    from markupsafe import Markup

    wide, narrow = draw(*args, wide=True), draw(*args, wide=False)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')


def render(data: ReportData) -> str:
    """Return the page as HTML; the same data gives the same bytes."""
    from markupsafe import Markup

    charts, results = Charts(), data.results
    names = list(dict.fromkeys(name for result in results for name in result.datasets))

    def panels(found: tuple[Panel, ...], info: StageInfo) -> list[tuple[Panel, Any, Markup]]:
        return [(one, _keys(one, info), Markup(charts.panel(one, info))) for one in found]

    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            headline=headline(data),
            remarks=remarks(data),
            troubles=troubles(data),
            shares=list(dict.fromkeys(name for one in results for name in one.whole.shares)),
            passes=_largest(data, "passes"),
            majorities=_largest(data, "majorities"),
            datasets=names if len(names) > 1 else [],
            accuracy=both(charts.accuracy, results) if results else None,
            steps=both(charts.steps, data.steps) if data.steps else None,
            by_dataset=both(charts.datasets, results, names) if len(names) > 1 else None,
            sizes=both(charts.sizes, results) if _has_sizes(data) else None,
            rollouts=[
                (one, Markup(charts.right_answers(one, _tone_of(data, one.model))))
                for one in data.rollouts
            ],
            changes=[(one, Markup(charts.change(one, one.info))) for one in data.changes],
            trainings=[
                (one.info, panels(one.panels, one.info), panels(one.others, one.info))
                for one in data.trainings
            ],
            longest=max([one.seconds for one in data.processes] + [1e-9]),
            cpu=any(one.cpu_seconds is not None for one in data.processes),
            tokens=any(one.tokens is not None for one in data.processes),
            join=shlex.join,
        )
    )


def _keys(panel: Panel, info: StageInfo) -> list[tuple[str, str]]:
    """(colour, word) of a chart's lines, where it has several or their one has a word."""
    lines = enumerate(panel.lines)
    return [(variable(line_colour(panel, one, place, info)), one.label) for place, one in lines
            if one.label]  # fmt: skip


def _tone_of(data: ReportData, name: str | None) -> int:
    return TONES if name is None else data.stages[name].tone


def _largest(data: ReportData, field: str) -> int | None:
    """The largest k, above 1, that pass@k or majority@k is known of."""
    sizes = [size for one in data.results for size in getattr(one.whole, field) if size > 1]
    return max(sizes, default=None)


def _has_sizes(data: ReportData) -> bool:
    return any(len(result.whole.passes) > 2 for result in data.results)
