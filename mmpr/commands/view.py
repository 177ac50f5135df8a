"""`mmpr view`: a self-contained HTML page of a set."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from internvl.data import Quarantine
from internvl.terminal import Command
from mmpr.commands.shared import refuse_overwrite
from mmpr.listing import open_listing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, help="questions, rollouts, verdicts, pairs or meta.json")
    add("--output", type=Path, required=True, metavar="PAGE", help="the page to write (.html)")
    add("--max-rows", type=int, default=300, metavar="N",
        help="pairs or questions that are shown, drawn evenly (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--max-tiles", type=int, default=12, metavar="N",
        help="tiles of a prompt that names no budget (default: %(default)s)")  # fmt: skip
    add("--tile-size", type=int, default=448, metavar="PX", help="side of a tile (default: 448)")
    add("--image-side", type=int, default=512, metavar="PX",
        help="longest side of a picture on the page (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """`mmpr view`."""
    from mmpr.columns import read_columns
    from mmpr.view import ViewConfig, refuse_kind, write_page
    from mmpr.view_cards import PictureSettings

    refuse_overwrite(args.file, args.output)
    pictures = PictureSettings(args.max_tiles, args.tile_size, args.image_side)
    config = ViewConfig(args.max_rows, args.seed, pictures)
    listing = open_listing(args.file, args.image_root)
    refuse_kind(listing)
    columns = read_columns(listing, Quarantine(None, math.inf))  # a page tells of every bad row
    shown, broken = write_page(listing, columns, args.output, config)
    size = args.output.stat().st_size / 1e6
    noun = "questions" if listing.kind in ("rollout", "verdict") else f"{listing.kind}s"
    print(f"{args.output}: {shown:,} {noun} shown, {size:.1f} MB; open it in a browser")
    if broken:
        print(f"not every picture can be shown ({broken}); paths start at --image-root")
    if columns.bad_rows:
        print(
            f"{columns.bad_rows} bad row(s), named on the page; the first: {columns.bad_reasons[0]}"
        )


COMMAND = Command(
    "view", "a page of a set, with pictures, differences, filters", add_arguments, run
)
