"""`mmpr dropout`: pairs without a gold answer, by letting the model go on without the image."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Quarantine, Row, input_folder, open_source, read_rows, write_json
from internvl.errors import UserError
from internvl.terminal import Command, print_table
from mmpr.commands.pair_output import (
    add_pair_output,
    check_pair_output,
    require_images,
    write_pairs,
)
from mmpr.commands.shared import (
    add_common,
    add_sampling,
    beside,
    open_quarantine,
    refuse_overwrite,
    tell_bad,
)
from mmpr.dropout import NOT_KNOWN_TO_BE_WRONG, DropoutConfig, DropoutReport

if TYPE_CHECKING:
    from internvl.data import Kind
    from internvl.sampler import Sampler, SamplingConfig
    from internvl.scoring import PairScorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rollouts", type=Path, help="rollouts or verdicts, in any format")
    parser.add_argument("--model", required=True, metavar="CKPT", help="checkpoint folder")
    add_common(parser, output="pairs")
    add_pair_output(parser)
    add = parser.add_argument
    add("--start-ratio", type=float, default=0.5, help="of a reply that is kept (default: 0.5)")
    add("--max-pairs-per-question", type=int, default=15, metavar="N", help="(default: 15)")
    add(
        "--outcomes",
        nargs="+",
        metavar="OUTCOME",
        help=f"of verdicts, which may be chosen (default: {' '.join(NOT_KNOWN_TO_BE_WRONG)})",
    )
    add(
        "--filter-by-likelihood",
        action="store_true",
        help="only pairs whose continuation the model finds less likely than the original, given "
        "the image (a forward pass over each pair)",
    )
    add_sampling(parser, "continuation")
    add("--max-tiles", type=int, help="for --filter-by-likelihood (default: 12)")
    add("--seed", type=int, default=0, help="of the draw and of each continuation")
    add(
        "--batch",
        type=int,
        default=256,
        metavar="N",
        help="continuations sampled, written and synced to disk at a time (default: %(default)s); "
        "a run that was killed goes on from there when started again",
    )


def run(args: argparse.Namespace) -> None:
    """`mmpr dropout`."""
    from mmpr.dropout import choose_rollouts

    config, sampling = check_options(args)
    quarantine = open_quarantine(args)
    kind = _kind(args.rollouts)
    if args.outcomes is not None and kind == "rollout":
        raise UserError(f"--outcomes: {args.rollouts} holds rollouts; `mmpr verify` gives outcomes")
    rows = read_rows(args.rollouts, kind=kind, quarantine=quarantine, image_root=args.image_root)
    read = len(rows) + quarantine.count
    require_images(args, rows)
    report = DropoutReport()
    chosen = choose_rollouts(rows, config, report)
    pairs = _make_pairs(args, config, sampling, rows, chosen, quarantine, report)
    quarantine.check(read)
    write_pairs(args, pairs, _root(args, rows), quarantine)
    report.pairs = len(pairs)
    report.chosen_chars = sum(len(pair["chosen"]) for pair in pairs)
    report.rejected_chars = sum(len(pair["rejected"]) for pair in pairs)
    write_json(beside(args.output, ".stats.json"), report.as_dict())
    _print_dropout(args.output, report)
    tell_bad(quarantine)


def check_options(args: argparse.Namespace) -> tuple[DropoutConfig, SamplingConfig]:
    """What the options ask for; raises UserError for those that cannot be honoured."""
    from internvl.sampler import SamplingConfig

    for name in ("batch", "max_model_len", "max_tiles"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.max_tiles is not None and not args.filter_by_likelihood:
        raise UserError(
            "--max-tiles has no meaning without --filter-by-likelihood: no image is seen"
        )
    check_pair_output(args)
    refuse_overwrite(args.rollouts, args.output)
    config = DropoutConfig(
        start_ratio=args.start_ratio,
        max_pairs=args.max_pairs_per_question,
        outcomes=tuple(args.outcomes or NOT_KNOWN_TO_BE_WRONG),
        seed=args.seed,
    )
    return config, SamplingConfig(1, args.temperature, args.top_p, args.top_k, args.max_tokens)


def _kind(path: Path) -> Kind:
    """Verdicts, where the first record that can be read is one; else rollouts."""
    if path.suffix == ".json" and path.is_file():
        return "rollout"  # read_rows says what is wrong with it
    source = open_source(path)
    for index in range(len(source)):
        record, fault = source.read(index)
        if fault is None and isinstance(record, dict):
            return "verdict" if "outcome" in record else "rollout"
    return "rollout"


def _root(args: argparse.Namespace, rows: Sequence[Row]) -> Path:
    """Where the pairs' image paths start: images that were bytes are written beside the output."""
    first = next((row.images[0] for row in rows if row.images), "")
    if isinstance(first, bytes):
        return Path(args.output).parent
    return args.image_root or input_folder(args.rollouts)


