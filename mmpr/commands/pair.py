"""`mmpr pair`: preference pairs from verdicts, and their entry in meta.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl.data import input_folder, read_rows, write_json
from internvl.errors import UserError
from internvl.terminal import Command, print_table
from mmpr.commands.pair_output import (
    add_pair_output,
    check_pair_output,
    require_images,
    write_pairs,
)
from mmpr.commands.shared import (
    add_common,
    beside,
    open_quarantine,
    refuse_overwrite,
    share,
    tell_bad,
)
from mmpr.groups import usable_groups
from mmpr.pairs import PairConfig, PairReport, build_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verdicts", type=Path, help="the verdicts, in any format")
    add_common(parser, output="pairs")
    add_pair_output(parser)
    add = parser.add_argument
    add("--max-pairs-per-question", type=int, default=15, metavar="N", help="(default: 15)")
    add(
        "--format-negatives",
        choices=("on", "off"),
        default="on",
        help="pairs whose rejected side has no final answer (default: on)",
    )
    add(
        "--max-format-share",
        type=float,
        metavar="X",
        help="the most of all pairs that those may be (default: 0.5)",
    )
    add(
        "--balance-length",
        action="store_true",
        help="where there is a choice, prefer pairs whose replies are of like length",
    )
    add("--seed", type=int, default=0, help="of the draw (default: 0)")


def check_options(args: argparse.Namespace) -> PairConfig:
    """What the options ask for; raises UserError for those that cannot be honoured."""
    refuse_overwrite(args.verdicts, args.output)
    check_pair_output(args)
    if args.format_negatives == "off" and args.max_format_share is not None:
        raise UserError("--max-format-share has no meaning with --format-negatives off")
    return PairConfig(
        max_pairs=args.max_pairs_per_question,
        format_negatives=args.format_negatives == "on",
        max_format_share=0.5 if args.max_format_share is None else args.max_format_share,
        balance_length=args.balance_length,
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> None:
    """`mmpr pair`."""
    config = check_options(args)
    quarantine = open_quarantine(args)
    rows = read_rows(
        args.verdicts, kind="verdict", quarantine=quarantine, image_root=args.image_root
    )
    bad_before = quarantine.count
    groups = usable_groups(rows, quarantine)
    quarantine.check(len(rows) + bad_before)
    require_images(args, rows)
    pairs, report = build_pairs(groups, config)
    write_pairs(args, pairs, args.image_root or input_folder(args.verdicts), quarantine)
    write_json(beside(args.output, ".stats.json"), report.as_dict())
    _print_pairs(args.output, report)
    tell_bad(quarantine)


def _print_pairs(output: Path, report: PairReport) -> None:
    facts = report.as_dict()
    rows = [
        ("questions", str(report.questions)),
        ("  with pairs", str(report.questions_with_pairs)),
        *[(f"  without: {reason}", str(count)) for reason, count in report.without_pairs.items()],
        ("correctness pairs", str(report.correctness)),
        ("format pairs", f"{report.format} ({share(report.format, report.pairs)})"),
        *[(f"left out: {reason}", str(count)) for reason, count in report.left_out.items()],
        ("mean characters, chosen", f"{facts['mean_chosen_chars']:.1f}"),
        ("mean characters, rejected", f"{facts['mean_rejected_chars']:.1f}"),
        ("chosen is the longer", f"{facts['share_chosen_longer']:.1%}"),
    ]
    print_table(f"{output}: {report.pairs} pairs", rows, right=(1,))
    most = max(1, *report.differences.values())
    lengths = [
        (name, str(count), "█" * round(30 * count / most))
        for name, count in report.differences.items()
    ]
    columns = ("chosen / rejected length", "pairs", "")
    print_table("length balance, in characters", lengths, columns, right=(1,))


COMMAND = Command("pair", "preference pairs in MMPR's format", add_arguments, run)
