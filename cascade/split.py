"""`cascade split`: hold questions out by their pictures, so that none is trained on and asked."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.errors import UserError
from internvl.terminal import Command

if TYPE_CHECKING:
    from internvl.data import Row


def held_out(
    keys: Sequence[Sequence[Hashable]], share: float, seed: int, names: Sequence[str]
) -> list[bool]:
    """Which rows are held out: whole groups of rows that share a key, until they are `share`.

    keys: of each row what no row of the other side may have. names: of each row what it is called,
    by which, with the seed, its group's place in the draw is found; so a row that is added moves no
    other but near the border. At least one group is held out, and at least one is not.
    """
    group = _groups(keys)
    members: dict[int, list[int]] = {}
    for row, first in enumerate(group):
        members.setdefault(first, []).append(row)
    order = sorted(
        members, key=lambda first: _draw(min(names[row] for row in members[first]), seed)
    )
    wanted, taken = share * len(keys), 0
    out = [False] * len(keys)
    for number, first in enumerate(order[:-1]):
        if number and taken + len(members[first]) / 2 > wanted:
            break
        taken += len(members[first])
        for row in members[first]:
            out[row] = True
    return out


def _groups(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """Of each row the first row of its group."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[Hashable, int] = {}
    for row, own in enumerate(keys):
        for key in own:
            a, b = root(first_with.setdefault(key, row)), root(row)
            parent[max(a, b)] = min(a, b)
    return [root(row) for row in range(len(keys))]


def _draw(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cascade split`."""
    add = parser.add_argument
    add("questions", type=Path, help="CSV, JSONL, parquet, data set, meta.json, .tsv")
    add("--heldout", type=float, default=0.1, metavar="SHARE",
        help="of the questions that is held out (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, metavar="DIR",
        help="for train.jsonl and heldout.jsonl (default: the questions' folder)")  # fmt: skip
    add("--image-root", type=Path, metavar="DIR",
        help="where relative paths of images start (default: the questions' folder)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add("--max-bad", type=float, default=0.05, metavar="X",
        help="share (<1) or number of bad rows borne (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """`cascade split`."""
    from internvl.data import input_folder, portable_record, write_jsonl

    if not 0 < args.heldout < 1:
        raise UserError(f"--heldout is {args.heldout:g}; give a share between 0 and 1")
    folder = args.output or input_folder(args.questions)
    files = [folder / "train.jsonl", folder / "heldout.jsonl"]
    for file in files:
        if file.exists() and file.samefile(args.questions):
            raise UserError(f"{file} would be written over: give --output DIR")
    rows = _read(args, folder / "split.quarantine.jsonl")
    keys = [_keys(row) for row in rows]
    out = held_out(keys, args.heldout, args.seed, [str(row.data["id"]) for row in rows])
    if not any(out):
        raise UserError(
            f"{args.questions}: all {len(rows)} questions share pictures: none can be held out"
        )
    for file, side in zip(files, (False, True), strict=True):
        chosen = [number for number, held in enumerate(out) if held is side]
        write_jsonl(file, (portable_record(rows[number], file) for number in chosen))
        pictures = len({key for number in chosen for key in keys[number]})
        print(f"{file}: {len(chosen):,} questions, {pictures:,} pictures")
    root = args.image_root or input_folder(args.questions)
    if root.resolve() != folder.resolve() and any(
        isinstance(image, str) for row in rows for image in row.images
    ):
        print(f"paths of images are as they were: give --image-root {root} to what reads the files")


def _read(args: argparse.Namespace, aside: Path) -> list[Row]:
    """The usable questions, each once whatever its data set's `repeat_time`."""
    from internvl.data import Quarantine, check_images, read_rows

    aside.unlink(missing_ok=True)
    quarantine = Quarantine(aside, args.max_bad)
    found = read_rows(
        args.questions, kind="question", quarantine=quarantine, image_root=args.image_root
    )
    rows = list(
        {(row.file, row.line): row for row in check_images(found, quarantine=quarantine)}.values()
    )
    if quarantine.count:
        print(f"{quarantine.count} unusable rows: {aside}")
    return rows


def _keys(row: Row) -> list[Hashable]:
    """What a row may share with no row of the other side: its pictures, or its words alone."""
    from cascade.doctor.leaks import picture_key

    frames = row.video_source()
    if frames is not None and frames.is_dir():
        return [str(frames.resolve())]
    return list(picture_key(row)) or [str(row.data["question"])]


COMMAND = Command("split", "hold questions out, no picture on both sides", add_arguments, run)
