"""`mmpr stats`: counts and lengths."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl.data import Quarantine, read_rows
from internvl.terminal import Command, print_table
from mmpr.commands.shared import add_common
from mmpr.stats import detect_kind, summarise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="questions, rollouts, verdicts, pairs or meta.json")
    add_common(parser, output=None)


def run(args: argparse.Namespace) -> None:
    """`mmpr stats`."""
    kind = detect_kind(args.file)
    quarantine = Quarantine(None, args.max_bad)
    rows = read_rows(args.file, kind=kind, quarantine=quarantine)
    facts = summarise([row.data for row in rows], kind)
    facts["bad rows"] = str(quarantine.count)
    print_table(str(args.file), list(facts.items()))


COMMAND = Command("stats", "counts and lengths of a file", add_arguments, run)
