"""Reading a recipe's YAML: its entries, and what is said of one that is not understood."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from internvl.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: the second would replace the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys the mapping's own replace
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is no name", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


class Entries:
    """A mapping of a recipe, and where it stands: `stages.mpo`, or the top."""

    def __init__(self, file: Path, where: str, entries: Mapping[str, Any]):
        self.file, self.where = file, where
        self.entries = dict(entries)

    def fault(self, key: str, value: object, wanted: str) -> UserError:
        """What is said of an entry that cannot be used."""
        where = f"{self.where}.{key}" if self.where else key
        return UserError(f"{self.file}: {where} is {value!r}; {wanted}")

    def only(self, known: Iterable[str], *, also: Iterable[str] = ()) -> None:
        """Refuse a key that is not known, naming the nearest one that is; also: taken before."""
        known = [*known]
        for key in self.entries:
            if key not in known:
                where = f"{self.where}: " if self.where else ""
                meant = [*known, *also]
                near = _near(str(key), meant, "there are: " + ", ".join(meant))
                raise UserError(f"{self.file}: {where}unknown key {key!r}; {near}")

    def has(self, key: str) -> bool:
        """Whether it is given."""
        return key in self.entries

    def get(self, key: str, default: Any) -> Any:
        """The value as it was read."""
        return self.entries.get(key, default)

    def take(self, key: str, default: Any) -> Any:
        """The value, which is no entry any more."""
        return self.entries.pop(key, default)

    def below(self, where: str, value: object) -> Entries:
        """The entries of a mapping that stands at `where`."""
        return Entries(self.file, where, self._checked(where, value))

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of names; empty where it is not given, or false."""
        value = self.entries.get(key)
        return {} if value is False else self._checked(self._path(key), value)

    def take_mapping(self, key: str) -> dict[str, Any]:
        """The same, taken out of the entries."""
        value = self.mapping(key)
        self.entries.pop(key, None)
        return value

    def spelled(self, sign: str) -> dict[str, Any]:
        """The entries with `sign` between the words of their names, `-` or `_`; each once."""
        found = dict[str, Any]()
        for key, value in self.entries.items():
            name = key.replace("-", sign).replace("_", sign)
            if name in found:
                raise self.fault(key, value, "it stands there in another spelling, too")
            found[name] = value
        return found

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.entries[key]
        if not isinstance(value, str) or not value:
            raise self.fault(key, value, "give a text")
        return value

    def whole(self, key: str, default: int, *, least: int | None = None) -> int:
        """A whole number."""
        value = self.entries.get(key, default)
        if type(value) is not int or (least is not None and value < least):
            bound = "" if least is None else f", {least} or more"
            raise self.fault(key, value, f"give a whole number{bound}")
        return value

    def number(self, key: str, value: object) -> float:
        """A number of 0 or more; YAML reads 1e-2 as a text."""
        try:
            found = float(value) if isinstance(value, int | float | str) else -1.0
        except ValueError:
            found = -1.0
        if isinstance(value, bool) or not 0 <= found < float("inf"):
            raise self.fault(key, value, "give a number, 0 or more")
        return found

    def one_of(self, key: str, value: object, known: Iterable[str], what: str = "") -> str:
        """A known name; what: said of it where it is none."""
        known = [*known]
        if not isinstance(value, str) or value not in known:
            listed = f"there are: {', '.join(known)}" if known else "there is none"
            near = _near(str(value), known, listed)
            raise self.fault(key, value, f"{what}; {near}" if what else near)
        return value

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _checked(self, where: str, value: object) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError(
                f"{self.file}: {where} is {value!r}; expected entries like 'key: value'"
            )
        return value


def _near(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def read_entries(file: Path) -> tuple[str, Entries]:
    """The text of a YAML file and the entries at its top; raises `UserError` naming the file."""
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{file}: expected entries like 'stages: ...', as docs/cascade.md tells")
    return text, Entries(file, "", found)
