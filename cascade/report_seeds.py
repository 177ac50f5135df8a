"""The page over the runs of several seeds: each arm's accuracy, its points, and the seeds' pages.

The arms are those of ablation.json, which `cascade run` writes where the recipe has some; without
it every stage that was evaluated is an arm. A run that failed or is not there yet is an entry with
its reason: none is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.report_charts import NARROW, WIDE, short
from cascade.report_data import TONES, Rate
from cascade.report_files import get, number, read_object
from cascade.report_run import RunFolder
from cascade.report_svg import CARD, INK, MUTED, Canvas, tone
from cascade.report_words import listing, percent, signed, turned
from cascade.statistics import mean_and_se, mean_with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = {True: 26, False: 15}


@dataclass(frozen=True)
class Point:
    """One arm of one seed: its accuracy, or why there is none."""

    seed: int
    accuracy: float | None = None
    error: str = ""
    right_chain: float | None = None
    compute: float | None = None  # CPU seconds


@dataclass(frozen=True)
class Arm:
    """One arm over the seeds; mean: over those that have a result, None where there is none."""

    name: str
    stage: str
    tone: int
    points: tuple[Point, ...]
    mean: Rate | None

    def mean_of(self, field: str) -> float | None:
        """The mean of another number, over the seeds that have it."""
        found = [value for one in self.points if (value := getattr(one, field)) is not None]
        return sum(found) / len(found) if found else None

    @property
    def good(self) -> list[Point]:
        return [point for point in self.points if point.accuracy is not None]


@dataclass(frozen=True)
class Contrast:
    """What one arm has over another, paired by seed; p of Student's paired test, or None."""

    before: str
    after: str
    seeds: int
    gain: Rate
    p: float | None


@dataclass(frozen=True)
class SeedRun:
    """One seed's run: whether its page is there, and what did not end."""

    seed: int
    page: bool
    seconds: float | None
    state: str


@dataclass(frozen=True)
class SeedsData:
    """All that the page holds. compute_from: the stage after which an arm's compute counts."""

    title: str
    runs: Sequence[SeedRun]
    arms: Sequence[Arm]
    contrasts: Sequence[Contrast]
    compute_from: str | None = None
    recipe_text: str = ""


def seed_folders(path: Path) -> dict[int, Path]:
    """{seed: folder} of the runs below a folder, in order of the seeds."""
    found = {}
    for folder in path.glob("seed-*"):
        seed = folder.name.removeprefix("seed-")
        if folder.is_dir() and seed.removeprefix("-").isdigit():
            found[int(seed)] = folder
    return dict(sorted(found.items()))


def collect_seeds(path: Path) -> SeedsData:
    """Read the folders of all seeds; raises UserError for what cannot be read."""
    folders = seed_folders(path)
    runs = {
        seed: RunFolder.read(folder)
        for seed, folder in folders.items()
        if (folder / "manifest.json").exists()
    }
    file = path / "ablation.json"
    found = read_object(file) if file.exists() else None
    entries = _entries(runs) if found is None else get(found, "runs", list, file)
    first = next(iter(runs.values()), None)
    tones = {name: info.tone for name, info in first.stages.items()} if first else {}
    arms = _arms(entries, tones, file)
    recipe = next((folder / "recipe.yaml" for folder in folders.values()
                   if (folder / "recipe.yaml").exists()), None)  # fmt: skip
    names = {run.name for run in runs.values()}
    return SeedsData(
        title=f"{listing(sorted(names)) or path.name}: {len(folders)} seeds",
        runs=[_seed_run(seed, folder, runs.get(seed)) for seed, folder in folders.items()],
        arms=arms,
        contrasts=_contrasts(arms),
        compute_from=None if found is None else found.get("compute_from"),
        recipe_text=recipe.read_text(encoding="utf-8") if recipe else "",
    )


