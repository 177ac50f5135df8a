"""`mmpr select`: questions for online RL."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl.data import read_rows, write_json, write_jsonl
from internvl.terminal import Command, print_table
from mmpr.commands.shared import (
    add_common,
    beside,
    open_quarantine,
    refuse_overwrite,
    tell_bad,
    tell_image_root,
)
from mmpr.groups import usable_groups
from mmpr.select import SelectReport, check_bounds, select_questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verdicts", type=Path, help="the verdicts, in any format")
    add_common(parser, output="questions")
    parser.add_argument("--min-accuracy", type=float, default=0.2, help="(default: %(default)s)")
    parser.add_argument("--max-accuracy", type=float, default=0.8, help="(default: %(default)s)")


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be honoured."""
    refuse_overwrite(args.verdicts, args.output)
    check_bounds(args.min_accuracy, args.max_accuracy)


def run(args: argparse.Namespace) -> None:
    """`mmpr select`."""
    check_options(args)
    quarantine = open_quarantine(args)
    rows = read_rows(args.verdicts, kind="verdict", quarantine=quarantine)
    bad_before = quarantine.count
    groups = usable_groups(rows, quarantine)
    quarantine.check(len(rows) + bad_before)
    selected, report = select_questions(
        groups, min_accuracy=args.min_accuracy, max_accuracy=args.max_accuracy
    )
    write_jsonl(args.output, selected)
    write_json(beside(args.output, ".stats.json"), report.as_dict())
    _print_select(args, report)
    tell_image_root(next((row.data["image"] for row in rows if row.images), None), args.output)
    tell_bad(quarantine)


def _print_select(args: argparse.Namespace, report: SelectReport) -> None:
    most = max(1, *report.histogram.values())
    rows = [
        (name, str(count), "█" * round(30 * count / most))
        for name, count in report.histogram.items()
    ]
    title = (
        f"{args.output}: {report.selected} of {report.questions} questions with accuracy in "
        f"[{args.min_accuracy:g}, {args.max_accuracy:g}]"
    )
    print_table(title, rows, ("accuracy", "questions", ""), right=(1,))
    print(
        f"too hard {report.too_hard}, too easy {report.too_easy}, "
        f"could not be judged {report.not_judged}"
    )


COMMAND = Command("select", "questions for online RL, by accuracy", add_arguments, run)
