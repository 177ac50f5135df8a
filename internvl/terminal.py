"""What our command lines share: a parser of commands, one line for an error, a small table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, NoReturn

from internvl.errors import cli_guard


class OneLineParser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other error."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit code 2."""
        print(f"error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


class Command(NamedTuple):
    """A command of a tool: `add_arguments` fills its parser, `run` does what they say."""

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def command_parser(
    prog: str, about: str, example: str, commands: Sequence[Command]
) -> argparse.ArgumentParser:
    """The parser of a tool's commands; `run_command` does what it finds."""
    parser = OneLineParser(
        prog=prog,
        description=about,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=OneLineParser)
    for command in commands:
        told = command.about
        sub = subparsers.add_parser(
            command.name,
            help=told,
            description=f"{told[0].upper()}{told[1:]}.",
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.set_defaults(run_command=command.run)
    return parser


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Run one command; exits with 2 and one line for an error that the user can mend."""
    args = parser.parse_args(argv)
    cli_guard(lambda: args.run_command(args))


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