def _seed_run(seed: int, folder: Path, run: RunFolder | None) -> SeedRun:
    page = (folder / "report.html").exists()
    if run is None:
        return SeedRun(seed, page, None, "not begun")
    open_ = [process.name for process in run.processes if not process.done]
    waiting = run.waiting()
    state = f"not finished: {listing(open_)}" if open_ else "done"
    if waiting and not open_:
        state = f"not begun: {listing(waiting)}"
    seconds = run.manifest.get("seconds")
    return SeedRun(seed, page, float(seconds) if seconds is not None else None, state)


def _entries(runs: Mapping[int, RunFolder]) -> list[dict[str, Any]]:
    """Every evaluated stage of every seed as an arm's entry."""
    names = dict.fromkeys(name for run in runs.values() for name in run.evaluated)
    entries: list[dict[str, Any]] = []
    for name in names:
        for seed, run in runs.items():
            entry: dict[str, Any] = {"arm": name, "stage": name, "seed": seed}
            path = run.path / "eval" / name / "metrics.json"
            if path.exists():
                metrics = read_object(path)
                entry["accuracy"] = number(metrics, "sampled", path)
                if "chain_correct" in metrics:
                    entry["right_chain"] = number(metrics, "chain_correct", path)
            else:
                entry["error"] = f"stage {name} has not been evaluated"
            entries.append(entry)
    return entries


def _arms(entries: Iterable[dict[str, Any]], tones: Mapping[str, int], path: Path) -> list[Arm]:
    """The arms in the order in which they come; each has its stage's colour on the seeds' pages."""
    points: dict[str, list[Point]] = {}
    stages: dict[str, str] = {}
    for entry in entries:
        name = str(get(entry, "arm", str, path))
        stages[name] = str(entry.get("stage", name))
        points.setdefault(name, []).append(_point(entry, path))
    arms = []
    for name, found in points.items():
        values = [one.accuracy for one in found if one.accuracy is not None]
        colour = tones.get(stages[name], TONES)
        arms.append(Arm(name, stages[name], colour, tuple(found), over_seeds(values)))
    return arms


def _point(entry: dict[str, Any], path: Path) -> Point:
    seed = int(get(entry, "seed", int, path))
    if "accuracy" not in entry:
        return Point(seed, error=str(entry.get("error", "no result")))
    chain, compute = (
        None if entry.get(key) is None else number(entry, key, path)
        for key in ("right_chain", "compute_seconds")
    )
    accuracy = number(entry, "accuracy", path)
    return Point(seed, accuracy, right_chain=chain, compute=compute)


def over_seeds(values: Sequence[float]) -> Rate | None:
    """Mean and Student's 95% interval over seeds; of one seed no interval is known."""
    if not values:
        return None
    mean, interval = mean_with_interval(values)
    return Rate(mean, *(interval or (mean, mean)))


def _contrasts(arms: Sequence[Arm]) -> list[Contrast]:
    """Every pair of arms, on the seeds that both have; at least two."""
    found = []
    for a, b in combinations(arms, 2):
        of_a = {point.seed: point.accuracy for point in a.good}
        gains = [
            point.accuracy - before
            for point in b.good
            if point.accuracy is not None and (before := of_a.get(point.seed)) is not None
        ]
        gain = over_seeds(gains)
        if gain is not None and len(gains) > 1:
            found.append(Contrast(a.name, b.name, len(gains), gain, _paired_p(gains)))
    return found


def _paired_p(gains: Sequence[float]) -> float | None:
    from scipy.special import stdtr

    mean, se = mean_and_se(gains)
    if not se:  # equal gains tell nothing of their spread
        return 1.0 if mean == 0 else None
    return float(2 * stdtr(len(gains) - 1, -abs(mean) / se))


# -- the page ----------------------------------------------------------------------------------


