"""`mmpr export`: pairs of MMPR's format, published ones too, in the columns of another trainer."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl.data import read_rows
from internvl.errors import UserError
from internvl.terminal import Command
from mmpr.commands.shared import add_common, open_quarantine, refuse_overwrite, tell_bad
from mmpr.formats import write_trl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path, help="meta.json, JSONL, parquet or saved data set")
    add_common(parser, output="parquet file")
    add = parser.add_argument
    add(
        "--format",
        choices=("trl",),
        default="trl",
        help="trl: parquet with prompt, chosen, rejected and images, as TRL's DPOTrainer takes it "
        "(MMPR's own files are written by `mmpr check --fix`)",
    )
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add(
        "--embed-images",
        action="store_true",
        help="the images' bytes in the file, not their absolute paths",
    )


def run(args: argparse.Namespace) -> None:
    """`mmpr export`."""
    refuse_overwrite(args.pairs, args.output)
    if args.output.suffix != ".parquet":
        raise UserError(f"--output {args.output}: what is written is parquet; name it *.parquet")
    quarantine = open_quarantine(args)
    rows = read_rows(args.pairs, kind="pair", quarantine=quarantine, image_root=args.image_root)
    read = len(rows) + quarantine.count
    count = write_trl(args.output, rows, quarantine, embed=args.embed_images)
    quarantine.check(read)
    print(f"{args.output}: {count} pairs, {args.output.stat().st_size / 2**20:.1f} MiB")
    if any(row.tile_budget(None) is not None for row in rows):
        print("some rows name a tile budget, which TRL does not read: its processor's own holds")
    if not args.embed_images:
        print("images are absolute paths: they must stay where they are (or --embed-images)")
    tell_bad(quarantine)


COMMAND = Command("export", "pairs in the columns of TRL's DPOTrainer", add_arguments, run)
