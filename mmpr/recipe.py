"""A recipe of `mmpr build`: one YAML file, its sections the options of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from internvl.errors import UserError
from internvl.terminal import Command

_PATHS = ("questions", "model", "output", "image-root")
_TOP = (*_PATHS, "name", "seed", "max-bad")
_OURS = (*_TOP, "meta", "quarantine")  # set for all sections together, or by the build itself
_LATER = {  # a build writes MMPR's files; what is made of them is a command of its own
    "format": "mmpr export",
    "embed-images": "mmpr export",
    "fix": "mmpr check --fix",
}


@dataclass(frozen=True)
class Recipe:
    """What is to be built.

    questions, model, output: paths (relative ones start from the recipe's folder). name: of the
    data set in meta.json. sections: options by command; None for a command that is not run.
    """

    file: Path
    questions: Path
    model: str
    output: Path
    name: str
    seed: int
    max_bad: float
    image_root: Path | None
    sections: Mapping[str, Mapping[str, Any] | None]

    def arguments(self, command: Command, fixed: Sequence[str]) -> argparse.Namespace:
        """A command's options as its own command line would read them; fixed: what the build says.

        Raises UserError, naming the recipe and the section, for options that are none.
        """
        prog = f"{self.file}: {command.name}"
        parser = _SectionParser(prog=prog, allow_abbrev=False, add_help=False)
        parser.folder = self.file.parent
        command.add_arguments(parser)
        given: list[str] = []
        for key, value in (self.sections[command.name] or {}).items():
            given += parser.option(key, value)
        return parser.parse_args([*fixed, *given])


class _SectionParser(argparse.ArgumentParser):
    """Reads a section's entries as a command line would say them; paths start from `folder`."""

    folder = Path()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")

    def option(self, key: str, value: object) -> list[str]:
        """The words of one entry; a bare option is true or false, `off` is not false elsewhere."""
        name = f"--{key}"
        action = self._option_string_actions.get(name)
        if action is None:
            self.error(f"unknown option {key}")
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{key} is {value!r}; give true or false")
            return [name] if value else []
        if action.type is Path:
            if not isinstance(value, str):
                self.error(f"{key} is {value!r}; give a path")
            value = self.folder / Path(value).expanduser()
        if isinstance(value, bool):  # YAML reads on and off, yes and no
            return [name, "on" if value else "off"]
        if isinstance(value, list):
            if isinstance(action, argparse._AppendAction):
                return [f"{name}={item}" for item in value]
            return [name, *map(str, value)]
        return [f"{name}={value}"]


def read_recipe(file: Path, commands: Sequence[str], *, output: Path | None = None) -> Recipe:
    """Read a recipe; commands: the sections that it may have. output: instead of its own.

    A section may be left out (the command runs with its defaults), but dropout, which is run only
    where it has a section; `false` switches a command off.
    Raises UserError, naming file and entry, for what is not understood.
    """
    top = _mapping(file)
    allowed = [*_TOP, *commands]
    if unknown := [str(key) for key in top if key not in allowed]:
        raise UserError(f"{file}: unknown {', '.join(unknown)}; there are: {', '.join(allowed)}")
    paths = {key: _path(file, top, key) for key in _PATHS}
    if output is not None:
        paths["output"] = output
    for key in ("questions", "model", "output"):
        if paths[key] is None:
            raise UserError(f"{file}: {key} is missing")
    questions, model, out = paths["questions"], paths["model"], paths["output"]
    assert questions is not None and model is not None and out is not None
    return Recipe(
        file=file,
        questions=questions,
        model=str(model),
        output=out,
        name=_typed(file, top, "name", str, out.name),
        seed=_typed(file, top, "seed", int, 0),
        max_bad=float(_typed(file, top, "max-bad", (int, float), 0.05)),
        image_root=paths["image-root"],
        sections={command: _section(file, top, command) for command in commands},
    )


def _mapping(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected entries like `questions: questions.jsonl`")
    return found


def _typed(file: Path, top: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = top.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{file}: {key} is {value!r}")
    return value


def _path(file: Path, top: Mapping[str, Any], key: str) -> Path | None:
    value = _typed(file, top, key, (str, type(None)), None)
    return None if value is None else file.parent / Path(value).expanduser()


def _section(file: Path, top: Mapping[str, Any], command: str) -> Mapping[str, Any] | None:
    section = top.get(command, False if command == "dropout" else {})
    if section is False:
        return None
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise UserError(f"{file}: {command} is {section!r}; give its options, or false")
    for key in section:
        if key in _OURS:
            raise UserError(f"{file}: {command}: {key} is set at the top, or by the build itself")
        if key in _LATER:
            raise UserError(
                f"{file}: {command}: {key} is not for a build; `{_LATER[key]}` reads its meta.json"
            )
    return section