def seeds_headline(data: SeedsData) -> str:
    """Which arm ended highest, and whether that is shown against the next."""
    arms = [arm for arm in data.arms if arm.mean is not None]
    if not arms:
        return "No seed has a result yet."
    ranked = sorted(arms, key=lambda arm: -(arm.mean.value if arm.mean else 0.0))
    first = ranked[0]
    assert first.mean is not None
    said = f"Highest over {len(first.good)} seeds: {first.name}, {percent(first.mean.value)}"
    if len(ranked) == 1:
        return f"{said} of the sampled answers right."
    second = ranked[1]
    names = {first.name, second.name}
    contrast = next((one for one in data.contrasts if {one.before, one.after} == names), None)
    if contrast is None:
        return f"{said}; with fewer than two seeds nothing is shown of the differences."
    gain = contrast.gain
    if contrast.after != first.name:
        gain = turned(gain)
    verdict = "the interval leaves out 0" if gain.low > 0 else "no difference is shown"
    return (
        f"{said}; over {second.name}, the next, it has {signed(gain)} (paired by seed): {verdict}."
    )


def render_seeds(data: SeedsData) -> str:
    """Return the page as HTML; the same data gives the same bytes."""
    from cascade.report import both, environment

    charts = SeedCharts()
    missing = [(arm.name, point) for arm in data.arms for point in arm.points if point.error]
    return (
        environment()
        .get_template("seeds.html.j2")
        .render(
            data=data,
            headline=seeds_headline(data),
            chart=both(charts.arms, data.arms) if any(arm.good for arm in data.arms) else None,
            missing=missing,
            chains=any(arm.mean_of("right_chain") is not None for arm in data.arms),
            compute=any(arm.mean_of("compute") is not None for arm in data.arms),
        )
    )


class SeedCharts(Canvas):
    """Draws the arms: each seed's point, the mean over them and its interval."""

    def arms(self, arms: Sequence[Arm], *, wide: bool) -> str:
        """One row an arm."""
        labels = [short(arm.name, _LONGEST[wide]) for arm in arms]
        return self.draw(
            WIDE if wide else NARROW,
            46 * len(arms) + 40,
            "Sampled accuracy by arm: every seed, mean and 95% interval over seeds",
            lambda axes: _draw_arms(axes, arms, labels),
            left=max(6.9 * len(label) for label in labels) + 18,
            top=30,
            right=20,
        )


def _draw_arms(axes: Axes, arms: Sequence[Arm], labels: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for row, arm in enumerate(arms):
        colour = tone(arm.tone)
        values = [100 * point.accuracy for point in arm.good if point.accuracy is not None]
        axes.plot(values, [row + 0.18] * len(values), "o", color=colour, markersize=5, alpha=0.75,
                  markeredgecolor=CARD, markeredgewidth=0.6, clip_on=False)  # fmt: skip
        if arm.mean is None:
            axes.annotate("no result", (0, row), color=MUTED, va="center_baseline")
            continue
        low, high = 100 * arm.mean.low, 100 * arm.mean.high
        axes.plot((low, high), (row - 0.14,) * 2, color=colour, linewidth=9, alpha=0.3,
                  solid_capstyle="butt")  # fmt: skip
        axes.plot((100 * arm.mean.value,) * 2, (row - 0.3, row + 0.02), color=colour, linewidth=2.5)
        axes.annotate(f"{100 * arm.mean.value:.1f}", (100 * arm.mean.value, row - 0.3),
                      xytext=(0, 3), textcoords="offset points", ha="center", fontsize=11.5,
                      fontweight="bold", color=INK)  # fmt: skip
    axes.set_yticks(range(len(arms)), labels, color=INK)
    axes.set_ylim(len(arms) - 0.5, -0.75)
    low, high = axes.get_xlim()
    axes.set_xlim(max(0.0, low - 2), min(100.0, high + 2))
    axes.xaxis.tick_top()
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="y", labelsize=12)
    axes.grid(axis="x")
    axes.spines[["bottom", "left"]].set_visible(False)
