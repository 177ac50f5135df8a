"""`cascade evaluate`: accuracy of a checkpoint on question files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.evaluation_tables import gap_lines, metrics_table, print_rates, summary
from cascade.questions import PROMPT_SETS, REASONING_STYLES, read_questions
from cascade.recipe_stage import METRICS
from internvl.data import Quarantine, check_input
from internvl.data.fingerprint import file_digest
from internvl.errors import UserError
from internvl.sampler_options import add_servers, check_sampler_options, open_asked
from internvl.terminal import Command

# of metrics.json, what is no metric
_OF_AN_EVALUATION = ("n", "k", "name", "model", "prompt", "own_form", "datasets", "prompts", "gap")

if TYPE_CHECKING:
    from cascade.evaluate import EvaluationConfig
    from internvl.sampler import StreamSampler
    from rewards.judging import Verifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cascade evaluate`."""
    from rewards.judging_options import add_judging

    add = parser.add_argument
    add(
        "questions",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="questions with answers: JSONL, CSV, parquet, saved data set, meta.json, or a "
        "benchmark of VLMEvalKit as .tsv",
    )
    add("--model", required=True, metavar="CKPT", help="checkpoint or LoRA adapter, its folder")
    add("--output", type=Path, required=True, metavar="DIR", help="for metrics and predictions; "
        "an evaluation that was killed goes on there")  # fmt: skip
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--dataset", action="append", default=[], metavar="NAME",
        help="only this data set (field dataset, or the file's name); may be repeated")  # fmt: skip
    add("--first", type=int, metavar="N", help="only the first N questions of each data set")
    add(
        "--prompts",
        nargs="+",
        choices=PROMPT_SETS,
        default=["as_is"],
        help="how each question is asked: as it is, for a chain of thought, for the answer at "
        "once; with several, the gap of the first to the others is reported (default: as_is)",
    )
    add("--cot-style", choices=REASONING_STYLES, default="final",
        help="the form that cot asks for (default: %(default)s)")  # fmt: skip
    add("--samples", type=int, default=2, help="completions a question (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="of the samples (default: %(default)s, off)")
    add("--top-k", type=int, default=0, help="of the samples (default: %(default)s, off)")
    add("--max-tokens", type=int, default=1024, help="of a completion (default: %(default)s)")
    add("--max-tiles", type=int, default=12, help="tile budget of a question whose data names none")
    add("--seed", type=int, default=0, help="of the sampling; each question has its own by its id")
    add("--count", action="append", default=[], metavar="NAME=TEXT",
        help="also report the share of samples that hold TEXT, as NAME")  # fmt: skip
    add("--max-bad", type=float, default=0.05, help="share (<1) or number of bad rows borne")
    add("--backend", choices=("auto", "vllm", "transformers"), default="auto", help="the sampler")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    add("--max-model-len", type=int, metavar="N", help="prompt + completion (default: the model's)")
    add_servers(parser)
    add_judging(parser)


def run(args: argparse.Namespace) -> None:
    """`cascade evaluate`."""
    from cascade.evaluate import Evaluation, has_finished_one

    check_options(args)
    config = _config(args)
    for file in args.questions:
        check_input(file)
    facts = _facts(args)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work: is there a place for it?
    bad_rows = args.output / "quarantine.jsonl"
    keep = 0
    if has_finished_one(args.output, config):
        keep = sys.maxsize  # what the sampler refused is told there alone
    else:
        bad_rows.unlink(missing_ok=True)  # it tells of this run only
    quarantine = Quarantine(bad_rows, args.max_bad, keep=keep)
    with _verifier(args) as verifier, ExitStack() as at_the_end:
        rows = read_questions(
            args.questions,
            quarantine=quarantine,
            image_root=args.image_root,
            record_fault=verifier.fault,
            datasets=args.dataset,
            limit=args.first,
        )

        @cache
        def open_once() -> StreamSampler:
            sampler = open_asked(args)
            at_the_end.callback(sampler.close)
            return sampler

        evaluation = Evaluation(rows, config, facts, verifier, open_once, quarantine, args.output)
        metrics, pace = evaluation.run()
    (args.output / "summary.md").write_text(summary(metrics), encoding="utf-8")
    _tell(metrics, config.count)
    if pace.tokens:
        print(f"{pace.tokens:,} tokens in {pace.seconds:,.0f} s: {pace.rate:,.0f} a second")
    if bad_rows.exists():
        with bad_rows.open("rb") as lines:
            print(f"{sum(1 for _ in lines)} bad row(s) put aside in {bad_rows}")


def check_options(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that cannot be honoured; nothing is read for it."""
    for name in ("samples", "max_tokens", "max_tiles", "first"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more")
    if len(set(args.prompts)) < len(args.prompts):
        raise UserError(f"--prompts {' '.join(args.prompts)}: name each set once")
    if args.cot_style != "final" and "cot" not in args.prompts:
        raise UserError("--cot-style has no meaning without --prompts cot")
    if args.temperature == 0:
        raise UserError(
            "--temperature is 0; the greedy answers are reported in any case, and the samples "
            "need a temperature above 0"
        )
    check_sampler_options(args)
    _config(args).sampling()


def _counted(items: Sequence[str]) -> dict[str, str]:
    """{name: text} of --count; a metric's own name would stand for another number."""
    found: dict[str, str] = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator or not name or not text:
            raise UserError(f"--count {item!r}: expected NAME=TEXT")
        if name in found:
            raise UserError(f"--count {item!r}: {name} is given twice")
        if name in (*METRICS, *_OF_AN_EVALUATION) or "@" in name or name.endswith(("_ci", "_se")):
            raise UserError(f"--count {item!r}: {name} is a metric's name; choose another one")
        found[name] = text
    return found


def _config(args: argparse.Namespace) -> EvaluationConfig:
    from cascade.evaluate import EvaluationConfig

    return EvaluationConfig(
        args.samples,
        args.max_tokens,
        args.max_tiles,
        args.seed,
        args.temperature,
        args.top_p,
        args.top_k,
        tuple(args.prompts),
        args.cot_style,
        _counted(args.count),
    )


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What predictions depend on besides questions and sampling: the model, and how is judged."""
    from internvl.hashing import model_fingerprint

    return {
        "model": args.model,
        "fingerprint": model_fingerprint(args.model),
        "dtype": "the servers'" if args.server else args.dtype,
        "max_model_len": args.max_model_len,
        "style": args.style,
        "matchers": None if args.datasets is None else file_digest(args.datasets),
        "judge": None if args.judge_model is None else f"{args.judge_model} {args.judge_when}",
    }


def _verifier(args: argparse.Namespace) -> Verifier:
    from rewards.judging_options import make_verifier

    try:
        return make_verifier(args)
    except ValueError as error:
        raise UserError(str(error)) from None


def _tell(metrics: dict[str, Any], count: dict[str, str]) -> None:
    """The metrics on the terminal: a table for each prompt set, then what goes into no table."""
    for prompt, own in metrics.get("prompts", {metrics["prompt"]: metrics}).items():
        title = f"{own['name']}, prompts {prompt}, in percent (95%)"
        print_rates(title, metrics_table(own, narrow=True))
        for name in (*count, "chain_correct", "unjudged"):
            if own.get(name) is not None and (own[name] or name != "unjudged"):
                print(f"{name}: {100 * own[name]:.1f}%")
        if own["own_form"]:
            print(f"{own['own_form']:,} question(s) ask for a form themselves and kept it")
    for line in gap_lines(metrics):
        print(line)


COMMAND = Command("evaluate", "accuracy of a checkpoint on held-out questions", add_arguments, run)
