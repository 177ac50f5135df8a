"""`sft review`: a page of rejected (or undecided) rows with what was found marked in them.

OUTPUT.rejected.jsonl -> drawn evenly by rule -> cards -> page.html (no network, one script)
                         the page saves accepted.jsonl -> sft filter ... --accept accepted.jsonl
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.errors import DataError, UserError
from internvl.terminal import Command

if TYPE_CHECKING:
    from sft.data_tools.review_cards import Card

UNDECIDED = "undecided"


@dataclass(frozen=True)
class Line:
    """Where a line begins in its file, in bytes, and the rules that it names."""

    start: int
    rules: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sft review`."""
    add = parser.add_argument
    add("file", type=Path, help="OUTPUT.rejected.jsonl or OUTPUT.undecided.jsonl of a run")
    add("--output", type=Path, required=True, metavar="PAGE", help="the page to write (.html)")
    add("--rule", action="append", metavar="NAME", help="only rows that it hit (may come again)")
    add("--max-rows", type=int, default=300, metavar="N",
        help="rows that are shown, drawn evenly by rule (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    add("--image-root", type=Path, metavar="DIR",
        help="where image paths start (default: where they started in the run)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """`sft review`."""
    from sft.data_tools.review_cards import make_card

    if args.max_rows < 1 or args.seed < 0:
        raise UserError("--max-rows must be at least 1, and --seed at least 0")
    if args.file.resolve() == args.output.resolve():
        raise UserError(f"--output {args.output} is the input itself")
    lines = read_lines(args.file)
    known = sorted({rule for line in lines for rule in line.rules})
    if missing := sorted(set(args.rule or ()) - set(known)):
        raise UserError(f"--rule {missing[0]}: no row was hit by it; there are {', '.join(known)}")
    wanted = [line for line in lines if not args.rule or set(args.rule) & set(line.rules)]
    shown = draw_lines(wanted, args.max_rows, args.seed)
    cards = [make_card(entry, args.image_root) for entry in read_entries(args.file, shown)]
    write_page(args.file, args.output, cards, wanted)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {len(cards):,} of {len(wanted):,} rows, {size:.1f} MB; open it in a "
          "browser, mark the rows to take back, save them there, and give that file to "
          "`sft filter ... --accept`")  # fmt: skip


def rules_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """The rules that a line names; an undecided row's is "undecided"."""
    found = dict.fromkeys(reason["rule"] for reason in entry.get("reasons", []))
    return tuple(found) or (UNDECIDED,)


def read_lines(path: Path) -> list[Line]:
    """What the lines of a file of rejected rows are about; raises DataError for another file."""
    lines, start = [], 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for number, raw in enumerate(file, start=1):
            try:
                entry = json.loads(raw)
                entry["key"], entry["row"]["conversations"], entry["image_root"]
                lines.append(Line(start, rules_of(entry)))
            except (ValueError, LookupError, TypeError):
                raise DataError(
                    f"{path}:{number}: not a line of a file *.rejected.jsonl or *.undecided.jsonl"
                ) from None
            start += len(raw)
    if not lines:
        raise DataError(f"{path}: no row in it; there is nothing to look at")
    return lines


def read_entries(path: Path, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The entries of some lines."""
    entries = []
    with path.open("rb") as file:
        for line in lines:
            file.seek(line.start)
            entries.append(json.loads(file.readline()))
    return entries


def draw_lines(lines: Sequence[Line], number: int, seed: int) -> list[Line]:
    """At most `number` lines in order, as evenly as possible by the first rule that they name."""
    import numpy as np

    rng = np.random.default_rng(seed)
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.rules[0]].append(line)
    drawn: list[Line] = []
    for left, name in zip(
        range(len(groups), 0, -1), sorted(groups, key=lambda n: (len(groups[n]), n)), strict=True
    ):  # small groups first: what they leave is for the others
        group = groups[name]
        share = min(len(group), -(-(number - len(drawn)) // left))
        drawn += [group[int(place)] for place in rng.permutation(len(group))[:share]]
    return sorted(drawn, key=lambda line: line.start)


def write_page(file: Path, output: Path, cards: Sequence[Card], lines: Sequence[Line]) -> None:
    """Write the page; the same rows, the same bytes."""
    script = _template_text("review.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template("review.html.j2").render(
        title=file.name,
        cards=cards,
        total=len(lines),
        rules=Counter(rule for line in lines for rule in line.rules).most_common(),
        sets=Counter(card.data_set for card in cards if card.data_set).most_common(),
        script=script,
        script_hash=digest,
        style=_template_text("review.css"),
    )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(page.encode("utf-8", "backslashreplace"))
    partial.replace(output)


def _template_text(name: str) -> str:
    from importlib.resources import files

    return (files("sft.data_tools") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sft.data_tools", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment


COMMAND = Command(
    "review", "a page of rejected rows: what was found, the images, rows to take back",
    *(add_arguments, run),
)  # fmt: skip
