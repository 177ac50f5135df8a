"""The charts of the report (cascade/report_svg.py says how they are drawn into the page)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascade.report_data import (
    TONES,
    BeforeAfter,
    Line,
    Panel,
    Rate,
    Rollouts,
    StageInfo,
    StageResult,
    Step,
)
from cascade.report_svg import BAD, BAND, CARD, GOOD, GRID, INK, MUTED, Canvas, tone

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

WIDE, NARROW = 990, 350  # CSS pixels
_LONGEST_LABEL = {True: 26, False: 15}
_LINE_COLOURS = {"correct": GOOD, "wrong": BAD, "chosen": GOOD, "rejected": BAD}


def short(text: str, length: int) -> str:
    """A label that fits; the middle of a longer one is left out.

    >>> short("a-very-long-name", 9)
    'a-ve..ame'
    """
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}..{text[len(text) - (length - 2 - head) :]}"


class Charts(Canvas):
    """Draws the charts of one run's page."""

    def accuracy(self, results: Sequence[StageResult], *, wide: bool) -> str:
        """Accuracy by stage, sampled and greedy, with intervals; those aside are hollow."""
        name = "Held-out accuracy by stage, sampled and greedy, with 95% intervals"
        left = _margin([result.label for result in results], wide)
        return self.draw(
            WIDE if wide else NARROW,
            52 * len(results) + 40,
            name,
            lambda axes: _accuracy(axes, results, wide),
            left=left,
            top=30,
        )

    def steps(self, steps: Sequence[Step], *, wide: bool) -> str:
        """The gain of each step with its interval, about 0."""
        labels = [step_label(step, wide) for step in steps]
        return self.draw(
            WIDE if wide else NARROW,
            (40 if wide else 48) * len(steps) + 40,
            "Gain of each step in points of sampled accuracy, with 95% intervals",
            lambda axes: _steps(axes, steps, labels),
            left=max(_text_width(line) for label in labels for line in label.split("\n")) + 16,
            top=30,
            right=30,
        )

    def datasets(self, results: Sequence[StageResult], names: Sequence[str], *, wide: bool) -> str:
        """Sampled accuracy by data set, a dot a stage."""
        height = (12 * len(results) + 14) * len(names) + 40
        return self.draw(
            WIDE if wide else NARROW,
            height,
            "Sampled accuracy by data set and stage, with 95% intervals",
            lambda axes: _datasets(axes, results, names, wide),
            left=_margin(names, wide),
            top=30,
        )

    def sizes(self, results: Sequence[StageResult], *, wide: bool) -> str:
        """pass@k and majority@k over k, a colour a stage."""
        return self.draw(
            WIDE if wide else NARROW,
            280,
            "Accuracy of pass@k and majority@k over the number of samples k",
            lambda axes: _sizes(axes, results),
            left=46,
            bottom=40,
            right=110 if wide else 84,
            top=12,
        )

    def panel(self, panel: Panel, info: StageInfo) -> str:
        """One training chart: smoothed lines over the faint raw ones, guards dashed."""
        name = f"{panel.title} of {info.label} by step"
        return self.draw(
            260, 138, name, lambda axes: _panel(axes, panel, info), left=46, bottom=20, top=14
        )

    def right_answers(self, rollouts: Rollouts, colour: int) -> str:
        """Questions by how many of their answers were right, the band that teaches most shaded."""
        name = f"Questions by right answers, rollouts of {rollouts.info.label}"
        return self.draw(
            440,
            196,
            name,
            lambda axes: _columns(axes, rollouts, colour),
            left=46,
            bottom=38,
            top=22,
        )

    def change(self, change: BeforeAfter, info: StageInfo) -> str:
        """The same questions before and after a stage, by the share that was right."""
        name = f"Questions by right answers before and after {info.label}"
        return self.draw(
            330, 190, name, lambda axes: _change(axes, change, info), left=46, bottom=38, top=22
        )


def step_label(step: Step, wide: bool) -> str:
    """Whose gain over whom."""
    longest = _LONGEST_LABEL[wide]
    after, before = short(step.after.label, longest), short(step.before.label, longest)
    return f"{after} over {before}" if wide else f"{after}\nover {before}"


