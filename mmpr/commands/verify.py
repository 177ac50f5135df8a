"""`mmpr verify`: what `rewards` says of each rollout."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internvl.data import Quarantine, read_rows, write_json, write_jsonl
from internvl.errors import UserError
from internvl.terminal import Command, print_table
from mmpr.commands.shared import (
    add_common,
    beside,
    open_quarantine,
    refuse_overwrite,
    share,
    tell_bad,
)
from mmpr.verify import VerifyReport, verify_rows
from rewards import STYLES, VerifierPool
from rewards.pool import DEFAULT_LIMIT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rollouts", type=Path, help="the rollouts, in any format")
    add_common(parser, output="verdicts")
    parser.add_argument(
        "--style",
        choices=STYLES,
        default="auto",
        help="how the prompt asked for the final answer (default: auto)",
    )
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes for mathematics, which alone can hang (default: %(default)s, by the cores)",
    )
    add(
        "--limit",
        type=float,
        default=DEFAULT_LIMIT,
        metavar="S",
        help="seconds of one comparison, then its outcome is timeout (default: %(default)s)",
    )


def open_pool(args: argparse.Namespace) -> VerifierPool:
    """The pool that the options ask for."""
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")
    if not 0 < args.limit <= 3600:
        raise UserError(f"--limit is {args.limit}; give seconds, above 0 and at most 3600")
    return VerifierPool(args.workers, limit=args.limit)


def run(args: argparse.Namespace) -> None:
    """`mmpr verify`."""
    from tqdm import tqdm

    refuse_overwrite(args.rollouts, args.output)
    pool = open_pool(args)
    quarantine = open_quarantine(args)
    rows = read_rows(args.rollouts, kind="rollout", quarantine=quarantine)
    bad_before = quarantine.count
    report = VerifyReport()
    with pool:
        verdicts = verify_rows(rows, report, quarantine, pool, args.style)
        bar = tqdm(verdicts, total=len(rows), desc="verifying", unit="rollout", delay=1)
        write_jsonl(args.output, bar)
    quarantine.check(len(rows) + bad_before)
    tell_verdicts(args.output, report, quarantine)


def tell_verdicts(output: Path, report: VerifyReport, quarantine: Quarantine) -> None:
    """Write the counts beside the verdicts and print them."""
    write_json(beside(output, ".stats.json"), report.as_dict())
    outcomes = report.as_dict()["outcomes"]
    rows = [(name, str(count), share(count, report.total)) for name, count in outcomes.items()]
    rows.append(("format followed", str(report.format_ok), share(report.format_ok, report.total)))
    title = f"{output}: {report.total} rollouts of {len(report.questions)} questions"
    print_table(title, rows, ("outcome", "rollouts", "share"), right=(1,))
    for reason, count in report.reasons.most_common(3):
        print(f"not judged ({count}): {reason}")
    tell_bad(quarantine)


COMMAND = Command("verify", "judge rollouts against the gold answers", add_arguments, run)
