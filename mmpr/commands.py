"""What each command of `mmpr` does: read rows, call a pure module, write, print a report."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.data import (
    Quarantine,
    Row,
    input_folder,
    read_rows,
    write_json,
    write_jsonl,
)
from internvl.errors import DataError, UserError
from internvl.terminal import print_table
from mmpr.groups import usable_verdicts
from mmpr.pairs import PairConfig, PairReport, build_pairs
from mmpr.select import SelectReport, select_questions
from mmpr.stats import detect_kind, summarise
from mmpr.verify import VerifyReport, verify_rows

if TYPE_CHECKING:
    from internvl.sampler import SamplingConfig
    from mmpr.sample import SampleReport


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def _quarantine(args: argparse.Namespace) -> Quarantine:
    path: Path = args.quarantine or _beside(args.output, ".quarantine.jsonl")
    if path.resolve() == args.output.resolve():
        raise UserError(f"--quarantine and --output are both {path}")
    quarantine = Quarantine(path, args.max_bad)
    path.unlink(missing_ok=True)  # it tells of this run only: a restart finds the same rows again
    return quarantine


def _refuse_overwrite(source: Path, output: Path) -> None:
    if source.resolve() == output.resolve():
        raise UserError(f"--output {output} is the input itself")


def _tell_bad(quarantine: Quarantine) -> None:
    if quarantine.count:
        print(f"{quarantine.count} bad row(s) put aside in {quarantine.path}")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def run_sample(args: argparse.Namespace) -> None:
    """`mmpr sample`."""
    from internvl.sampler import SamplingConfig, open_sampler
    from mmpr import sample
    from mmpr.hashing import model_fingerprint

    for name in ("batch_questions", "limit", "max_model_len"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    _refuse_overwrite(args.questions, args.output)
    config = SamplingConfig(
        args.n, args.temperature, args.top_p, args.top_k, args.max_tokens, args.max_tiles
    )
    run = sample.describe_run(
        model=args.model,
        fingerprint=model_fingerprint(args.model),
        seed=args.seed,
        config=config,
        dtype=args.dtype,
    )
    quarantine = _quarantine(args)
    root = args.image_root or input_folder(args.questions)
    rows = read_rows(
        args.questions,
        kind="question",
        quarantine=quarantine,
        image_root=args.image_root,
        limit=args.limit,
    )[: args.limit]
    # before the model is loaded: is this the same run, and is anything left to do?
    sample.check_same_run(args.output, run)
    done = sample.recover(args.output, config.n)
    if sample.only_bad_left(sample.pending_rows(rows, done, args.output, root), quarantine):
        quarantine.check(len(rows) + quarantine.count)
        print(f"{args.output} is complete: {len(done)} questions x {config.n}")
        _tell_bad(quarantine)
        return
    sampler = open_sampler(
        args.model,
        backend=args.backend,
        seed=args.seed,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
    )
    try:
        report = sample.sample_questions(
            rows,
            sampler,
            output=args.output,
            config=config,
            run=run,
            quarantine=quarantine,
            root=root,
            batch_questions=args.batch_questions,
        )
    finally:
        sampler.close()
    _print_sample(args.output, report, config)
    _tell_image_root(sample.first_image(args.output), args.output)
    _tell_bad(quarantine)


def _print_sample(output: Path, report: SampleReport, config: SamplingConfig) -> None:
    completions = report.sampled * config.n
    print(
        f"{output}: {report.sampled} questions x {config.n} sampled"
        f" ({report.done_before} were there before), {report.tokens / max(1, completions):.1f}"
        f" tokens each, {_share(report.cut_off, completions)} cut off at {config.max_tokens}"
    )


def run_verify(args: argparse.Namespace) -> None:
    """`mmpr verify`."""
    from tqdm import tqdm

    from rewards import VerifierPool

    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")
    if not args.limit > 0:
        raise UserError(f"--limit is {args.limit}; give seconds, above 0")
    _refuse_overwrite(args.rollouts, args.output)
    quarantine = _quarantine(args)
    rows = read_rows(args.rollouts, kind="rollout", quarantine=quarantine)
    bad_before = quarantine.count
    report = VerifyReport()
    with VerifierPool(args.workers, limit=args.limit) as pool:
        verdicts = verify_rows(rows, report, quarantine, pool, args.style)
        bar = tqdm(verdicts, total=len(rows), desc="verifying", unit="rollout", delay=1)
        write_jsonl(args.output, bar)
    quarantine.check(len(rows) + bad_before)
    write_json(_beside(args.output, ".stats.json"), report.as_dict())
    _print_verify(args.output, report)
    _tell_bad(quarantine)


def _print_verify(output: Path, report: VerifyReport) -> None:
    outcomes = report.as_dict()["outcomes"]
    rows = [(name, str(count), _share(count, report.total)) for name, count in outcomes.items()]
    rows.append(("format followed", str(report.format_ok), _share(report.format_ok, report.total)))
    title = f"{output}: {report.total} rollouts of {len(report.questions)} questions"
    print_table(title, rows, ("outcome", "rollouts", "share"), right=(1,))
    for reason, count in report.reasons.most_common(3):
        print(f"not judged ({count}): {reason}")


def run_pair(args: argparse.Namespace) -> None:
    """`mmpr pair`."""
    _refuse_overwrite(args.verdicts, args.output)
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
    quarantine = _quarantine(args)
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
    write_json(_beside(args.output, ".stats.json"), report.as_dict())
    if args.meta is not None:
        root = (args.image_root or args.verdicts.parent).resolve()
        enter_in_meta(args.meta, args.name or args.output.stem, args.output, root, len(pairs))
    _print_pairs(args.output, report)
    _tell_bad(quarantine)


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
        ("format pairs", f"{report.format} ({_share(report.format, report.pairs)})"),
        *[(f"left out: {reason}", str(count)) for reason, count in report.left_out.items()],
        ("mean characters, chosen", f"{facts['mean_chosen_chars']:.1f}"),
        ("mean characters, rejected", f"{facts['mean_rejected_chars']:.1f}"),
        ("chosen is the longer", f"{facts['share_chosen_longer']:.1%}"),
    ]
    print_table(f"{output}: {report.pairs} pairs", rows, right=(1,))


def run_select(args: argparse.Namespace) -> None:
    """`mmpr select`."""
    _refuse_overwrite(args.verdicts, args.output)
    quarantine = _quarantine(args)
    rows = read_rows(args.verdicts, kind="verdict", quarantine=quarantine)
    bad_before = quarantine.count
    verdicts = usable_verdicts(rows, quarantine)
    quarantine.check(len(rows) + bad_before)
    selected, report = select_questions(
        verdicts, min_accuracy=args.min_accuracy, max_accuracy=args.max_accuracy
    )
    write_jsonl(args.output, selected)
    write_json(_beside(args.output, ".stats.json"), report.as_dict())
    _print_select(args, report)
    _tell_image_root(next((row.data["image"] for row in rows if row.images), None), args.output)
    _tell_bad(quarantine)


def _tell_image_root(image: str | list[str] | None, output: Path) -> None:
    """Say so when the images, whose paths stay as they were, do not lie beside the output."""
    name = image[0] if isinstance(image, list) else image
    if name is not None and not (output.parent / name).is_file():
        print(
            f"image paths are as in the questions ({name}) and do not start from "
            f"{output.parent}: give --image-root to what reads {output.name}"
        )


def _print_select(args: argparse.Namespace, report: SelectReport) -> None:
    most = max(1, *report.histogram.values())
    rows = [
        (name, str(count), "█" * round(30 * count / most))
        for name, count in report.histogram.items()
    ]
    title = (
        f"{args.output}: {report.selected} of {report.questions} questions with accuracy in "
        f"[{args.min_accuracy:g}, {args.max_accuracy:g}]"
    )
    print_table(title, rows, ("accuracy", "questions", ""), right=(1,))
    print(
        f"too hard {report.too_hard}, too easy {report.too_easy}, "
        f"could not be judged {report.not_judged}"
    )


def run_stats(args: argparse.Namespace) -> None:
    """`mmpr stats`."""
    kind = detect_kind(args.file)
    quarantine = Quarantine(None, args.max_bad)
    rows = read_rows(args.file, kind=kind, quarantine=quarantine)
    facts = summarise([row.data for row in rows], kind)
    facts["bad rows"] = str(quarantine.count)
    print_table(str(args.file), list(facts.items()))