def line_colour(panel: Panel, line: Line, place: int, info: StageInfo) -> str:
    """A line's placeholder colour: the stage's own for the first, a meaning's where it has one."""
    if line.label in _LINE_COLOURS:
        return _LINE_COLOURS[line.label]
    if line.held_out and not any(not one.held_out for one in panel.lines):
        return [tone(info.tone), *(tone(number) for number in range(4, TONES))][place % 5]
    if line.held_out:
        return INK
    others = [tone(number) for number in range(4, TONES)]
    return tone(info.tone) if place == 0 else others[(place - 1) % len(others)]


def _text_width(text: str) -> float:
    return 6.9 * len(text)


def _margin(labels: Sequence[str], wide: bool) -> float:
    return max(_text_width(short(label, _LONGEST_LABEL[wide])) for label in labels) + 18


# -- results -------------------------------------------------------------------------------------


def _accuracy(axes: Axes, results: Sequence[StageResult], wide: bool) -> None:
    """Draw one row a result: sampled (round) above greedy (diamond), values beside them."""
    for row, result in enumerate(results):
        for rate, marker, size, offset in (
            (result.whole.sampled, "o", 6.5, -0.17),
            (result.whole.greedy, "D", 4.5, 0.2),
        ):
            main = marker == "o"
            _dot(axes, rate, row + offset, result.info, marker, size, width=9)
            near_edge = 100 * rate.value > 86
            axes.annotate(
                f"{100 * rate.value:.1f}",
                (100 * (rate.low if near_edge else rate.high), row + offset),
                xytext=(-7 if near_edge else 7, 0),
                textcoords="offset points",
                ha="right" if near_edge else "left",
                va="center_baseline",
                fontsize=12 if main else 10.5,
                fontweight="bold" if main else "normal",
                color=INK if main else MUTED,
            )
    _percent_rows(axes, [short(result.label, _LONGEST_LABEL[wide]) for result in results])


def _dot(
    axes: Axes, rate: Rate, y: float, info: StageInfo, marker: str, size: float, width: float
) -> None:
    colour = tone(info.tone)
    axes.plot((100 * rate.low, 100 * rate.high), (y, y), color=colour, linewidth=width, alpha=0.3,
              solid_capstyle="butt")  # fmt: skip
    axes.plot(
        100 * rate.value, y, marker, markersize=size, color=colour,
        markerfacecolor=CARD if info.aside else colour, markeredgewidth=1.4, clip_on=False,
    )  # fmt: skip


def _percent_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.tick_params(axis="y", length=0, labelsize=12)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x")
    axes.spines[["bottom", "left"]].set_visible(False)


def _steps(axes: Axes, steps: Sequence[Step], labels: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.axvline(0, color=MUTED, linewidth=1.2)
    for row, step in enumerate(steps):
        _dot(axes, step.sampled, row, step.after, "o", 6.5, width=9)
        axes.annotate(
            f"{100 * step.sampled.value:+.1f}",
            (100 * step.sampled.value, row),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            fontsize=11,
        )
    bounds = [100 * bound for step in steps for bound in (step.sampled.low, step.sampled.high)]
    low, high = min([0.0, *bounds]), max([0.0, *bounds])
    room = 0.06 * max(high - low, 1.0)
    axes.set_xlim(low - room, high + room)
    axes.set_yticks(range(len(steps)), labels, color=INK)
    axes.set_ylim(len(steps) - 0.45, -0.65)
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="y", labelsize=11.5)
    axes.xaxis.tick_top()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.0f}" if value else "0")
    )
    axes.grid(axis="x")
    axes.spines[["bottom", "left"]].set_visible(False)


def _datasets(axes: Axes, results: Sequence[StageResult], names: Sequence[str], wide: bool) -> None:
    room = 0.8 / len(results)
    for row, name in enumerate(names):
        axes.axhline(row + 0.5, color=GRID, linewidth=0.8)
        for place, result in enumerate(results):
            if name in result.datasets:
                y = row - 0.4 + (place + 0.5) * room
                _dot(axes, result.datasets[name].sampled, y, result.info, "o", 5, width=5)
    _percent_rows(axes, [short(name, _LONGEST_LABEL[wide]) for name in names])


