"""The command line of mmpr: thin; each command reads, calls one pure module, writes and reports."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from internvl.terminal import Command, command_parser, run_command
from mmpr import commands
from rewards import STYLES
from rewards.pool import DEFAULT_LIMIT

_ABOUT = "Preference data for MPO and questions for online RL, from questions with gold answers."
_EXAMPLE = """\
example, from questions to a data set that `python -m mpo` and InternVL's own scripts read:

  mmpr sample questions.jsonl --model runs/sft --n 8 --output rollouts.jsonl
  mmpr verify rollouts.jsonl --output verdicts.jsonl
  mmpr pair   verdicts.jsonl --output pairs.jsonl --meta meta.json --name charts
  mmpr select verdicts.jsonl --output rl.jsonl
  mmpr stats  pairs.jsonl

One line of questions.jsonl; "image" (a path, a list of paths, or absent) is relative to the file's
folder or to --image-root, "answer" may be a list of right answers:

  {"id": "q7", "image": "7.png", "question": "<image>\\nHow many bars are red?", "answer": "3"}

Everything that is read may also be parquet (a file, 'folder/train-*.parquet', a folder), a folder
made by datasets.save_to_disk, or a meta.json of several data sets. Images that are bytes there are
written as they are into images/ beside the rollouts, which hold their paths. A data set of the
Hugging Face hub is downloaded first: hf download NAME --repo-type dataset --local-dir DIR.

Rows that cannot be used are put aside with file, line and reason (--quarantine; by default beside
the output), and more of them than --max-bad stop the command.
`mmpr COMMAND --help` tells the rest. An error is one line, with exit code 2."""


def _add_common(parser: argparse.ArgumentParser, *, output: str | None) -> None:
    if output is not None:
        parser.add_argument(
            "--output", type=Path, required=True, metavar="FILE", help=f"the {output} to write"
        )
        parser.add_argument(
            "--quarantine",
            type=Path,
            metavar="FILE",
            help="where unusable rows go, begun anew each time (default: OUTPUT.quarantine.jsonl)",
        )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.05,
        metavar="X",
        help="share (<1) or number (>=1) of bad rows that is borne (default: %(default)s)",
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", type=Path, help="JSONL, parquet, saved data set or meta.json")
    parser.add_argument("--model", required=True, metavar="CKPT", help="checkpoint folder")
    _add_common(parser, output="rollouts")
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


def _add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verdicts", type=Path, help="the verdicts, in any format")
    _add_common(parser, output="pairs")
    add = parser.add_argument
    add("--meta", type=Path, metavar="FILE", help="meta.json to enter the data set in")
    add("--name", metavar="NAME", help="its name there (default: the output's)")
    add("--image-root", type=Path, metavar="DIR", help="where image paths start (for --meta)")
    add("--max-pairs-per-question", type=int, default=15, metavar="N", help="(default: 15)")
    add(
        "--format-negatives",
        choices=("on", "off"),
        default="on",
        help="pairs whose rejected side has no final answer (default: on)",
    )
    add(
        "--max-format-share",
        type=float,
        metavar="X",
        help="the most of all pairs that those may be (default: 0.5)",
    )
    add("--seed", type=int, default=0, help="of the draw (default: 0)")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rollouts", type=Path, help="the rollouts, in any format")
    _add_common(parser, output="verdicts")
    parser.add_argument(
        "--style",
        choices=STYLES,
        default="auto",
        help="how the prompt asked for the final answer (default: auto)",
    )
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes for mathematics, which alone can hang (default: %(default)s, by the cores)",
    )
    add(
        "--limit",
        type=float,
        default=DEFAULT_LIMIT,
        metavar="S",
        help="seconds of one comparison, then its outcome is timeout (default: %(default)s)",
    )


def _add_select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verdicts", type=Path, help="the verdicts, in any format")
    _add_common(parser, output="questions")
    parser.add_argument("--min-accuracy", type=float, default=0.2, help="(default: %(default)s)")
    parser.add_argument("--max-accuracy", type=float, default=0.8, help="(default: %(default)s)")


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="questions, rollouts, verdicts, pairs or meta.json")
    _add_common(parser, output=None)


_COMMANDS = (
    Command("sample", "n completions per question, resumable", _add_sample, commands.run_sample),
    Command("verify", "judge rollouts against the gold answers", _add_verify, commands.run_verify),
    Command("pair", "preference pairs in MMPR's format", _add_pair, commands.run_pair),
    Command("select", "questions for online RL, by accuracy", _add_select, commands.run_select),
    Command("stats", "counts and lengths of a file", _add_stats, commands.run_stats),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("mmpr", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `mmpr --help`."""
    run_command(build_parser(), argv)
