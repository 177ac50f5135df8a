"""What our command lines share: one line for a wrong option, and a small table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other error."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit code 2."""
        print(f"error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def print_table(
    title: str,
    rows: Sequence[tuple[str, ...]],
    columns: Sequence[str] = (),
    *,
    right: Collection[int] = (),
) -> None:
    """A small table on stdout under its title; the columns numbered in `right` are set there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    # apart from the table, which would break a long title at its own width
    console.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True, highlight=False)
    table = Table(show_header=bool(columns))
    for index in range(len(rows[0])):
        header = columns[index] if columns else ""
        table.add_column(header, justify="right" if index in right else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
