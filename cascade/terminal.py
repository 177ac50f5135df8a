"""The result of a cascade run as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.report_data import ReportData, StageResult

if TYPE_CHECKING:
    from rich.table import Table

_SHARES = ("format", "careless", "right chain")  # that have a column, where they were measured


def stage_table(data: ReportData) -> Table:
    """Return one row a checkpoint, for 80 columns: accuracy, step, shares, time.

    Sampled accuracy and the step, in points from the stage whose model it began from, each with
    half its 95% interval.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = data.results[0].whole
    table = Table(
        title=f"{first.n:,} held-out questions, {first.k} sampled answers each, in percent",
        caption="+- half a 95% interval; step: points over the stage that it began from",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shares = [name for name in _SHARES if any(name in one.whole.shares for one in data.results)]
    table.add_column("stage", style="bold", no_wrap=True)
    for name in ("greedy", "sampled", "step", *shares, "time"):
        table.add_column(name.removeprefix("right "), justify="right", no_wrap=True)
    for result in data.results:
        sampled = result.whole.sampled
        table.add_row(
            result.label,
            _percent(result.whole.greedy.value),
            f"{_percent(sampled.value)} +-{_percent((sampled.high - sampled.low) / 2)}",
            _step(data, result),
            *(_percent(result.whole.shares.get(name)) for name in shares),
            "-" if result.seconds is None else f"{result.seconds:,.0f} s",
            style="dim" if result.info.aside else None,
        )
    return table


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"


def _step(data: ReportData, result: StageResult) -> str:
    step = data.step_of(result)
    if step is None:
        return "-"
    gain = step.sampled
    return f"{100 * gain.value:+.1f} +-{_percent((gain.high - gain.low) / 2)}"
