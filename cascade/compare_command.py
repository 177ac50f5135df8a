"""`cascade compare`: two evaluations of the same questions, paired."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cascade.evaluation_tables import comparison_table, markdown, print_rates
from internvl.errors import UserError
from internvl.terminal import Command

_IDS_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cascade compare`."""
    add = parser.add_argument
    add("a", type=Path, metavar="EVAL_A", help="folder of a `cascade evaluate`: the one before")
    add("b", type=Path, metavar="EVAL_B", help="folder of another, of the same questions")
    add("--output", type=Path, required=True, metavar="DIR",
        help="for compare.json, compare.md and flips.jsonl")  # fmt: skip
    add("--allow", nargs="+", default=[], metavar="SETTING",
        help="settings that the two may differ in (prompt: also the questions' words)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """`cascade compare`."""
    from cascade.compare import check_comparable, compare, read_evaluation

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more")
    a, b = read_evaluation(args.a), read_evaluation(args.b)
    check_comparable(a, b, args.allow)
    found, flipped = compare(a, b, args.output, seed=args.seed)
    table = comparison_table(found)
    title = f"A {args.a}, B {args.b}"
    (args.output / "compare.md").write_text(
        f"# {title}\n\n{markdown(table)}\n\n{_ABOUT}\n", encoding="utf-8"
    )
    print_rates(title, table)
    print(_ABOUT)
    for flip, what in (("gained", "right in B alone"), ("lost", "right in A alone")):
        _tell_flips(flipped, flip, what)
    print(f"all of them: {args.output / 'flips.jsonl'}")


_ABOUT = (
    "In percent and points, with 95% intervals over questions. greedy: McNemar's exact test; "
    "mean (of the samples): paired bootstrap."
)


def _tell_flips(flipped: list[dict[str, Any]], flip: str, what: str) -> None:
    ids = [str(record["id"]) for record in flipped if record["flip"] == flip]
    shown = ", ".join(ids[:_IDS_SHOWN]) + (", .." if len(ids) > _IDS_SHOWN else "")
    print(f"{len(ids)} question(s) {what}" + (f": {shown}" if ids else ""))


COMMAND = Command("compare", "two evaluations of the same questions, paired", add_arguments, run)
