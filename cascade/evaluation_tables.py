"""Evaluations and comparisons as tables: for the terminal, and as Markdown beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ALL = "all"
Table = tuple[Sequence[str], list[tuple[str, ...]]]  # column names and rows of cells


def metrics_table(metrics: dict[str, Any], *, narrow: bool = False) -> Table:
    """One row a data set and one for all: rates in percent with their 95% intervals.

    narrow: for 80 columns; fewer intervals, whose bounds are whole.
    """
    k = metrics["k"]
    most = "maj" if narrow else "majority"
    columns = [
        *("data set", "n", "greedy", f"mean@{k}", f"pass@{k}"),
        *([f"{most}@{k}"] if k > 1 else []),
        *("format", "cut", "tokens"),
    ]
    return columns, [_metrics_row(name, own, narrow) for name, own in _groups(metrics)]


def _groups(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The data sets, and all of them; one data set alone is all."""
    datasets = found["datasets"]
    return [*(datasets.items() if len(datasets) > 1 else ()), (ALL, found)]


def _metrics_row(name: str, own: dict[str, Any], narrow: bool) -> tuple[str, ...]:
    def rate(key: str, *, interval: bool) -> str:
        low, high = (100 * bound for bound in own[f"{key}_ci"])
        whole = f"{100 * own[key]:.1f}"
        if not interval:
            return whole
        return f"{whole} ({low:.0f}-{high:.0f})" if narrow else f"{whole} [{low:.1f}, {high:.1f}]"

    k = own["k"]
    others = [f"pass@{k}", *([f"majority@{k}"] if k > 1 else [])]
    lengths = "" if narrow else f" ({own['tokens_p50']:.0f}-{own['tokens_p99']:.0f})"
    return (
        name,
        f"{own['n']:,}",
        rate("greedy", interval=True),
        rate("sampled", interval=True),
        *(rate(key, interval=not narrow) for key in others),
        f"{100 * own['format']:.1f}",
        f"{100 * own['truncated']:.1f}",
        f"{own['mean_tokens']:.0f}{lengths}",
    )


def comparison_table(found: dict[str, Any]) -> Table:
    """Two rows a data set and two for all, greedy and mean of samples: how B does against A."""
    columns = ("data set", "n", "", "A", "B", "B - A [95%]", "only A", "only B", "p")
    return columns, [row for name, own in _groups(found) for row in _comparison_rows(name, own)]


def _comparison_rows(name: str, own: dict[str, Any]) -> list[tuple[str, ...]]:
    def row(what: str, paired: dict[str, Any]) -> tuple[str, ...]:
        rates = (f"{100 * paired['a']:.1f}", f"{100 * paired['b']:.1f}", _points(paired))
        flipped = (str(paired.get("only_a", "")), str(paired.get("only_b", "")))
        return name, f"{own['n']:,}", what, *rates, *flipped, _p(paired["p"])

    return [row("greedy", own["greedy"]), row("mean", own["sampled"])]


def print_rates(title: str, table: Table) -> None:
    """A table on the terminal, under its title; it fits into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    columns, rows = table
    console = Console()
    console.print(f"\n[bold]{escape(title)}[/bold]", soft_wrap=True, highlight=False)
    drawn = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        # a data set's long name goes on in the next line
        if number:
            drawn.add_column(name, justify="right", no_wrap=True)
        else:
            drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    console.print(drawn)


def gap_lines(metrics: dict[str, Any]) -> list[str]:
    """How the first prompt set does against each other one, a line each."""
    lines = []
    for other, gap in metrics.get("gap", {}).items():
        if not gap["n"]:
            lines.append(f"{metrics['prompt']} - {other}: no question in common")
            continue
        greedy, sampled = gap["greedy"], gap["sampled"]
        lines.append(
            f"{metrics['prompt']} - {other}, points: greedy {_points(greedy)} (p "
            f"{_p(greedy['p'])}), mean@{metrics['k']} {_points(sampled)} (p {_p(sampled['p'])}); "
            f"{gap['n']:,} questions"
        )
    return lines


def _points(paired: dict[str, Any]) -> str:
    low, high = paired["ci"]
    return f"{100 * paired['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def markdown(table: Table) -> str:
    """A table in Markdown; a `|` in a name is escaped."""
    columns, rows = table
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def summary(metrics: dict[str, Any]) -> str:
    """What summary.md holds: the metrics of every prompt set, and the gap between them."""
    parts = [f"# {metrics['name']}", f"Model: `{metrics['model']}`"]
    for prompt, own in metrics.get("prompts", {metrics["prompt"]: metrics}).items():
        kept = own["own_form"]
        more = f"; {kept:,} questions keep a form of their own" if kept else ""
        parts.append(f"## Prompts: {prompt}\n\n{markdown(metrics_table(own))}")
        parts.append(
            f"In percent, with 95% intervals over questions; {own['k']} samples a question{more}. "
            "cut: ended by max-tokens; tokens: mean (median-99%)."
        )
    parts += gap_lines(metrics)
    return "\n\n".join(parts) + "\n"
