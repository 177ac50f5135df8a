"""The command line of a training stage: `accelerate launch -m STAGE --config FILE.yaml [--key v]`.

Built on TRL's parser (dataclasses, a YAML file, flags that override it); what a user can mend
becomes one line and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from internvl.adapters import is_adapter
from internvl.errors import UserError
from training.arguments import PackedTrainingArguments
from training.quantising import check_four_bit

# patterns on the paths of the linear layers in a part's blocks
LINEAR_LAYERS = {
    "llm": r"language_model\.layers\..*_proj",
    "vit": r"vision_tower\.encoder\.layer\..*(_proj|\.projection_layer|\.fc1|\.fc2)",
}


@dataclass
class ModelArguments:
    """Which model a stage starts from, and how it is trained: whole or by LoRA."""

    model_name_or_path: str = field(
        metadata={
            "help": "Folder to start from (the reference, too): an InternVL checkpoint, or an "
            "adapter that an earlier stage trained, beside use_peft."
        }
    )
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters only."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale (alpha / r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_parts: list[str] = field(
        default_factory=lambda: ["llm"],
        metadata={"help": "Every linear layer of these gets an adapter: llm, vit, or both."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Instead of lora_parts: endings of modules' names, in any part."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained whole and saved beside the adapter; the projector is "
            "multi_modal_projector."
        },
    )

    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: hold the LLM's linear layers in 4 bits under the adapter (needs "
            "bitsandbytes, the extra 'qlora'); vision tower and projector stay as they are."
        },
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "4-bit numbers.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the 4-bit scales, too."}
    )

    def __post_init__(self) -> None:
        """Refuse LoRA's options where no LoRA was asked for, and parts that are none."""
        check_four_bit(self.load_in_4bit, self.use_peft, self.dtype)
        if not self.load_in_4bit and (
            self.bnb_4bit_quant_type != "nf4" or self.use_bnb_nested_quant
        ):
            raise UserError("bnb_4bit_quant_type, use_bnb_nested_quant: load_in_4bit is not set")
        if unknown := set(self.lora_parts) - set(LINEAR_LAYERS):
            raise UserError(f"lora_parts names {sorted(unknown)}; its values are llm and vit")
        if not self.lora_parts:
            raise UserError("lora_parts is empty; leave it out, or give llm, vit or both")
        if self.lora_target_modules and self.lora_parts != ["llm"]:
            raise UserError("lora_parts and lora_target_modules are both given; give one")
        for option in fields(self):
            default = ["llm"] if option.name == "lora_parts" else option.default
            given = getattr(self, option.name) != default
            if option.name.startswith("lora_") and given and not self.use_peft:
                raise UserError(f"{option.name} is given, but use_peft is not")
            if option.name.startswith("lora_") and given and self.goes_on:
                raise UserError(
                    f"{option.name} is given, but {self.model_name_or_path} is an adapter with "
                    "settings of its own, which is trained on"
                )
        if self.goes_on and not self.use_peft:
            raise UserError(
                f"{self.model_name_or_path} is an adapter: set use_peft to train it on, or make a "
                f"whole model of it and its base: internvl merge {self.model_name_or_path} OUT"
            )

    @property
    def goes_on(self) -> bool:
        """Whether an earlier stage's adapter is trained on."""
        return is_adapter(self.model_name_or_path)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, the example as it is written, and one spelling of each option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [name for name in action.option_strings if "-" not in name[2:]]
        name = ", ".join(spellings if action.dest == "help" else spellings[:1])
        return name if action.nargs == 0 else f"{name} VALUE{' ...' if action.nargs == '+' else ''}"


