"""The command line of cascade."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.doctor.command import COMMAND as DOCTOR
from cascade.run_command import COMMAND as RUN
from internvl.errors import UserError
from internvl.terminal import Command, command_parser, run_command

if TYPE_CHECKING:
    from rewards.judging import Verifier

_ABOUT = "The whole cascade, SFT -> MPO -> GSPO, resumable and evaluated between stages."
_EXAMPLE = """\
example:

  cascade run recipe.yaml               the stages of a recipe, in order
  cascade demo                          the whole on a small world, 12 to 15 minutes on 2 cores
  cascade demo --preset tiny            the same in 2 to 3 minutes, to see that all of it runs
  cascade evaluate heldout.jsonl --model runs/demo/stages/rl --output runs/demo/eval/rl
  cascade report runs/demo              make runs/demo/report.html again

A run that was killed goes on when the same command is started again."""


def _demo(args: argparse.Namespace) -> None:
    from cascade.demo import run_demo

    run = args.output or Path("runs") / ("demo" if args.preset == "demo" else args.preset)
    run_demo(run, seed=args.seed, preset=args.preset, control=args.control, backend=args.backend)


def _world(args: argparse.Namespace) -> None:
    from cascade.tiny import make_tiny_model
    from cascade.world import WorldOptions, WorldSizes, make_world

    options = WorldOptions(**{field.name: vars(args)[field.name] for field in fields(WorldOptions)})
    sizes = {field.name: vars(args)[field.name] for field in fields(WorldSizes)}
    for name, size in sizes.items():
        if size < 0:
            raise UserError(f"--{name} is {size}; give a number of records")
    make_tiny_model(args.output / "model", seed=args.seed, options=options)
    make_world(args.output, seed=args.seed, sizes=WorldSizes(**sizes), options=options)


def _evaluate(args: argparse.Namespace) -> None:
    from cascade.evaluate import EvaluationConfig, evaluate
    from internvl.data import Quarantine, check_images, read_rows
    from internvl.sampler import open_sampler

    for name in ("samples", "max_tokens", "max_tiles"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {vars(args)[name]}; give 1 or more")
    count = dict(_named_text(item) for item in args.count)
    config = EvaluationConfig(args.samples, args.max_tokens, args.max_tiles, args.seed, count)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work: is there a place for it?
    bad_rows = args.output / "quarantine.jsonl"
    bad_rows.unlink(missing_ok=True)  # it tells of this run only
    quarantine = Quarantine(bad_rows, args.max_bad)
    rows = read_rows(
        args.questions, kind="question", quarantine=quarantine, image_root=args.image_root
    )
    with _verifier(args) as verifier:
        good = check_images(rows, quarantine=quarantine, record_fault=verifier.fault)
        sampler = open_sampler(args.model, backend=args.backend, seed=args.seed, dtype=args.dtype)
        with closing(sampler):
            metrics = evaluate(
                good, sampler, config, verifier, model=args.model, output=args.output
            )
    for key, value in metrics.items():
        print(f"{key:>16}  {value:.4f}" if isinstance(value, float) else f"{key:>16}  {value}")


def _verifier(args: argparse.Namespace) -> Verifier:
    from rewards.judging_options import make_verifier

    try:
        return make_verifier(args)
    except ValueError as error:
        raise UserError(str(error)) from None


def _named_text(item: str) -> tuple[str, str]:
    name, separator, text = item.partition("=")
    if not separator or not name or not text:
        raise UserError(f"--count {item!r}: expected NAME=TEXT")
    return name, text


def _report(args: argparse.Namespace) -> None:
    from cascade.report import write_report

    print(write_report(args.run))


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from rewards.judging_options import add_judging

    add = parser.add_argument
    add(
        "questions",
        type=Path,
        help="questions with answers: JSONL, parquet, saved data set or meta.json",
    )
    add("--model", required=True, metavar="CKPT", help="checkpoint folder")
    add("--output", type=Path, required=True, metavar="DIR", help="for metrics and predictions")
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--samples", type=int, default=2, help="completions a question at temperature 1")
    add("--max-tokens", type=int, default=1024, help="of a completion")
    add("--max-tiles", type=int, default=12, help="tile budget of a question whose data names none")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--count", action="append", default=[], metavar="NAME=TEXT",
        help="also report the share of samples that hold TEXT, as NAME")  # fmt: skip
    add("--max-bad", type=float, default=0.05, help="share (<1) or number of bad rows borne")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    _add_backend(parser)
    add_judging(parser)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=("auto", "vllm", "transformers"), default="auto", help="the sampler"
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", choices=("demo", "tiny"), default="demo", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of world, model and sampling (default: 0)")
    add("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/PRESET)")
    add("--control", action="store_true",
        help="also continue SFT on the chosen completions alone, for MPO's steps")  # fmt: skip
    _add_backend(parser)


def _add_world(parser: argparse.ArgumentParser) -> None:
    from cascade.world import WorldOptions, WorldSizes

    parser.add_argument("output", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of charts, answers and weights")
    for field in fields(WorldSizes):
        parser.add_argument(
            f"--{field.name}",
            type=int,
            default=field.default,
            metavar="N",
            help="records of this split (default: %(default)s)",
        )
    told = {
        "operands": "bars in a question, 2 to 4",
        "difference_share": "of the operations; the rest are sums",
        "careless_share": 'of the answers in "mixed"',
        "careless_error": "the largest error of a careless answer",
    }
    for option in fields(WorldOptions):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default),
            default=option.default,
            metavar="N" if isinstance(option.default, int) else "SHARE",
            help=f"{told[option.name]} (default: %(default)s)",
        )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")


_COMMANDS = (
    RUN,
    DOCTOR,
    Command("demo", "the whole cascade on a world made on the spot", _add_demo, _demo),
    Command("evaluate", "accuracy of a checkpoint on held-out questions", _add_evaluate, _evaluate),
    Command("report", "the page of a run", _add_report, _report),
    Command("world", "the demo's world and its untrained model", _add_world, _world),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("cascade", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `cascade --help`."""
    run_command(build_parser(), argv)
