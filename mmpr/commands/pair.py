"""`mmpr pair`: preference pairs from verdicts, and their entry in meta.json."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from internvl.data import Row, read_rows, write_json, write_jsonl
from internvl.errors import DataError, UserError
from internvl.terminal import Command, print_table
from mmpr.commands.shared import (
    add_common,
    beside,
    open_quarantine,
    refuse_overwrite,
    share,
    tell_bad,
)
from mmpr.groups import usable_verdicts
from mmpr.pairs import PairConfig, PairReport, build_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verdicts", type=Path, help="the verdicts, in any format")
    add_common(parser, output="pairs")
    add = parser.add_argument
    add("--meta", type=Path, metavar="FILE", help="meta.json to enter the data set in")
    add("--name", metavar="NAME", help="its name there (default: the output's)")
    add("--image-root", type=Path, metavar="DIR", help="where image paths start (for --meta)")
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
    add("--seed", type=int, default=0, help="of the draw (default: 0)")


def run(args: argparse.Namespace) -> None:
    """`mmpr pair`."""
    refuse_overwrite(args.verdicts, args.output)
    if args.meta is None and (args.name is not None or args.image_root is not None):
        raise UserError("--name and --image-root are written to meta.json: give --meta too")
    if args.format_negatives == "off" and args.max_format_share is not None:
        raise UserError("--max-format-share has no meaning with --format-negatives off")
    config = PairConfig(
        max_pairs=args.max_pairs_per_question,
        format_negatives=args.format_negatives == "on",
        max_format_share=0.5 if args.max_format_share is None else args.max_format_share,
        seed=args.seed,
    )
    quarantine = open_quarantine(args)
    rows = read_rows(
        args.verdicts, kind="verdict", quarantine=quarantine, image_root=args.image_root
    )
    bad_before = quarantine.count
    verdicts = usable_verdicts(rows, quarantine)
    quarantine.check(len(rows) + bad_before)
    if args.meta is not None:
        _require_images(rows)
    pairs, report = build_pairs(verdicts, config)
    write_jsonl(args.output, pairs)
    write_json(beside(args.output, ".stats.json"), report.as_dict())
    if args.meta is not None:
        root = (args.image_root or args.verdicts.parent).resolve()
        enter_in_meta(args.meta, args.name or args.output.stem, args.output, root, len(pairs))
    _print_pairs(args.output, report)
    tell_bad(quarantine)


def _require_images(rows: Sequence[Row]) -> None:
    """Refuse to write a `root` under which the first image does not lie."""
    for row in rows:
        for path in row.image_sources():
            if isinstance(path, Path) and not path.is_file():
                raise UserError(
                    f"{row.file}:{row.line}: image {path} does not exist, so meta.json would "
                    "point nowhere; give --image-root, the folder that image paths start from"
                )
            return


def enter_in_meta(meta: Path, name: str, annotation: Path, root: Path, length: int) -> None:
    """Add a data set to an MMPR meta.json, or replace the one of that name; others stay.

    Paths are written relative to meta.json's folder, as `internvl.data` reads them.
    Raises DataError when the file is there and is no meta.json.
    """
    entries: dict[str, object] = {}
    if meta.exists():
        try:
            entries = json.loads(meta.read_bytes())
        except ValueError as error:
            raise DataError(f"{meta}: not valid JSON: {error}") from None
        if not isinstance(entries, dict):
            raise DataError(f"{meta}: expected {{name: {{root, annotation, ...}}}}")
    folder = meta.resolve().parent
    entries[name] = {
        "root": os.path.relpath(root.resolve(), folder),
        "annotation": os.path.relpath(annotation.resolve(), folder),
        "data_augment": False,
        "repeat_time": 1,
        "length": length,
    }
    write_json(meta, entries)


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


COMMAND = Command("pair", "preference pairs in MMPR's format", add_arguments, run)