class _Parser(TrlParser):
    """TRL's parser whose complaints are one line, and whose help puts our own options first."""

    def __init__(self, types: Sequence[type], prog: str, about: str, example: str):
        super().__init__(
            types,
            prog=prog,
            usage=f"{prog} --config FILE.yaml [--key value ...]",
            description=about,
            epilog=example,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self._group_by_origin(types)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def _group_by_origin(self, types: Sequence[type]) -> None:
        """Sort the options into help sections: the stage's own, every stage's, transformers'."""
        theirs = {field.name for field in fields(TrainingArguments)}
        common = {field.name for field in fields(PackedTrainingArguments)} - theirs
        model = {field.name for field in fields(ModelArguments)}
        titles = ["options of this stage", "options of every stage", "the model"]
        titles.append("options of transformers' TrainingArguments")
        groups = [self.add_argument_group(title) for title in titles]
        for action in self._actions:
            if action.dest in model:
                place = 2
            elif action.dest in theirs:
                place = 3
            else:
                place = 1 if action.dest in common else 0
            groups[place]._group_actions.append(action)
        self._action_groups = groups


def parse_config(
    types: Sequence[type],
    prog: str,
    argv: Sequence[str] | None = None,
    *,
    about: str = "",
    example: str = "",
) -> list[Any]:
    """Parse `--config FILE.yaml` and flags into the dataclasses `types`.

    about, example: what --help says first and last. Raises `UserError` for a missing file, an
    unknown key (naming the nearest known one), a value of the wrong type or an impossible option.
    """
    argv = _config_apart(sys.argv[1:] if argv is None else argv)
    parser = _Parser(types, prog, about, example)
    known = {action.dest: action for action in parser._actions if action.nargs != 0}
    names = {action.dest for action in parser._actions} | {"env"}
    if "--config" in argv:
        place = argv.index("--config") + 1
        if place == len(argv):
            raise UserError("--config needs the path of a YAML file")
        _check_config(Path(argv[place]), known, names)
    for flag in argv:
        name = flag.removeprefix("--").split("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in names | {"config"}:
            raise UserError(f"unknown option {flag}{_nearest(name, names)}")
    try:
        parsed = list(parser.parse_args_and_config(argv))
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None
    _check_together(parsed)
    return parsed


def _check_together(parsed: Sequence[Any]) -> None:
    """Refuse a part to be frozen and adapted, or trained and not, before a model is loaded."""
    stage = next((args for args in parsed if isinstance(args, PackedTrainingArguments)), None)
    model = next((args for args in parsed if isinstance(args, ModelArguments)), None)
    if stage is None or model is None or not model.use_peft or model.lora_target_modules:
        return  # names of modules are looked at when the adapter is on the model
    for part in model.lora_parts:
        if getattr(stage, f"freeze_{part}"):
            cause = (
                f"the stage freezes the {part}" if stage.asked_parts else f"freeze_{part} is set"
            )
            raise UserError(f"{cause}, but lora_parts has {part}")
    if model.lora_modules_to_save or model.goes_on:
        return
    for part in stage.asked_parts:
        if part not in model.lora_parts:
            name = f"{part} in lora_parts"
            if part == "projector":
                name = "multi_modal_projector in lora_modules_to_save"
            raise UserError(
                f"the stage trains the {part}, but the adapter has nothing of it: name {name}, or "
                "leave the stage out"
            )


def _config_apart(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config=FILE`, which TRL's parser would not read, as two words."""
    out: list[str] = []
    for word in argv:
        out += word.split("=", 1) if word.startswith("--config=") else [word]
    return out


def _check_config(path: Path, known: dict[str, argparse.Action], names: set[str]) -> None:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping of options, one 'key: value' a line")
    for key, value in config.items():
        if key not in names:
            raise UserError(f"{path}: unknown key {key!r}{_nearest(str(key), names)}")
        if key in known and (wanted := _value_fault(known[key], value)):
            raise UserError(f"{path}: {key} is {value!r}; {wanted}")


def _value_fault(action: argparse.Action, value: object) -> str | None:
    """What a YAML value should have been, or None: argparse converts strings only, and trusts."""
    if value is None:
        return None if action.default is None else "leave the line out to take the default"
    if action.choices is not None and value not in action.choices:
        if value is False and "no" in action.choices:
            return 'YAML reads a bare no as false, write "no" with its quotes'
        return f"not one of its values{_nearest(str(value), set(map(str, action.choices)))}"
    if not callable(action.type) or (isinstance(action.type, type) and action.type not in _NUMBERS):
        return None  # paths and names, also the options that may be one, a list or a mapping
    many = action.nargs == "+"
    if many != isinstance(value, list):
        return "expected a list" if many else "expected one value"
    for item in value if isinstance(value, list) else [value]:
        try:
            action.type(str(item))
        except argparse.ArgumentTypeError:
            return "expected true or false"
        except (ValueError, TypeError):
            return f"expected {_NUMBERS.get(action.type, 'another type of value')}"
    return None


_NUMBERS: dict[object, str] = {int: "a whole number", float: "a number"}


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else " (--help lists the options)"


def peft_config(args: ModelArguments) -> Any:
    """The configuration of the new LoRA that the arguments ask for, or None."""
    if not args.use_peft or args.goes_on:
        return None
    from peft import LoraConfig

    layers = "|".join(LINEAR_LAYERS[part] for part in args.lora_parts)
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or f".*({layers})",
        modules_to_save=args.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )
