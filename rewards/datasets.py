"""The table that chooses matchers by data set: data (datasets.yaml) that a user can extend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import Any

from rewards.match import get_matcher

BUILT_IN = Path(__file__).with_name("datasets.yaml")
KEYS = ("match", "matcher", "least", "same_digits", "why")
REQUIRED = ("match", "matcher", "why")
LONGEST_NAME = 300  # nobody calls a data set by more; bounds the work on hostile rows
_REMEMBERED = 1024  # names


@dataclass(frozen=True)
class DatasetEntry:
    """How the rows of some data sets are judged.

    patterns: globs over the case-folded name. matchers: their names; one that accepts is enough.
    least: the least score that is a match, None for the matcher's own. same_digits: both answers
    must hold the same digits. why: the source. file, number: where it stands (from 1).
    """

    patterns: tuple[str, ...]
    matchers: tuple[str, ...]
    why: str
    least: float | None = None
    same_digits: bool = False
    file: str = ""
    number: int = 0
    _forms: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        forms = "|".join(translate(pattern.casefold()) for pattern in self.patterns)
        object.__setattr__(self, "_forms", re.compile(forms))

    def fits(self, name: str) -> bool:
        """Whether a data set's name, case-folded already, is one of these."""
        return self._forms.match(name) is not None


class DatasetTable:
    """Entries in order; the first whose pattern fits a name decides."""

    def __init__(self, entries: Iterable[DatasetEntry]):
        self.entries = tuple(entries)
        self._known: dict[str, DatasetEntry | None] = {}

    def find(self, name: str) -> DatasetEntry | None:
        """The entry for a data set, or None.

        >>> load_table().find("ChartQA_trainval_30k").matchers
        ('relaxed',)
        """
        if name in self._known:
            return self._known[name]
        if len(name) > LONGEST_NAME:
            return None
        folded = name.casefold()
        entry = next((entry for entry in self.entries if entry.fits(folded)), None)
        if len(self._known) < _REMEMBERED:
            self._known[name] = entry
        return entry


def load_table(path: Path | None = None) -> DatasetTable:
    """The built-in table, with a user's file before it, if one is given.

    Raises ValueError for a file that is not such a table, naming the file, the entry and the
    value; OSError when it cannot be read.
    """
    if path is None:
        return _built_in()
    return DatasetTable((*read_entries(path), *_built_in().entries))


@cache
def _built_in() -> DatasetTable:
    return DatasetTable(read_entries(BUILT_IN))


def read_entries(path: Path) -> list[DatasetEntry]:
    """The entries of a file; raises ValueError for a file that is not whole."""
    found = _read_yaml(path)
    if not isinstance(found, list) or not found:
        raise ValueError(
            f"{path}: holds {_kind(found)}, not a list of entries; for each data set, write "
            "`- match: .., matcher: .., why: ..`"
        )
    return [_entry(path, number, item) for number, item in enumerate(found, 1)]


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that refuses a key given twice, of which it would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {twice[0]!r} is given twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    try:
        text = path.read_text(encoding="utf-8")
        return yaml.load(text, Loader)  # a SafeLoader: plain data only
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {told}") from None


def _entry(path: Path, number: int, item: Any) -> DatasetEntry:
    """One entry, checked."""
    if not isinstance(item, dict):
        raise ValueError(f"{path}: entry {number} is {_kind(item)}, not a mapping: {item!r}")
    where = f"{path}: entry {number} (match: {item.get('match')!r})"
    if missing := [key for key in REQUIRED if key not in item]:
        raise ValueError(f"{where} lacks {' and '.join(repr(key) for key in missing)}")
    if unknown := [key for key in item if key not in KEYS]:
        raise ValueError(f"{where}: key {unknown[0]!r} is unknown; one of: {', '.join(KEYS)}")
    patterns = _texts(where, "match", item["match"])
    matchers = _texts(where, "matcher", item["matcher"])
    for name in matchers:
        try:
            get_matcher(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    why = item["why"]
    if not isinstance(why, str) or not why.strip():
        raise ValueError(f"{where}: why is {why!r}; give one line of text")
    same_digits = item.get("same_digits", False)
    if not isinstance(same_digits, bool):
        raise ValueError(f"{where}: same_digits is {same_digits!r}; give true or false")
    least = _least(where, item.get("least"))
    return DatasetEntry(patterns, matchers, why.strip(), least, same_digits, str(path), number)


def _texts(where: str, key: str, value: Any) -> tuple[str, ...]:
    texts: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(f"{where}: {key} is {value!r}; give a text or a list of texts")
    return tuple(texts)


def _least(where: str, least: Any) -> float | None:
    if least is None:
        return None
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 < least <= 1:
        raise ValueError(f"{where}: least is {least!r}; give a score above 0 and up to 1")
    return float(least)


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")
