"""Are a run's options options of its commands? Asked before the first of them starts.

`check_options` starts one process, which hands every command line and every configuration to the
parser that will read it in the run; it alone imports the commands (by their names, as a process of
theirs would), and nothing is loaded or written.

    python -m cascade.check_options CHECKS.json     prints {"faults": ..., "options": ...}
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cascade.driver import config_text
from cascade.recipe_stage import TRAINING
from cascade.stages import Stage
from internvl.errors import UserError

_STAGES_PARSER = "training.cli"


@dataclass(frozen=True)
class Checked:
    """What the commands said.

    faults: (recipe's stage, what its command says of its options) for all that cannot be honoured.
    options: every option of each training stage, as its command would use it.
    """

    faults: tuple[tuple[str, str], ...]
    options: Mapping[str, Mapping[str, Any]]


def check_options(stages: Sequence[Stage], env: Mapping[str, str] | None = None) -> Checked:
    """Ask the commands' own parsers, all in one process; env: its environment (default: ours)."""
    with tempfile.TemporaryDirectory(prefix="cascade-check-") as folder:
        checks = []
        for number, stage in enumerate(stages):
            if stage.command[0] != "-m":
                continue  # no command of ours
            check: dict[str, Any] = {"stage": stage.stage, "kind": stage.kind}
            check["words"] = stage.command[1:]
            if stage.kind in TRAINING:
                file = Path(folder) / f"{number}.yaml"
                file.write_text(config_text(stage.config or {}), encoding="utf-8")
                check["config"] = str(file)
            checks.append(check)
        listed = Path(folder) / "checks.json"
        listed.write_text(json.dumps(checks), encoding="utf-8")
        command = [sys.executable, "-m", "cascade.check_options", str(listed)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"the options could not be checked:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Checked(tuple((stage, fault) for stage, fault in found["faults"]), found["options"])


def _examine(check: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(fault, resolved options) of one command."""
    said = io.StringIO()
    options: dict[str, Any] = {}
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if "config" in check:
                _parse_launch(check["words"])
                options = _parse_config(check["kind"], check["config"])
            else:
                _parse_words(check["words"])
    except UserError as error:
        text = " ".join(str(error).split())
        return text.replace(f"{check.get('config')}: ", ""), {}
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1].rpartition("error: ")[2], {}
    return None, options


def _parse_config(kind: str, file: str) -> dict[str, Any]:
    """As `python -m KIND --config FILE` reads it; nothing is made in its output_dir."""
    parsing = importlib.import_module(_STAGES_PARSER)
    config = importlib.import_module(f"{kind}.config")
    types = [vars(config)[f"{kind.upper()}Config"], parsing.ModelArguments]
    parsed = parsing.parse_config(types, f"python -m {kind}", ["--config", file])
    return {field.name: getattr(part, field.name) for part in parsed for field in fields(part)}


def _parse_launch(words: Sequence[str]) -> None:
    """As `accelerate launch` reads its own options, and the file that they name."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(words[1:])
    if args.config_file is not None:
        try:
            load_config_from_file(args.config_file)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"launch.config_file {args.config_file}: {error}") from None


def _parse_words(words: Sequence[str]) -> None:
    """As `python -m TOOL COMMAND ...` reads them, with what the command refuses of itself."""
    tool, *rest = words
    args = importlib.import_module(f"{tool}.cli").build_parser().parse_args(rest)
    own = sys.modules[args.run_command.__module__]
    if hasattr(own, "check_options"):
        own.check_options(args)


def main() -> None:
    """Check what a file lists."""
    checks = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = [(check["stage"], *_examine(check)) for check in checks]
    faults = [(stage, fault) for stage, fault, _ in found if fault is not None]
    options = {stage: options for stage, _, options in found if options}
    print(json.dumps({"faults": faults, "options": options}, default=str))


if __name__ == "__main__":
    main()
