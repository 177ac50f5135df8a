"""`mmpr sample`: n completions a question."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.data import input_folder, read_rows
from internvl.errors import UserError
from internvl.terminal import Command
from mmpr.commands.shared import (
    add_common,
    open_quarantine,
    refuse_overwrite,
    share,
    tell_bad,
    tell_image_root,
)

if TYPE_CHECKING:
    from internvl.sampler import SamplingConfig
    from mmpr.sample import SampleReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", type=Path, help="JSONL, parquet, saved data set or meta.json")
    parser.add_argument("--model", required=True, metavar="CKPT", help="checkpoint folder")
    add_common(parser, output="rollouts")
    add = parser.add_argument
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    add("--n", type=int, default=8, help="completions a question (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="(default: %(default)s, off)")
    add("--top-k", type=int, default=0, help="(default: %(default)s, off)")
    add("--max-tokens", type=int, default=1024, help="of a completion (default: %(default)s)")
    add("--max-tiles", type=int, default=12, help="of a prompt whose data name none (default: 12)")
    add("--seed", type=int, default=0, help="each question's own seed is drawn from it")
    add("--backend", choices=("auto", "vllm", "transformers"), default="auto", help="the sampler")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    add("--max-model-len", type=int, metavar="N", help="prompt + completion (default: the model's)")
    add(
        "--batch-questions",
        type=int,
        default=256,
        metavar="N",
        help="questions sampled, written and synced to disk at a time (default: %(default)s); "
        "a run that was killed goes on from there when started again",
    )


def run(args: argparse.Namespace) -> None:
    """`mmpr sample`."""
    from internvl.sampler import SamplingConfig, open_sampler
    from mmpr import resumable, sample
    from mmpr.hashing import model_fingerprint

    for name in ("batch_questions", "limit", "max_model_len"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    refuse_overwrite(args.questions, args.output)
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
    quarantine = open_quarantine(args)
    root = args.image_root or input_folder(args.questions)
    rows = read_rows(
        args.questions,
        kind="question",
        quarantine=quarantine,
        image_root=args.image_root,
        limit=args.limit,
    )[: args.limit]
    # before the model is loaded: is this the same run, and is anything left to do?
    resumable.check_same_run(args.output, run)
    done = resumable.recover(args.output, config.n)
    if sample.only_bad_left(sample.pending_rows(rows, done, args.output, root), quarantine):
        quarantine.check(len(rows) + quarantine.count)
        print(f"{args.output} is complete: {len(done)} questions x {config.n}")
        tell_bad(quarantine)
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
    tell_image_root(sample.first_image(args.output), args.output)
    tell_bad(quarantine)


def _print_sample(output: Path, report: SampleReport, config: SamplingConfig) -> None:
    completions = report.sampled * config.n
    print(
        f"{output}: {report.sampled} questions x {config.n} sampled"
        f" ({report.done_before} were there before), {report.tokens / max(1, completions):.1f}"
        f" tokens each, {share(report.cut_off, completions)} cut off at {config.max_tokens}"
    )


COMMAND = Command("sample", "n completions per question, resumable", add_arguments, run)
