"""The command line of sft's data tools; the trainer is `accelerate launch -m sft`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from internvl.terminal import command_parser, run_command
from sft.data_tools import filter, review, translate

_ABOUT = """\
Data for supervised fine-tuning: filter it, look at what was rejected, translate it.
The trainer itself is `accelerate launch -m sft --config FILE.yaml` (`python -m sft --help`)."""
_EXAMPLE = """\
example, rules first, then a model's scores, then a look at what was rejected:

  sft filter conversations.jsonl --output kept.jsonl
  export OPENAI_API_KEY=none                      # any text for a local server
  sft filter conversations.jsonl --output kept.jsonl \\
      --base-url http://localhost:8000/v1 --model Qwen2.5-72B-Instruct
  sft review kept.jsonl.rejected.jsonl --output rejected.html     # saves accepted.jsonl
  sft filter ... the same ... --accept accepted.jsonl
  sft translate kept.jsonl --language Chinese --output zh.jsonl --base-url ... --model ...

Beside kept.jsonl lie kept.jsonl.rejected.jsonl (with reasons), .undecided.jsonl (no answer came),
.quarantine.jsonl (unusable rows), .summary.json and .replies.sqlite. A run that was killed, and one
with undecided rows, is started again by the same command: no answer is asked for twice.
`sft COMMAND --help` tells the rest. An error is one line, with exit code 2."""
_COMMANDS = (filter.COMMAND, review.COMMAND, translate.COMMAND)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("sft", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `sft --help`."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        parser.error(f"{words[0]}: the trainer is `python -m sft` or `accelerate launch -m sft`")
    run_command(parser, words)