def _make_pairs(
    args: argparse.Namespace,
    config: DropoutConfig,
    sampling: SamplingConfig,
    rows: Sequence[Row],
    chosen: dict[str, int],
    quarantine: Quarantine,
    report: DropoutReport,
) -> list[dict[str, Any]]:
    """Sample what is not sampled yet; returns the pairs."""
    from internvl.chat import load_processor
    from internvl.data.resumable import check_same_run
    from internvl.hashing import model_fingerprint
    from internvl.sampler import choose_backend, open_sampler
    from mmpr import dropout

    fingerprint = model_fingerprint(args.model)
    backend = choose_backend(Path(args.model), args.backend)
    continuations = beside(args.output, ".continuations.jsonl")
    run = dropout.describe_run(
        *(args.model, fingerprint, args.dtype, backend), config=config, sampling=sampling
    )
    # before the model is loaded: is this the same run, and is anything left to do?
    check_same_run(continuations, run)
    dropout.check_unchanged(rows, chosen, continuations)

    def open_it() -> Sampler:
        return open_sampler(
            args.model,
            backend=backend,
            seed=args.seed,
            max_model_len=args.max_model_len,
            dtype=args.dtype,
        )

    starter = dropout.Starter(load_processor(args.model), config)
    dropout.sample_continuations(
        *(rows, chosen, open_it, starter),
        output=continuations,
        config=sampling,
        run=run,
        quarantine=quarantine,
        report=report,
        batch=args.batch,
    )
    pairs = list(dropout.pairs_of(continuations, report))
    if not args.filter_by_likelihood:
        return pairs
    return _filter(args, fingerprint, pairs, lambda name: rows[chosen[name]], quarantine, report)


def _filter(
    args: argparse.Namespace,
    fingerprint: str,
    pairs: list[dict[str, Any]],
    row_of: Any,
    quarantine: Quarantine,
    report: DropoutReport,
) -> list[dict[str, Any]]:
    from mmpr.likelihood import keep_less_likely

    max_tiles = args.max_tiles or 12
    run = {"model": args.model, "fingerprint": fingerprint, "dtype": args.dtype}

    def open_scorer() -> PairScorer:
        from internvl.scoring import PairScorer

        return PairScorer(args.model, max_tiles=max_tiles, dtype=args.dtype)

    return keep_less_likely(
        *(pairs, row_of, open_scorer),
        output=beside(args.output, ".likelihood.jsonl"),
        run={**run, "max_tiles": max_tiles},
        quarantine=quarantine,
        left_out=report.left_out,
    )


def _print_dropout(output: Path, report: DropoutReport) -> None:
    facts = report.as_dict()
    rows = [
        ("rollouts", str(report.rollouts)),
        ("  taken", str(report.chosen)),
        ("continued now", str(report.sampled)),
        ("continued before", str(report.done_before)),
        *[(f"left out: {reason}", str(count)) for reason, count in report.left_out.items()],
        ("mean characters, chosen", f"{facts['mean_chosen_chars']:.1f}"),
        ("mean characters, rejected", f"{facts['mean_rejected_chars']:.1f}"),
    ]
    print_table(f"{output}: {report.pairs} pairs", rows, right=(1,))


COMMAND = Command("dropout", "pairs without a gold answer (Dropout-NTP)", add_arguments, run)