def _sizes(axes: Axes, results: Sequence[StageResult]) -> None:
    from matplotlib.ticker import NullLocator

    ends: list[tuple[float, str, str]] = []
    sizes = sorted({size for result in results for size in result.whole.passes})
    for result in results:
        colour = tone(result.info.tone)
        for rates, style, word in (
            (result.whole.passes, "-", "pass"),
            (result.whole.majorities, "--", "majority"),
        ):
            if not rates:
                continue
            xs, ys = list(rates), [100 * rate.value for rate in rates.values()]
            axes.plot(xs, ys, style, color=colour, linewidth=2, marker="o", markersize=4,
                      clip_on=False)  # fmt: skip
            if word == "pass":
                axes.fill_between(xs, [100 * rate.low for rate in rates.values()],
                                  [100 * rate.high for rate in rates.values()],
                                  color=colour, alpha=0.15, linewidth=0)  # fmt: skip
                ends.append((ys[-1], result.label, colour))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_xlabel("answers a question, k", labelpad=4)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25), [f"{tick}%" for tick in range(0, 101, 25)])
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    for y, text, colour in _apart(ends, 7.5):
        axes.annotate(short(text, 12), (sizes[-1], y), xytext=(10, 0), textcoords="offset points",
                      va="center_baseline", color=colour, annotation_clip=False)  # fmt: skip


def _apart(ends: Sequence[tuple[float, str, str]], least: float) -> list[tuple[float, str, str]]:
    """Labels moved up until none lies on another, in the order of their heights."""
    placed: list[tuple[float, str, str]] = []
    for y, text, colour in sorted(ends):
        placed.append((max(y, placed[-1][0] + least) if placed else y, text, colour))
    over = max(0.0, placed[-1][0] - 100) if placed else 0.0
    return [(y - over, text, colour) for y, text, colour in placed]


# -- training --------------------------------------------------------------------------------


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the centred moving mean over a 15th of the points (at least 3), cut at the ends."""
    import numpy as np

    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _panel(axes: Axes, panel: Panel, info: StageInfo) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for place, line in enumerate(panel.lines):
        colour = line_colour(panel, line, place, info)
        if len(line.values) < 20:
            axes.plot(line.steps, line.values, color=colour, linewidth=1.8, marker="o",
                      markersize=3)  # fmt: skip
        else:
            axes.plot(line.steps, line.values, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(line.steps, smooth(line.values), color=colour, linewidth=2)
    for _, bound in panel.bounds:
        axes.axhline(bound, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
    _whole_if_flat(axes, panel)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.unit == "share":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    else:
        axes.yaxis.get_offset_text().set_color(MUTED)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _whole_if_flat(axes: Axes, panel: Panel) -> None:
    """A line that does not move is drawn as such, not as the noise of its last digits."""
    values = [value for line in panel.lines for value in line.values]
    values += [bound for _, bound in panel.bounds]
    low, high = min(values), max(values)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = 0.5 * abs(high) or 0.5
        axes.set_ylim(low - room, high + room)


def _columns(axes: Axes, rollouts: Rollouts, colour: int) -> None:
    size, counts = rollouts.size, rollouts.right
    inside = [place for place in range(size + 1) if 0.2 <= place / size <= 0.8]
    if inside:
        axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=BAND, linewidth=0)
    axes.bar(range(size + 1), counts, width=0.72, color=tone(colour))
    _bins(axes, size)


def _bins(axes: Axes, size: int) -> None:
    from matplotlib.ticker import MaxNLocator

    places = range(0, size + 1, 1 if size <= 10 else max(2, size // 8))
    axes.set_xticks(places, [f"{place}/{size}" for place in places])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlim(-0.6, size + 0.6)
    axes.set_xlabel("right answers a question", labelpad=4)
    axes.annotate("questions", (0, 1), xycoords="axes fraction", xytext=(-38, 9),
                  textcoords="offset points", color=MUTED, fontsize=10)  # fmt: skip
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _change(axes: Axes, change: BeforeAfter, info: StageInfo) -> None:
    size = len(change.before) - 1
    for counts, side, colour in (
        (change.before, -1, tone(TONES)),
        (change.after, 1, tone(info.tone)),
    ):
        places = [place + 0.2 * side for place in range(size + 1)]
        axes.bar(places, counts, width=0.38, color=colour)
    _bins(axes, size)
