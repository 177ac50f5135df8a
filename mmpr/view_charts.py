"""Histograms as plain numbers that the page's template draws as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BINS = 24
_LABEL_CHARACTERS = 64  # that stand beside each other under a chart
WIDTH, HEIGHT = 460, 170  # of the drawing, its labels not counted


@dataclass(frozen=True)
class Bar:
    """A bar of the drawing in its units, the origin at the upper left; what it says when asked."""

    x: float
    y: float
    width: float
    height: float
    series: int
    told: str


@dataclass(frozen=True)
class Chart:
    """A histogram. series: names of what is drawn; ticks: (place, label) on the x axis."""

    title: str
    note: str
    series: tuple[str, ...]
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    highest: int


def histogram(
    title: str, series: Mapping[str, NDArray[np.int64]], note: str = "", *, signed: bool = False
) -> Chart | None:
    """Counts by equal bins, the series side by side; the outermost bins hold what lies beyond.

    signed: 0 is always in it. Bins reach from the 1st percentile (0, where that is
    near) to the 99th. None without values.
    """
    import numpy as np

    values = [np.asarray(numbers, dtype=np.int64) for numbers in series.values()]
    everything = np.concatenate(values) if values else np.empty(0, dtype=np.int64)
    if not len(everything):
        return None
    low, high = np.percentile(everything, (1, 99), method="lower").tolist()
    low = min(0, low) if signed or low < high / 2 else low
    step = nice_step(max(1, high - low) / _BINS)
    first = math.floor(low / step)
    number = max(1, math.floor(max(high, 0) / step) - first + 1)
    counts = [
        np.bincount(np.clip(one // step - first, 0, number - 1), minlength=number).tolist()
        for one in values
    ]
    ends = (int(everything.min()), int(everything.max()))
    labels = []
    for index in range(number):
        start, end = (first + index) * step, (first + index + 1) * step - 1
        start = min(start, ends[0]) if index == 0 else start
        end = max(end, ends[1]) if index == number - 1 else end
        labels.append(f"{start:,}" if start == end else f"{start:,} to {end:,}")
    width = WIDTH / number
    every = nice_step(number * step / 5)
    first_tick = math.ceil(first * step / every) * every
    last = (first + number) * step
    ticks = [
        # a bin of one number has its name in the middle, others at the edge where they begin
        ((tick / step - first + (step == 1) / 2) * width, f"{tick:,}")
        for tick in range(first_tick, last, every)
    ]
    return _chart(title, note, tuple(series), counts, labels, tuple(ticks))


def categories(title: str, counts: Mapping[str, int], note: str = "") -> Chart | None:
    """Counts by category, in the order given; None without any."""
    if not sum(counts.values()):
        return None
    width = WIDTH / len(counts)
    sparse = math.ceil(sum(len(name) + 2 for name in counts) / _LABEL_CHARACTERS)
    ticks = tuple(
        ((number + 0.5) * width, name) for number, name in enumerate(counts) if number % sparse == 0
    )
    return _chart(title, note, ("",), [list(counts.values())], list(counts), ticks)


def nice_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is no less.

    >>> nice_step(0.2), nice_step(3), nice_step(21)
    (1, 5, 50)
    """
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return int(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least))


def _chart(
    title: str,
    note: str,
    series: tuple[str, ...],
    counts: list[list[int]],
    labels: list[str],
    ticks: tuple[tuple[float, str], ...],
) -> Chart:
    highest = max(1, *(max(one) for one in counts))
    width = WIDTH / len(labels)
    inner = width * 0.86 / len(series)
    bars = []
    for which, numbers in enumerate(counts):
        for index, count in enumerate(numbers):
            if not count:
                continue
            height = HEIGHT * count / highest
            x = index * width + width * 0.07 + which * inner
            told = f"{labels[index]}: {count:,}" + (f" ({series[which]})" if series[which] else "")
            bars.append(Bar(x, HEIGHT - height, inner, height, which, told))
    return Chart(title, note, series, tuple(bars), ticks, highest)
