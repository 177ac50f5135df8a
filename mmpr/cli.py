"""The command line of mmpr; each command is a file of mmpr/commands/."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from internvl.terminal import command_parser, run_command
from mmpr.commands import build, check, dropout, export, pair, sample, select, stats, verify, view

_ABOUT = "Preference data for MPO and questions for online RL, from questions with gold answers."
_EXAMPLE = """\
example, from questions to a data set that `python -m mpo` and InternVL's own scripts read:

  mmpr sample questions.jsonl --model runs/sft --n 8 --output rollouts.jsonl
  mmpr verify rollouts.jsonl --output verdicts.jsonl
  mmpr pair   verdicts.jsonl --output pairs.jsonl --meta meta.json --name charts
  mmpr select verdicts.jsonl --output rl.jsonl
  mmpr stats  pairs.jsonl
  mmpr view   pairs.jsonl --output pairs.html

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


_COMMANDS = (
    build.COMMAND,
    sample.COMMAND,
    verify.COMMAND,
    pair.COMMAND,
    dropout.COMMAND,
    check.COMMAND,
    export.COMMAND,
    select.COMMAND,
    stats.COMMAND,
    view.COMMAND,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("mmpr", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `mmpr --help`."""
    run_command(build_parser(), argv)
