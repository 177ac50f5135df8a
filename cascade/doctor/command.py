"""`cascade doctor`: what will not work, and the cure, before the money is spent."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.doctor.findings import Finding, Level, as_dict, worst
from internvl.data import write_json
from internvl.terminal import Command

if TYPE_CHECKING:
    from rich.console import Console

_MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warn", "yellow"),
    "error": ("ERROR", "bold red"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("recipe", type=Path, help="a recipe of `cascade run`")
    parser.add_argument(
        "--quick", action="store_true", help="start nothing: no engine, no stage (seconds)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the run will write (as of `cascade run`)"
    )
    parser.add_argument(
        "--with",
        dest="extra",
        action="append",
        default=[],
        metavar="STAGE",
        help="an optional stage that will run, too; may be given more than once",
    )
    parser.add_argument(
        "--backend", choices=("auto", "vllm", "transformers"), help="instead of the recipe's"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all findings there, as JSON"
    )


def run(args: argparse.Namespace) -> None:
    """Print the findings; exit code 0, or 1 where there are errors (2: the recipe is unusable)."""
    started = time.monotonic()
    options = Options(args.quick, tuple(args.extra), args.output, args.backend)
    findings = examine(args.recipe, options, say=_say)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {"recipe": str(args.recipe), **as_dict(findings)})
    print_findings(args.recipe, findings, time.monotonic() - started)
    if worst(findings) == "error":
        raise SystemExit(1)


@dataclass(frozen=True)
class Options:
    """How a recipe is looked at.

    quick: nothing is started. extra: optional stages that will run. output, backend: instead of
    the recipe's.
    """

    quick: bool = False
    extra: tuple[str, ...] = ()
    output: Path | None = None
    backend: str | None = None


def examine(
    recipe: Path, options: Options = Options(), *, say: Callable[[str], None] | None = None
) -> list[Finding]:
    """The findings of a recipe; raises `UserError` for one that cannot be read.

    say: told what is done next.
    """
    from cascade.recipe import load_recipe

    read = load_recipe(recipe)  # before anything heavy is imported
    read = replace(read, backend=options.backend or read.backend)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    from cascade.doctor.examine import Examination, scratch_folder
    from cascade.doctor.facts import Facts

    logging.disable_progress_bar()
    with scratch_folder() as scratch:
        facts = Facts(read, scratch, extra=options.extra, output=options.output)
        found = Examination(facts, quick=options.quick, say=say or _quiet).run()
    here = f"{scratch}{os.sep}"  # what was made there is named as the recipe names it
    return [
        replace(f, found=f.found.replace(here, ""), where=f.where.replace(here, "")) for f in found
    ]


def print_findings(recipe: Path, findings: Sequence[Finding], seconds: float) -> None:
    """The table on stdout, then what is wrong with its cure, a paragraph each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]cascade doctor {escape(str(recipe))}[/bold]", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", ratio=1, overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.level]
        shown = finding.where if finding.where and finding.where not in finding.found else ""
        where = f" [dim]{escape(shown)}[/dim]" if shown else ""
        table.add_row(f"[{style}]{mark}[/{style}]", finding.code, f"{escape(finding.found)}{where}")
    console.print(table)
    _print_cures(console, findings)
    counts = as_dict(findings)
    told = f"{counts['error']} error(s), {counts['warning']} warning(s), {counts['ok']} ok"
    console.print(f"\n{told}, in {seconds:.0f} s; what each code means: docs/doctor.md")


def _print_cures(console: Console, findings: Sequence[Finding]) -> None:
    from rich.markup import escape

    for finding in findings:
        if finding.level != "ok":
            mark, style = _MARKS[finding.level]
            console.print(f"\n[{style}]{mark}[/{style}] {finding.code}: {escape(finding.found)}")
            console.print(f"  [bold]cure[/bold]: {escape(finding.cure)}")


def _say(what: str) -> None:
    print(f"doctor: {what} ...", file=sys.stderr, flush=True)


def _quiet(what: str) -> None:
    pass


COMMAND = Command("doctor", "what of a recipe will not work, and the cure", add_arguments, run)
