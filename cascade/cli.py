"""The command line of cascade."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from cascade.compare_command import COMMAND as COMPARE
from cascade.doctor.command import COMMAND as DOCTOR
from cascade.evaluate_command import COMMAND as EVALUATE
from cascade.run_command import COMMAND as RUN
from cascade.split import COMMAND as SPLIT
from internvl.errors import UserError
from internvl.terminal import Command, command_parser, run_command

_ABOUT = "The whole cascade, SFT -> MPO -> GSPO, resumable and evaluated between stages."
_EXAMPLE = """\
example:

  cascade run recipe.yaml               the stages of a recipe, in order
  cascade demo                          the whole on a small world, 12 to 15 minutes on 2 cores
  cascade demo --preset tiny            the same in 2 to 3 minutes, to see that all of it runs
  cascade evaluate heldout.jsonl --model runs/demo/stages/rl --output runs/demo/eval/rl
  cascade compare eval/sft eval/mpo --output eval/mpo-sft     question by question
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


def _report(args: argparse.Namespace) -> None:
    from cascade.report import write_report

    print(write_report(args.run))


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
    Command("demo", "the whole cascade on a world made on the spot", _add_demo, _demo),
    EVALUATE,
    COMPARE,
    Command("report", "the page of a run", _add_report, _report),
    DOCTOR,
    SPLIT,
    Command("world", "the demo's world and its untrained model", _add_world, _world),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("cascade", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `cascade --help`."""
    run_command(build_parser(), argv)
