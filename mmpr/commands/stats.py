"""`mmpr stats`: what a set holds, by data set and in all."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.data import Quarantine
from internvl.errors import UserError
from internvl.terminal import Command, print_table
from mmpr.columns import read_columns
from mmpr.commands.shared import add_common, share
from mmpr.listing import open_listing
from mmpr.stats import summarise

_NAME_WIDTH = 30  # characters of a data set's name in a table of 100 columns
_SHOWN_REASONS = 5  # of bad rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, help="questions, rollouts, verdicts, pairs, conversations or meta.json")
    add_common(parser, output=None)
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--model", type=Path, metavar="DIR", help="checkpoint: count tokens and tiles with it, too")
    add("--max-tiles", type=int, metavar="N", help="tiles of a prompt with --model (default: 12)")
    add("--json", action="store_true", help="print all of it as JSON")


def run(args: argparse.Namespace) -> None:
    """`mmpr stats`."""
    if args.max_tiles is not None and args.model is None:
        raise UserError("--max-tiles has a meaning only with --model")
    if args.max_tiles is not None and args.max_tiles < 1:
        raise UserError(f"--max-tiles is {args.max_tiles}; it must be at least 1")
    listing = open_listing(args.file, args.image_root)
    counter = None
    if args.model is not None:
        from mmpr.token_counts import TokenCounter

        counter = TokenCounter(args.model, args.max_tiles or 12)
    quarantine = Quarantine(None, args.max_bad)
    columns = read_columns(listing, quarantine, counter=counter)
    facts = {
        "file": str(args.file),
        "kind": listing.kind,
        "bad_rows": {"rows": columns.bad_rows, "first_reasons": columns.bad_reasons},
        "repeat_time": listing.repeats(),
        **summarise(columns),
    }
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_stats(facts)
    quarantine.check(len(listing))


def _print_stats(facts: dict[str, Any]) -> None:
    """Tables of at most 100 columns: all rows, then by data set, then the histograms."""
    everything, kind, sets = facts["all"], facts["kind"], facts["data_sets"]
    noun = f"{kind}s" if everything["rows"] != 1 else kind
    rows = list(_overview(facts))
    print_table(f"{facts['file']}: {everything['rows']:,} {noun}", rows)
    _print_lengths(everything)
    if len(sets) > 1:
        _print_data_sets(sets, everything, kind)
    if "accuracy" in everything:
        _print_accuracy(everything["accuracy"])
    for reason in facts["bad_rows"]["first_reasons"][:_SHOWN_REASONS]:
        print(f"bad row: {reason}")


def _overview(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    everything, bad = facts["all"], facts["bad_rows"]["rows"]
    rows, repeated = everything["rows"], everything["duplicates"]["rows"]
    yield "data sets", f"{len(facts['data_sets']):,}"
    yield "questions", f"{everything['questions']:,}"
    yield "images or frames a row", _listed(everything["pictures"], rows)
    for name, key in (
        ("kinds", "kinds"), ("outcomes", "outcomes"), ("matchers", "matchers"),
        ("finish reasons", "finish_reasons"),
    ):  # fmt: skip
        if everything.get(key):
            yield name, _listed(everything[key], rows)
    if "rollouts_per_question" in everything:
        yield "rollouts a question", _range(everything["rollouts_per_question"])
    if "format_followed" in everything:
        yield "format followed", f"{everything['format_followed']:.1%}"
    if "chosen_longer" in everything:
        yield "chosen is the longer", f"{everything['chosen_longer']:.1%}"
    yield "duplicates", f"{repeated:,} ({share(repeated, rows)})"
    yield "bad rows", f"{bad:,} ({share(bad, rows + bad)})"
    for name, times in facts["repeat_time"].items():
        yield "repeat_time", f"{name}: {times:g} (each row is counted once here)"


def _listed(counts: dict[str, int], whole: int, most: int = 8) -> str:
    shown = [
        f"{name}: {count:,} ({share(count, whole)})" for name, count in list(counts.items())[:most]
    ]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])])


def _range(values: dict[str, float]) -> str:
    return f"mean {values['mean']:.1f}, {values['min']} to {values['max']}"


def _print_lengths(facts: dict[str, Any]) -> None:
    rows = [(f"{name}, characters", value) for name, value in facts["characters"].items()]
    rows += [(f"{name}, tokens", value) for name, value in facts.get("tokens", {}).items()]
    rows += [("tiles", facts["tiles"])] if "tiles" in facts else []
    keys = ("mean", "p5", "median", "p95", "max")
    cells = [(name, *(_number(value[key]) for key in keys)) for name, value in rows]
    print_table("lengths", cells, ("", "mean", "5%", "median", "95%", "most"), right=range(1, 6))


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _print_data_sets(sets: dict[str, Any], everything: dict[str, Any], kind: str) -> None:
    named = {**sets, "all": everything}
    tables = (
        (f"{kind}s by data set", _data_set_cells),
        ("characters by data set: median (95th percentile)", _length_cells),
    )
    for title, make in tables:
        cells = [{"data set": _cut(name), **make(one, everything)} for name, one in named.items()]
        columns = list(cells[0])
        rows = [tuple(row.values()) for row in cells]
        print_table(title, rows, columns, right=range(1, len(columns)))


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"


def _data_set_cells(facts: dict[str, Any], everything: dict[str, Any]) -> dict[str, str]:
    """One data set's counts: {column: cell}; the columns are those of all rows."""
    rows = facts["rows"]
    cells = {"rows": f"{rows:,}"}
    if everything["questions"] != everything["rows"]:
        cells["questions"] = f"{facts['questions']:,}"
    for kind in list(everything.get("kinds", {}))[:3]:
        cells[kind] = share(facts["kinds"].get(kind, 0), rows)
    if "accuracy" in everything:
        mean = facts["accuracy"]["mean"]
        cells["accuracy"] = "-" if mean is None else f"{mean:.1%}"
        cells["no answer"] = share(facts["outcomes"]["no_answer"], rows)
        unjudged = facts["outcomes"]["cannot_judge"] + facts["outcomes"]["timeout"]
        cells["not judged"] = share(unjudged, rows)
    cells["repeated"] = share(facts["duplicates"]["rows"], rows)
    return cells


def _length_cells(facts: dict[str, Any], everything: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for name in everything["characters"]:
        values = facts["characters"][name]
        cells[name] = f"{values['median']:,} ({values['p95']:,})"
    if "tiles" in everything:
        cells["tiles"] = f"{facts['tiles']['median']} ({facts['tiles']['p95']})"
    if "chosen_longer" in everything:
        cells["chosen longer"] = f"{facts['chosen_longer']:.1%}"
    return cells


def _print_accuracy(accuracy: dict[str, Any]) -> None:
    counts = accuracy["histogram"]
    most = max(1, *counts.values())
    rows = [(name, f"{count:,}", "█" * round(40 * count / most)) for name, count in counts.items()]
    mean = "none was judged" if accuracy["mean"] is None else f"mean {accuracy['mean']:.1%}"
    title = f"accuracy of a question ({mean}; not judged: {accuracy['questions_not_judged']:,})"
    print_table(title, rows, ("accuracy", "questions", ""), right=(1,))


COMMAND = Command("stats", "counts, outcomes and lengths of a set, by data set", add_arguments, run)
