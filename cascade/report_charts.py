"""The report's charts: matplotlib figures as inline SVG whose colours follow the page's theme.

matplotlib draws with placeholder colours; in the SVG each becomes a CSS variable of the page, so
that one drawing is right in light and dark. Text stays text and takes the page's font. The output
depends on the data alone: no date, no random ids, no user's matplotlibrc.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING

from cascade.report_data import (
    Curve,
    Histogram,
    ManifestRow,
    StageResult,
    label,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colour -> CSS variable (defined, for light and dark, in templates/report.html.j2).
INK, MUTED, GRID, CARD = "#01fe10", "#01fe11", "#01fe12", "#01fe13"
SFT, MPO, GSPO, OTHER = "#01fe14", "#01fe15", "#01fe16", "#01fe17"
GOOD, BAD, BAND = "#01fe18", "#01fe19", "#01fe1a"
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", CARD: "card",
    SFT: "sft", MPO: "mpo", GSPO: "rl", OTHER: "other",
    GOOD: "good", BAD: "bad", BAND: "band",
}  # fmt: skip
STAGE_COLOURS = {"sft-careful": SFT, "sft": SFT, "mpo": MPO, "control": MPO, "rl": GSPO}
OUTCOME_COLOURS = {"correct": GOOD, "wrong": BAD}
Z95 = 1.96  # half-width of a 95% interval in standard errors


class Charts:
    """Draws the charts of one page; each gets ids of its own, so that they can share the page."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def accuracy(self, results: Sequence[StageResult], *, wide: bool) -> str:
        """Return accuracy by stage, sampled and greedy, with 95% intervals; the control hollow."""
        width = 990 if wide else 360
        return self._draw(
            width,
            52 * len(results) + 60,
            "Held-out accuracy by stage, sampled and greedy, with 95% intervals",
            lambda axes: _accuracy(axes, results),
            left=104 if wide else 84,
        )

    def curve(self, curve: Curve) -> str:
        """Return one training curve: the smoothed line over the faint raw one."""
        name = f"{curve.title} of {label(curve.stage)} by step"
        return self._draw(
            240, 132, name, lambda axes: _curve(axes, curve), left=46, bottom=20, top=16
        )

    def histogram(self, histogram: Histogram) -> str:
        """Return counts by bin; verdicts as rows, numbers of right answers as columns."""
        name = f"{histogram.title}: {histogram.note}"
        if histogram.band is None:
            height = 34 * len(histogram.bins) + 14
            return self._draw(460, height, name, lambda axes: _rows(axes, histogram), left=92)
        return self._draw(
            460, 190, name, lambda axes: _columns(axes, histogram), left=46, bottom=26
        )

    def times(self, rows: Sequence[ManifestRow], *, wide: bool) -> str:
        """Return the seconds of each stage as bars, in the order in which they ran."""
        width = 990 if wide else 360
        height = 28 * len(rows) + 12
        left = 140 if wide else 126
        return self._draw(width, height, "Time by stage", lambda axes: _times(axes, rows), left)

    def _draw(
        self,
        width: int,
        height: int,
        name: str,
        draw: Callable[[Axes], None],
        left: float,
        bottom: float = 10,
        top: float = 8,
    ) -> str:
        """Return the chart as an <svg>; sizes and margins in CSS pixels at natural size."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_style())
            figure = Figure(figsize=(width / 72, height / 72))
            axes = figure.add_axes(
                (
                    left / width,
                    bottom / height,
                    1 - (left + 14) / width,
                    1 - (bottom + top) / height,
                )
            )
            draw(axes)
            return _as_svg(figure, f"chart{next(self._numbers)}", name)


def _style() -> dict[str, object]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "cascade",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
    }


def _as_svg(figure: Figure, prefix: str, name: str) -> str:
    """Return the figure as inline SVG: unique ids, theme colours, no fixed size, no header."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    opening, body = body.split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-")
    # `font: [weight] 10px 'DejaVu Sans', ...` -> the page's own font in that size.
    body = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _page_font, body)
    body = re.sub("#01fe1[0-9a]", lambda match: f"var(--{VARIABLES[match.group()]})", body)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    assert view is not None, "matplotlib wrote an SVG without a viewBox"
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    width, height = view.groups()
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escaped}">{body}'
    )


