"""An audit in the terminal: tables of a hundred columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rewards.audit.audit import AuditReport, Group
from rewards.audit.findings import KINDS
from rewards.display import number, one_line, print_lines, share, visible
from rewards.verdict import Outcome

if TYPE_CHECKING:
    from rich.table import Table

MOST_GROUPS = 12  # of a kind; the page has them all
MOST_ROWS = 40  # of a table of outcomes
MOST_BAD = 10
COLUMNS = ("correct", "wrong", "no answer", "cannot judge", "timeout")


def print_audit(report: AuditReport) -> None:
    """The report on stdout: findings by kind, outcomes, lines that could not be read."""
    from rich.text import Text

    for kind, count in report.counts().items():
        if count:
            groups = report.ranked(kind)
            print_lines(Text(f"{KINDS[kind]}: {count:,}", style="bold"), _groups(groups))
            if len(groups) > MOST_GROUPS:
                print(f"and {len(groups) - MOST_GROUPS} more patterns (--html lists them all)")
    if not any(report.counts().values()):
        print("No verdict looks like a mistake.\n")
    print_lines(_outcomes("data set", report.outcomes, report.format_ok))
    print_lines(_outcomes("matcher", report.matchers, None))
    if report.stored:
        changed = report.counts()["changed"]
        print(f"{report.stored:,} of {report.rows:,} came with a verdict, {changed:,} differ today")
    for bad in report.bad[:MOST_BAD]:
        print(f"not judged: {visible(str(bad))}")
    if report.bad_lines > MOST_BAD:
        print(f"not judged: {report.bad_lines - MOST_BAD:,} more lines")
    files = ", ".join(report.files)
    print(f"\n{visible(files)}: {report.rows:,} rollouts, {report.bad_lines:,} bad lines")


def _groups(groups: list[Group]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("likely", justify="right", no_wrap=True)
    table.add_column("pattern", overflow="fold", max_width=34)
    table.add_column("data set", overflow="fold", max_width=18)
    table.add_column("gold · final answer · line", overflow="fold")
    for group in groups[:MOST_GROUPS]:
        first = next(iter(group.examples.values()))
        answer = "none" if first.extracted is None else one_line(first.extracted, 28)
        table.add_row(
            f"{group.count:,}",
            number(group.likelihood) if group.kind.startswith("false") else "",
            _plain(group.pattern),
            _plain(one_line(group.dataset, 36)),
            _plain(f"{one_line(first.gold, 28)} · {answer} · {first.line}"),
        )
    return table


def _outcomes(what: str, rows: Mapping[str, Counter[str]], format_ok: Counter[str] | None) -> Table:
    """Outcomes in percent, a line each, the largest first and all of them last."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(what, overflow="fold", max_width=30)
    for column in ("rollouts", *COLUMNS, *(["format"] if format_ok is not None else [])):
        table.add_column(column, justify="right", no_wrap=True)
    ordered = sorted(rows, key=lambda name: (-rows[name].total(), name))
    shown = [(name, rows[name], (format_ok or Counter())[name]) for name in ordered[:MOST_ROWS]]
    if len(ordered) > MOST_ROWS:
        print(f"the {MOST_ROWS} largest of {len(ordered)}:")
    if len(ordered) > 1:
        together = sum(rows.values(), Counter())
        shown.append(("all", together, (format_ok or Counter()).total()))
    for name, counts, followed in shown:
        total = counts.total()
        cells = [share(counts[str(outcome)], total) for outcome in Outcome]
        if format_ok is not None:
            cells.append(share(followed, total))
        table.add_row(_plain(one_line(name, 60)), f"{total:,}", *cells)
    return table


def _plain(text: str) -> str:
    """A text that the table takes as it is: square brackets are no markup."""
    from rich.markup import escape

    return escape(visible(text))
