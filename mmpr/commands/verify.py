"""`mmpr verify`: what `rewards` says of each rollout."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl.data import Quarantine, read_rows, write_json, write_jsonl
from internvl.terminal import Command, print_table
from mmpr.commands.shared import (
    add_common,
    beside,
    open_quarantine,
    refuse_overwrite,
    share,
    tell_bad,
    told_to_the_user,
)
from mmpr.verify import VerifyReport, verify_rows
from rewards.endpoint import ReplyCacheError
from rewards.judging_options import add_judging, make_verifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rollouts", type=Path, help="the rollouts, in any format")
    add_common(parser, output="verdicts")
    add_judging(parser)


def run(args: argparse.Namespace) -> None:
    """`mmpr verify`."""
    from tqdm import tqdm

    refuse_overwrite(args.rollouts, args.output)
    with told_to_the_user():
        verifier = make_verifier(args)
    quarantine = open_quarantine(args)
    rows = read_rows(args.rollouts, kind="rollout", quarantine=quarantine)
    bad_before = quarantine.count
    report = VerifyReport()
    with verifier, told_to_the_user(ReplyCacheError):
        verdicts = verify_rows(rows, report, quarantine, verifier)
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
