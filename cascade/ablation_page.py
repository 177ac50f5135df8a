"""The table and the plot of an ablation, from what ablation.json holds."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cascade.statistics import mean_with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# placeholder colour of the drawing -> (in light, in dark): the file follows its reader's theme
_THEME = {
    "#01fe20": ("ink", "#1f2328", "#e6edf3"),
    "#01fe21": ("muted", "#59636e", "#9198a1"),
    "#01fe22": ("grid", "#d1d9e0", "#3d444d"),
    "#01fe23": ("mark", "#0969da", "#4493f8"),
}
_INK, _MUTED, _GRID, _MARK = _THEME
_MEASURES = (("accuracy", "sampled accuracy"), ("right_chain", "right chains"))


def by_arm(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, in the recipe's order; failed ones among them."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def make_table(found: Mapping[str, Any]) -> str:
    """Markdown: a row an arm, then the last arm against each other, seed by seed."""
    arms = by_arm(found)
    counts = dict.fromkeys(name for run in found["runs"] for name in run.get("counts", {}))
    columns = ["arm", "seeds", "sampled accuracy", "greedy", "right chains", *counts]
    columns.append(f"CPU s after {found['compute_from']}")
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    for arm, runs in arms.items():
        good = [run for run in runs if "error" not in run]
        lost = len(runs) - len(good)
        cells = [arm, f"{len(good)}" + (f" ({lost} failed)" if lost else "")]
        for key in ("accuracy", "greedy", "right_chain"):
            cells.append(_share([run[key] for run in good if key in run]))
        for name in counts:
            cells.append(_share([run["counts"][name] for run in good if name in run["counts"]]))
        cells.append(_seconds([run["compute_seconds"] for run in good]))
        lines.append(_line(cells))
    lines += ["", "Percent; means over seeds, in brackets Student's 95% interval of the mean."]
    lines += _differences(arms)
    lines += _failures(found["runs"])
    return "\n".join(lines) + "\n"


def _differences(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The last arm less each other, over the seeds that both have."""
    *others, last = arms
    lines = []
    for other in others:
        cells = []
        for key, _ in _MEASURES:
            gains = paired(arms[last], arms[other], key)
            if not gains:
                cells.append("-")
                continue
            mean, interval = mean_with_interval(gains)
            shown = f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else ""
            above = sum(gain > 0 for gain in gains)
            cells.append(f"{100 * mean:+.1f}{shown}, above in {above} of {len(gains)}")
        lines.append(_line([f"{last} - {other}", *cells]))
    if not lines:
        return []
    header = ["difference, by seed", *(f"{title}, points" for _, title in _MEASURES)]
    return ["", _line(header), _line(["---", "---:", "---:"]), *lines]


def paired(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """a - b of the seeds that both have."""
    known = {run["seed"]: run[key] for run in b if key in run}
    return [run[key] - known[run["seed"]] for run in a if key in run and run["seed"] in known]


def _failures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [f"- {run['arm']}, seed {run['seed']}: {run['error']}" for run in runs if "error" in run]
    return ["", "Failed:", "", *told] if told else []


def _share(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, interval = mean_with_interval(values)
    shown = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * mean:.1f}{shown}"


def _seconds(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    return f"{mean:.0f} ({min(values):.0f} to {max(values):.0f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# ---- the plot ----


def draw_plot(found: Mapping[str, Any]) -> str:
    """An SVG: a row an arm, its mean with the interval and a dot a seed; light and dark.

    The file depends on the numbers alone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    arms = {arm: [run for run in runs if "error" not in run] for arm, runs in by_arm(found).items()}
    measures = [
        (key, title)
        for key, title in _MEASURES
        if any(key in run for runs in arms.values() for run in runs)
    ]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        height = 0.62 * len(arms) + 0.75
        figure = Figure(figsize=(3.9 * max(1, len(measures)) + 1.4, height))
        panels = figure.subplots(1, max(1, len(measures)), sharey=True, squeeze=False)[0]
        for axes, (key, title) in zip(panels, measures, strict=False):
            _draw_panel(axes, arms, key, title)
        panels[0].set_yticks(range(len(arms)), [_label(arm, runs) for arm, runs in arms.items()])
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        figure.tight_layout(w_pad=2.0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue())


_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ablation",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": _GRID,
    "ytick.color": "none",
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
}


def _draw_panel(
    axes: Axes, arms: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str
) -> None:
    for row, runs in enumerate(arms.values()):
        values = [100 * run[key] for run in runs if key in run]
        if not values:
            continue
        mean, interval = mean_with_interval(values)
        axes.plot(values, [row + 0.24] * len(values), "o", color=_MUTED, markersize=3, alpha=0.8)
        if interval is not None:
            axes.plot(interval, [row, row], color=_MARK, linewidth=7, alpha=0.35,
                      solid_capstyle="butt")  # fmt: skip
        axes.plot(mean, row, "o", color=_MARK, markersize=7)
        axes.annotate(f"{mean:.1f}", (mean, row), xytext=(0, 9), textcoords="offset points",
                      ha="center", va="bottom", fontsize=10, fontweight="bold")  # fmt: skip
    axes.set_title(f"{title}, %", loc="left")
    axes.grid(axis="x")
    axes.tick_params(axis="x", length=0)


def _label(arm: str, runs: Sequence[Mapping[str, Any]]) -> str:
    spent = [run["compute_seconds"] for run in runs]
    return f"{arm}\n{math.fsum(spent) / len(spent):.0f} CPU s" if any(spent) else arm


def _themed(text: str) -> str:
    """The drawing with colours that follow the reader's theme, and its own font."""
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*", _plain_font, text)
    for colour, (name, light, _) in _THEME.items():
        text = text.replace(colour, f"var(--{name}, {light})")
    light_theme = "".join(f"--{name}:{light};" for name, light, _ in _THEME.values())
    dark_theme = "".join(f"--{name}:{dark};" for name, _, dark in _THEME.values())
    style = (
        f"<style>:root{{{light_theme}}}"
        f"@media (prefers-color-scheme: dark){{:root{{{dark_theme}}}}}</style>"
    )
    end = text.index(">") + 1
    return f"{text[:end]}{style}{text[end:]}"


def _plain_font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font: {weight or 'normal'} {size}px system-ui, sans-serif"
