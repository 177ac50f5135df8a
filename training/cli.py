"""The command line of a training stage: `accelerate launch -m STAGE --config FILE.yaml [--key v]`.

Built on TRL's parser (dataclasses, a YAML file, flags that override it); what a user can mend
becomes one line and exit code 2.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from internvl.errors import UserError


@dataclass
class ModelArguments:
    """Which model a stage starts from, and how it is trained: whole or by LoRA."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of the InternVL checkpoint to start from (the reference, too)."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters only."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale (alpha / r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Module name endings; by default every linear layer of the LLM."},
    )


class _Parser(TrlParser):
    """TRL's parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse_config(types: Sequence[type], prog: str, argv: Sequence[str] | None = None) -> list[Any]:
    """Parse `--config FILE.yaml` and flags into the dataclasses `types`.

    Raises `UserError` for a missing file, an unknown key (naming the nearest known one) or a value
    of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(types, prog=prog, allow_abbrev=False)
    known = {action.dest for action in parser._actions} | {"env"}
    if "--config" in argv:
        place = argv.index("--config") + 1
        if place == len(argv):
            raise UserError("--config needs the path of a YAML file")
        _check_config(Path(argv[place]), known)
    for flag in argv:
        name = flag.removeprefix("--").split("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in known | {"config"}:
            raise UserError(f"unknown option {flag}{_nearest(name, known)}")
    try:
        return list(parser.parse_args_and_config(argv))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


def _check_config(path: Path, known: set[str]) -> None:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping of options, one 'key: value' a line")
    for key in config:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else " (--help lists the options)"


def peft_config(args: ModelArguments) -> Any:
    """The LoRA configuration that the arguments ask for, or None."""
    if not args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        # a pattern on the module's path: the linear layers inside the language model's blocks
        target_modules=args.lora_target_modules or r".*language_model\.layers\..*_proj",
        task_type="CAUSAL_LM",
    )
