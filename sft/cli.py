"""The command line of sft's data tools; the trainer is `accelerate launch -m sft`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from internvl.terminal import Command, command_parser, run_command

_ABOUT = """\
Data for supervised fine-tuning: filter it, look at what was rejected, translate it.
The trainer itself is `accelerate launch -m sft --config FILE.yaml` (`python -m sft --help`)."""
_EXAMPLE = """\
An error is one line, with exit code 2."""
_COMMANDS: tuple[Command, ...] = ()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("sft", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `sft --help`."""
    run_command(build_parser(), argv)
