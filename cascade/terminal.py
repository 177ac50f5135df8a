"""The result of a cascade run as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.report_data import ReportData, StageResult, difference

if TYPE_CHECKING:
    from rich.table import Table


def stage_table(data: ReportData) -> Table:
    """Return one row a checkpoint, for 80 columns: accuracy, step, format, reading, time.

    The step is from the stage before (the control's from the SFT model that it continues), in
    points of sampled accuracy and in standard errors of the difference.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = data.stages[0]
    table = Table(
        title=f"{first.n:,} held-out questions, {first.k} sampled answers each, in percent",
        caption="+- one standard error; step: points (and standard errors)",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("stage", style="bold", no_wrap=True)
    for name in ("greedy", "sampled", "step", "format", "careless", "chain", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    befores = _befores(data)
    for result in data.shown:
        table.add_row(
            result.label,
            _percent(result.greedy),
            f"{_percent(result.sampled)} +-{_percent(result.sampled_se)}",
            _step(befores.get(result.name), result),
            _percent(result.format),
            _percent(result.careless),
            _percent(result.chain_correct),
            "-" if result.seconds is None else f"{result.seconds:,.0f} s",
            style="dim" if result.name in ("control", "sft-careful") else None,
        )
    return table


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"


def _befores(data: ReportData) -> dict[str, StageResult]:
    befores = {b.name: a for a, b in zip(data.stages, data.stages[1:], strict=False)}
    if data.control is not None:
        befores["control"] = data.stages[0]
    return befores


def _step(before: StageResult | None, after: StageResult) -> str:
    if before is None:
        return "-"
    step = difference(before, after)
    return f"{100 * step.gain:+.1f} ({step.sigmas:.1f})"
