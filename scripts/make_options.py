"""docs/options.md: every option of every command, from the dataclasses and parsers themselves.

python scripts/make_options.py            # writes docs/options.md
python scripts/make_options.py --check    # exit code 1 where the file is not what it would be
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "docs" / "options.md"
TOOLS = ("cascade", "mmpr", "sft", "internvl")
HEAD = """\
# Every option of every command

Made by `python scripts/make_options.py` from the code; `--help` of each command says the same.
A training stage's options are keys of its `--config FILE.yaml` and flags alike. Beside those listed
here, a stage takes all of transformers' TrainingArguments that fit a packed step (the others are
refused by name); `python -m mpo --help` lists them with their defaults.
"""


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    lines += [f"| `{name}` | {default} | {_cell(told)} |" for name, default, told in rows]
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    if value is None or value in ("", argparse.SUPPRESS):
        return ""
    return f"`{_cell(value)}`"


def _field_row(field: Field[Any]) -> tuple[str, str, str]:
    default = field.default
    if default is MISSING:
        made = field.default_factory
        default = "required" if made is MISSING else made()
    told = field.metadata.get("help", "")
    if choices := field.metadata.get("choices"):
        told = f"{told} One of: {', '.join(map(str, choices))}."
    return field.name, "required" if default == "required" else _default(default), told


def _stages() -> Iterator[str]:
    from transformers import TrainingArguments

    from mpo.config import MPOConfig
    from rl.config import RLConfig
    from sft.config import SFTConfig
    from training.arguments import PackedTrainingArguments
    from training.cli import ModelArguments

    theirs = {field.name for field in fields(TrainingArguments)}
    common = {field.name: field.default for field in fields(PackedTrainingArguments)}
    for title, config in (("sft", SFTConfig), ("mpo", MPOConfig), ("rl", RLConfig)):
        own = [
            field
            for field in fields(config)
            if field.name not in common or field.default not in (MISSING, common[field.name])
        ]
        yield f"## python -m {title}\n\n" + _table([_field_row(field) for field in own])
    shared = [field for field in fields(PackedTrainingArguments) if field.name not in theirs]
    yield "## Every training stage\n\n" + _table([_field_row(field) for field in shared])
    yield "## The model of a training stage\n\n" + _table(
        [_field_row(field) for field in fields(ModelArguments)]
    )


def _action_row(action: argparse.Action) -> tuple[str, str, str]:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    told = (action.help or "") % {"default": action.default, "prog": "", **vars(action)}
    if action.choices is not None:
        told = f"{told} One of: {', '.join(map(str, action.choices))}."
    default = "required" if action.required else _default(action.default)
    return name, "" if action.nargs == 0 else default, told


def _tool(module: str, prog: str) -> Iterator[str]:
    parser = import_module(module).build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in subparsers.choices.items():
        rows = [_action_row(a) for a in sub._actions if a.dest != "help"]
        yield f"## {prog} {name}\n\n{_cell(sub.description or '')}\n\n" + _table(rows)


def render() -> str:
    """The whole page."""
    parts = [HEAD, *_stages()]
    for tool in TOOLS:
        parts += _tool(f"{tool}.cli", tool)
    parts += _tool("rewards.__main__", "python -m rewards")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check compare it."""
    page = render()
    if "--check" in sys.argv[1:]:
        if FILE.read_text(encoding="utf-8") != page:
            raise SystemExit(f"{FILE.name} is not of this code: python scripts/make_options.py")
        return
    FILE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