def _page_font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def _accuracy(axes: Axes, results: Sequence[StageResult]) -> None:
    """Draw one row a result: sampled (round) above greedy (diamond), values beside them."""
    for row, result in enumerate(results):
        colour = STAGE_COLOURS.get(result.name, OTHER)
        hollow = result.name == "control"
        for value, error, marker, size, offset in (
            (result.sampled, result.sampled_se, "o", 6.5, -0.17),
            (result.greedy, result.greedy_se, "D", 4.5, 0.2),
        ):
            low, high = 100 * (value - Z95 * error), 100 * (value + Z95 * error)
            axes.plot(
                (low, high), (row + offset,) * 2, color=colour, linewidth=9, alpha=0.3,
                solid_capstyle="butt",
            )  # fmt: skip
            axes.plot(
                100 * value, row + offset, marker, markersize=size, color=colour,
                markerfacecolor=CARD if hollow else colour, markeredgewidth=1.4, clip_on=False,
            )  # fmt: skip
            # Beside the interval; on its left where the right edge is near.
            near_edge = 100 * value > 88
            axes.annotate(
                f"{100 * value:.1f}",
                (low if near_edge else high, row + offset),
                xytext=(-7 if near_edge else 7, 0),
                textcoords="offset points",
                ha="right" if near_edge else "left",
                va="center_baseline",
                fontsize=12 if marker == "o" else 10.5,
                fontweight="bold" if marker == "o" else "normal",
                color=INK if marker == "o" else MUTED,
            )
    axes.set_yticks(range(len(results)), [result.label for result in results], color=INK)
    axes.tick_params(axis="y", length=0, labelsize=12)
    axes.set_ylim(len(results) - 0.45, -0.55)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x")
    axes.spines[["bottom", "left"]].set_visible(False)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the centred moving mean over a 15th of the points (at least 3), cut at the ends."""
    import numpy as np

    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _curve(axes: Axes, curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    colour = STAGE_COLOURS.get(curve.stage, OTHER)
    few = len(curve.values) < 20
    if few:
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.8, marker="o", markersize=3)
    else:
        axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(curve.steps, smooth(curve.values), color=colour, linewidth=2)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _rows(axes: Axes, histogram: Histogram) -> None:
    total = sum(histogram.counts)
    colours = [OUTCOME_COLOURS.get(name, OTHER) for name in histogram.bins]
    axes.barh(range(len(histogram.bins)), histogram.counts, height=0.6, color=colours)
    for row, number in enumerate(histogram.counts):
        axes.annotate(
            f"{number:,} ({100 * number / total:.1f}%)",
            (number, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center_baseline",
        )
    axes.set_yticks(range(len(histogram.bins)), list(histogram.bins), color=INK)
    axes.set_ylim(len(histogram.bins) - 0.5, -0.5)
    axes.set_xlim(0, 1.6 * max(histogram.counts))  # room for the numbers
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)


def _columns(axes: Axes, histogram: Histogram) -> None:
    from matplotlib.ticker import MaxNLocator

    if histogram.band is not None:
        axes.axvspan(histogram.band[0] - 0.5, histogram.band[1] + 0.5, color=BAND, linewidth=0)
    axes.bar(range(len(histogram.bins)), histogram.counts, width=0.72, color=MPO)
    places = range(0, len(histogram.bins), 1 if len(histogram.bins) <= 10 else 2)
    axes.set_xticks(places, [histogram.bins[place] for place in places])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlim(-0.5, len(histogram.bins) - 0.5)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _times(axes: Axes, rows: Sequence[ManifestRow]) -> None:
    colours = [STAGE_COLOURS.get(row.stage, OTHER) for row in rows]
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        hollow = row.stage == "control"
        axes.barh(
            place, row.seconds, height=0.62, color=CARD if hollow else colour,
            edgecolor=colour, linewidth=1.4,
        )  # fmt: skip
        axes.annotate(
            f"{row.seconds:,.0f} s" if row.seconds >= 10 else f"{row.seconds:.1f} s",
            (row.seconds, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center_baseline",
        )
    axes.set_yticks(range(len(rows)), [label(row.stage) for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * max([row.seconds for row in rows] + [1e-9]))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=11)
    axes.spines["bottom"].set_visible(False)
