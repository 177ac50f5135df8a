"""`cascade run`: its options."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl.errors import UserError
from internvl.terminal import Command

_EXAMPLE = """\
example, recipe.yaml (docs/cascade.md tells every key; paths start from its folder):

  output: runs/mine
  evaluate: {questions: heldout.jsonl}
  gate: {metric: sampled, max_drop: 0.02}
  stages:
    base:   {kind: convert, source: InternVL3-1B}
    pairs:  {kind: pairs, model: base, questions: train.jsonl, sample: {n: 8}}
    mpo:    {kind: mpo, model: base, data: pairs, learning_rate: 2.0e-7}
    select: {kind: select, model: mpo, questions: rl.jsonl}
    rl:     {kind: rl, model: mpo, data: select, max_steps: 400}

  cascade run recipe.yaml --dry-run > all.sh      what it would do, as a shell script
  cascade run recipe.yaml                         stages that are done are not run again
  cascade run recipe.yaml --from mpo              mpo and what needs it, anew

A run that was killed goes on when the same command is started again. Exit codes: 2 an error that
can be mended, 3 a gate closed (a held-out metric fell too far)."""


def _run(args: argparse.Namespace) -> None:
    from cascade.recipe import load_recipe
    from cascade.run import RunOptions, print_plan, run_seed
    from cascade.seeds import run_seeds, seed_folder

    if args.only and args.start is not None:
        raise UserError("--only and --from are both given; give one of the two")
    recipe = load_recipe(args.recipe)
    options = RunOptions(
        extra=tuple(args.extra),
        start=args.start,
        only=tuple(args.only),
        gates=not args.no_gate,
        backend=args.backend,
        overlap=None if args.overlap is None else args.overlap == "on",
    )
    output = args.output or recipe.output or Path("runs") / recipe.name
    if output.name in ("", ".."):
        output = output.resolve()  # a stage's folder must begin with the run's
    many = recipe.many and args.seed is None
    if recipe.many and args.seed is not None and args.output is None:
        output = seed_folder(output, args.seed)
    if args.dry_run:
        for seed in recipe.seeds if args.seed is None else [args.seed]:
            print_plan(recipe, seed_folder(output, seed) if many else output, seed, options)
    elif many:
        run_seeds(recipe, output, options)
    else:
        run_seed(recipe, output, recipe.seeds[0] if args.seed is None else args.seed, options)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLE
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="YAML: the stages, in order")
    add("--output", type=Path, metavar="DIR",
        help="the run's folder (default: the recipe's output, or runs/RECIPE)")  # fmt: skip
    add("--seed", type=int, help="instead of the recipe's seed; of its seeds this one alone")
    add("--from", dest="start", metavar="STAGE",
        help="run this stage and what needs it anew; earlier ones stay as they are")  # fmt: skip
    add("--only", action="append", default=[], metavar="STAGE",
        help="run no other stage; may be given more than once")  # fmt: skip
    add("--with", dest="extra", action="append", default=[], metavar="STAGE",
        help="run this optional stage, too; may be given more than once")  # fmt: skip
    add("--dry-run", action="store_true",
        help="print what would be done, as a shell script; write nothing")  # fmt: skip
    add("--no-gate", action="store_true", help="go on however far a held-out metric fell")
    add("--backend", choices=("auto", "vllm", "transformers"), help="instead of the recipe's")
    add("--overlap", choices=("on", "off"),
        help="evaluations beside the next stage (default: on two cores without a GPU)")  # fmt: skip


COMMAND = Command("run", "the stages of a recipe, resumable", _add, _run)
