"""`mmpr check`: which pairs of a data set can be trained on, and what is wrong with the others."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.data import Quarantine, Row
from internvl.errors import DataError, UserError
from internvl.terminal import Command, print_table
from mmpr.check import Checker, SetReport, read_row
from mmpr.check_meta import DataSetToCheck, data_sets_to_check
from mmpr.commands.shared import add_common, beside, tell_bad

if TYPE_CHECKING:
    from internvl.encoding import Encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="pairs: JSONL, parquet, saved data set, meta.json")
    add_common(parser, output=None)
    add = parser.add_argument
    add(
        "--quarantine",
        type=Path,
        metavar="FILE",
        help="where bad rows go, begun anew each time (default: FILE.quarantine.jsonl, or with "
        "--fix DIR/quarantine.jsonl)",
    )
    add(
        "--fix",
        type=Path,
        metavar="DIR",
        help="write the good rows to DIR: meta.json, annotations/, and images/ where the images "
        "are bytes; nothing is changed where it lies",
    )
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--model", metavar="CKPT", help="count lengths with this checkpoint's tokenizer")
    add("--max-length", type=int, metavar="N", help="tokens of a pair (default: the model's)")
    add("--max-tiles", type=int, metavar="N", help="of a prompt whose data name none (default: 12)")


def run(args: argparse.Namespace) -> None:
    """`mmpr check`."""
    from tqdm import tqdm

    check_options(args)
    found = list(data_sets_to_check(args.file, args.image_root))
    encoder = _encoder(args)
    path = _quarantine_path(args)
    if path.resolve() in _files_read(args.file, found):
        raise UserError(f"--quarantine {path} is one of the files that are checked")
    quarantine = Quarantine(path, args.max_bad)
    path.unlink(missing_ok=True)  # it tells of this run only
    total = sum(len(one.source) for one in found if one.source is not None)
    checker = Checker(quarantine, total, encoder)
    reports = [SetReport(one.name, faults=one.faults, entry_notes=one.notes) for one in found]
    try:
        with tqdm(total=total, desc="checking", unit="row", delay=1) as bar:
            for one, report in zip(found, reports, strict=True):
                if one.source is not None:
                    checker.check(one, report, bar)
    finally:
        _print_check(args.file, reports)
        tell_bad(quarantine)
    if args.fix is not None:
        _fix(args.fix, found, reports)
        return
    faults = [f"data set {report.name!r}: {fault}" for report in reports for fault in report.faults]
    if faults:
        more = f" (and {len(faults) - 1} more, above)" if len(faults) > 1 else ""
        raise DataError(f"{args.file}: {faults[0]}{more}")


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be honoured."""
    for name in ("max_length", "max_tiles"):
        value = vars(args)[name]
        if value is None:
            continue
        if args.model is None:
            raise UserError(f"--{name.replace('_', '-')} needs --model: its tokenizer counts")
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.fix is not None and args.fix.exists() and any(args.fix.iterdir()):
        raise UserError(f"--fix {args.fix}: is not empty; give a new folder")


def _quarantine_path(args: argparse.Namespace) -> Path:
    if args.quarantine is not None:
        return Path(args.quarantine)
    if args.fix is not None:
        return Path(args.fix) / "quarantine.jsonl"
    return beside(args.file, ".quarantine.jsonl")


def _files_read(file: Path, found: Sequence[DataSetToCheck]) -> set[Path]:
    read = {path for one in found if one.source is not None for path in one.source.files()}
    return {path.resolve() for path in (file, *read)}


def _encoder(args: argparse.Namespace) -> Encoder | None:
    """What counts lengths, as the trainers do."""
    if args.model is None:
        return None
    from transformers import AutoConfig

    from internvl.chat import load_processor
    from internvl.encoding import Encoder
    from internvl.folders import require_hf_layout

    require_hf_layout(Path(args.model))
    own = AutoConfig.from_pretrained(args.model).text_config.max_position_embeddings
    limit = args.max_length or own
    if limit > own:
        raise UserError(f"--max-length is {limit}, over the model's own limit of {own} tokens")
    return Encoder(load_processor(args.model), args.max_tiles or 12, limit)


def _fix(folder: Path, found: Sequence[DataSetToCheck], reports: Sequence[SetReport]) -> None:
    """Write the good rows of every data set that has some."""
    from mmpr.formats import write_data_set

    names: set[str] = set()
    for one, report in zip(found, reports, strict=True):
        if one.source is None or not report.good:
            print(f"data set {one.name!r} is left out: it has no good row")
            continue
        name = re.sub(r"[^\w.-]+", "_", one.name) or "pairs"
        while name in names:
            name += "_"
        names.add(name)
        write_data_set(
            *(folder, name, _good_rows(one, report), one.root),
            stored=report.has_bytes,
            repeat_time=one.repeat,
            max_tiles=one.max_tiles,
        )
    print(f"{folder / 'meta.json'}: {len(names)} data set(s)")


def _good_rows(found: DataSetToCheck, report: SetReport) -> Iterator[Row]:
    assert found.source is not None
    for number in report.good:
        yield read_row(found.source, number, found.root, found.max_tiles)[0]


def _print_check(path: Path, reports: Sequence[SetReport]) -> None:
    rows = []
    for report in reports:
        bad = report.bad.total()
        rows.append((report.name, str(report.rows), str(len(report.good)), str(bad), ""))
        for kind, count in report.bad.most_common():
            rows.append(("", "", "", str(count), kind))
    looked_at = sum(report.rows for report in reports)
    good = sum(len(report.good) for report in reports)
    columns = ("data set", "rows", "good", "bad", "what")
    print_table(f"{path}: {good} of {looked_at} rows are good", rows, columns, right=(1, 2, 3))
    for report in reports:  # whole sentences, which a table would break
        for fault in report.faults:
            print(f"fault of data set {report.name!r}: {fault}")
        for note in report.entry_notes:
            print(f"note of data set {report.name!r}: {note}")
        for kind, count in report.notes.most_common():
            print(f"note of {count} row(s) of {report.name!r}: {kind}")


COMMAND = Command("check", "which pairs can be trained on, and what is bad", add_arguments, run)
