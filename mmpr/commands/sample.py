"""`mmpr sample`: n completions a question."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Quarantine, Row, Rows, Selection, input_folder, read_rows
from internvl.errors import UserError
from internvl.prompts import LANGUAGES, PROMPT_STYLES, PromptedRows
from internvl.sampler_options import add_servers, check_sampler_options, open_asked
from internvl.terminal import Command
from mmpr.commands.shared import (
    add_common,
    add_sampling,
    open_quarantine,
    refuse_overwrite,
    share,
    tell_bad,
    tell_image_root,
)

_FIRST_ROWS = 256  # that are asked whether they can be judged

if TYPE_CHECKING:
    from internvl.sampler import SamplingConfig
    from mmpr.sample import SampleReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "questions", type=Path, help="JSONL, CSV, parquet, data set, meta.json, .tsv"
    )
    parser.add_argument("--model", required=True, metavar="CKPT", help="checkpoint folder")
    add_common(parser, output="rollouts")
    add = parser.add_argument
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    add(
        "--prompt-style",
        choices=PROMPT_STYLES,
        default="none",
        help="the instruction that is put behind each question, which is kept as question_orig; a "
        "question that asks for a form itself keeps its own (default: %(default)s)",
    )
    add(
        "--language",
        choices=LANGUAGES,
        default="auto",
        help="of the instruction (default: auto, the question's)",
    )
    add("--n", type=int, default=8, help="completions a question (default: %(default)s)")
    add_sampling(parser, "completion")
    add(
        "--max-tiles",
        type=int,
        default=12,
        help="of a prompt whose row (max_tiles) or data set (max_dynamic_patch in meta.json) "
        "names none (default: 12)",
    )
    add("--seed", type=int, default=0, help="each question's own seed is drawn from it")
    add(
        "--batch-questions",
        type=int,
        default=256,
        metavar="N",
        help="questions written and synced to disk at a time (default: %(default)s), fewer where "
        "they take longer than 30 s; "
        "a run that was killed goes on from there when started again",
    )
    add_servers(parser)


def run(args: argparse.Namespace) -> None:
    """`mmpr sample`."""
    for _ in sampling(args):
        pass


def sampling(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """`mmpr sample` step by step: nothing once the file is known to be whole as far as it goes,
    then the records of each batch that is on disk.
    """
    from internvl.hashing import model_fingerprint
    from internvl.sampler import SamplingConfig
    from mmpr import sample

    _check(args)
    config = SamplingConfig(
        args.n, args.temperature, args.top_p, args.top_k, args.max_tokens, args.max_tiles
    )
    run = sample.describe_run(
        model=args.model,
        fingerprint=model_fingerprint(args.model),
        seed=args.seed,
        config=config,
        dtype="the servers'" if args.server else args.dtype,
        **_prompt_facts(args),
    )
    quarantine = open_quarantine(args)
    root = args.image_root or input_folder(args.questions)
    rows = PromptedRows(_read(args, quarantine), args.prompt_style, args.language)
    _refuse_unknown_matchers(rows)
    # before the model is loaded: is this the same run, and is anything left to do?
    plan = sample.plan_sampling(
        rows, output=args.output, config=config, run=run, root=root, bad=quarantine.count
    )
    yield []
    if sample.only_bad_left(plan.pending, quarantine):
        quarantine.check(plan.total)
        print(f"{args.output} is complete: {plan.done} questions x {config.n}")
        tell_bad(quarantine)
        return
    report = sample.SampleReport()
    sampler = open_asked(args)
    try:
        yield from sample.sample_batches(
            *(plan, sampler, quarantine),
            report=report,
            batch_questions=args.batch_questions,
        )
    finally:
        sampler.close()
    _print_sample(args.output, report, config)
    _print_styles(args.prompt_style, report)
    tell_image_root(sample.first_image(args.output), args.output)
    tell_bad(quarantine)


def _refuse_unknown_matchers(rows: Sequence[Row]) -> None:
    """Raise UserError where none of the first questions can be judged: not after the sampling."""
    from rewards.judging import judging_fault

    first = list(islice(rows, _FIRST_ROWS))
    faults = [judging_fault(row.data, has_judge=True, unanswered=True) for row in first]
    if first and all(faults):
        raise UserError(
            f"{first[0].file}:{first[0].line}: {faults[0]} (and so none of the first {len(first)} "
            "questions could be judged)"
        )


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be honoured."""
    for name in ("batch_questions", "limit"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.language != "auto" and args.prompt_style == "none":
        raise UserError("--language has no meaning without a --prompt-style")
    refuse_overwrite(args.questions, args.output)
    check_sampler_options(args)


def _prompt_facts(args: argparse.Namespace) -> dict[str, str]:
    if args.prompt_style == "none":
        return {}
    return {"prompt_style": args.prompt_style, "language": args.language}


def _read(args: argparse.Namespace, quarantine: Quarantine) -> Rows | Selection:
    rows = read_rows(
        args.questions,
        kind="question",
        quarantine=quarantine,
        image_root=args.image_root,
        limit=args.limit,
    )
    return rows if args.limit is None else rows[: args.limit]


def _print_sample(output: Path, report: SampleReport, config: SamplingConfig) -> None:
    completions = report.sampled * config.n
    print(
        f"{output}: {report.sampled} questions x {config.n} sampled"
        f" ({report.done_before} were there before), {report.tokens / max(1, completions):.1f}"
        f" tokens each, {share(report.cut_off, completions)} cut off at {config.max_tokens}"
    )


def _print_styles(style: str, report: SampleReport) -> None:
    own = {name: count for name, count in report.styles.items() if name != style}
    if style != "none" and own:
        told = ", ".join(f"{name} {count}" for name, count in sorted(own.items()))
        print(f"{sum(own.values())} question(s) asked for a form themselves and kept it: {told}")


COMMAND = Command("sample", "n completions per question, resumable", add_arguments, run)
