"""The options by which pairs are written: MMPR's format with its meta.json, or TRL's columns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl.data import Quarantine, Row, write_jsonl
from internvl.errors import UserError
from mmpr.formats import enter_in_meta, write_trl


def add_pair_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--format",
        choices=("mmpr", "trl"),
        default="mmpr",
        help="mmpr: JSONL, as InternVL's trainer and ours read it; trl: parquet for TRL's "
        "DPOTrainer (default: %(default)s)",
    )
    add("--meta", type=Path, metavar="FILE", help="meta.json to enter the data set in")
    add("--name", metavar="NAME", help="its name there (default: the output's)")
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add(
        "--embed-images",
        action="store_true",
        help="trl: the images' bytes in the file, not their absolute paths",
    )


def check_pair_output(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if args.format == "trl":
        if args.meta is not None or args.name is not None:
            raise UserError("--meta and --name are of MMPR's format, not of --format trl")
        if args.output.suffix != ".parquet":
            raise UserError(f"--output {args.output}: --format trl is parquet; name it *.parquet")
        return
    if args.embed_images:
        raise UserError("--embed-images is an option of --format trl")
    if args.meta is None and args.name is not None:
        raise UserError("--name is written to meta.json: give --meta too")
    if args.meta is not None and not args.output.name.endswith("jsonl"):
        raise UserError(
            f"--output {args.output}: InternVL's own trainer reads only *.jsonl from a meta.json"
        )


def require_images(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Refuse to write a `root`, or TRL's paths, under which the first image does not lie."""
    if args.meta is None and args.format != "trl":
        return
    what = "meta.json would point nowhere" if args.meta is not None else "no pair can be written"
    for row in rows:
        for path in row.image_sources():
            if isinstance(path, Path) and not path.is_file():
                raise UserError(
                    f"{row.file}:{row.line}: image {path} does not exist, so {what}; give "
                    "--image-root, the folder that image paths start from"
                )
            return


def write_pairs(
    args: argparse.Namespace, pairs: Sequence[dict[str, Any]], root: Path, quarantine: Quarantine
) -> None:
    """Write pairs in the format asked for; root: the folder that their image paths start from.

    Raises DataError where more pairs cannot be written than the quarantine allows.
    """
    if args.format == "trl":
        rows = (Row(pair, args.output, number + 1, root) for number, pair in enumerate(pairs))
        before = quarantine.count
        written = write_trl(args.output, rows, quarantine, embed=args.embed_images)
        if written < len(pairs):
            print(f"{written} of {len(pairs)} pairs are in {args.output}")
        quarantine.check(before + len(pairs))
        return
    write_jsonl(args.output, pairs)
    if args.meta is not None:
        name = args.name or args.output.stem
        enter_in_meta(args.meta, name, args.output, root.resolve(), len(pairs))
