"""A user's own reward function: found by its import path, called and checked.

    def shorter_is_better(prompts, completions, *, completion_ids, **columns):
        return [-len(ids) / 1000 for ids in completion_ids]

It is called as TRL's trainers call one, with lists of equal length: `prompts` and `completions`
(lists of messages), `completion_ids` (tokens), every column of the questions (answer, id, ..; None
where a question has none), and also `verdicts` (rewards.Verdict), `clipped` (cut by the length
limit) and `trainer_state`, which is one and no list. TRL's `log_extra` and `log_metric` are not
handed out.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Mapping
from typing import Any

from rewards.functions import BUILT_IN, RewardFunction

SIGNATURE = "(prompts, completions, **columns) -> list[float | None]"
# a column of such a name is not handed on
OURS = ("prompts", "completions", "completion_ids", "verdicts", "clipped", "trainer_state")


class RewardError(ValueError):
    """A reward function gave what cannot be a reward."""


def load_reward(path: str) -> RewardFunction:
    """The function at "package.module:function"; modules of the working directory are found, too.

    Raises ValueError for a path of another form, a module that cannot be imported, a name that it
    lacks, and what cannot be called with TRL's signature.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and name.isidentifier() and all(map(str.isidentifier, module_name.split(".")))):
        near = difflib.get_close_matches(path, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"built in are: {', '.join(BUILT_IN)}"
        raise ValueError(f"reward {path!r} is no import path 'package.module:function'; {hint}")
    module = _import(path, module_name)
    try:
        found = getattr(module, name)  # as `from module import name` does; a module may be lazy
    except AttributeError:
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        where = module.__file__ or module_name
        raise ValueError(f"reward {path!r}: {where} has no {name!r}{hint}") from None
    if fault := _signature_fault(found):
        raise ValueError(f"reward {path!r} {fault}; a reward function is {SIGNATURE}")
    function: RewardFunction = found
    return function


def _import(path: str, module_name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: nothing that is installed is hidden; and what it imports
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == module_name or module_name.startswith(f"{missing}."):
            raise ValueError(
                f"reward {path!r}: there is no module {missing!r}, neither installed nor in {here}"
            ) from None
        reason = f"{module_name} imports {missing!r}, which is not installed"
        raise ValueError(f"reward {path!r}: {reason}") from None
    except ImportError as error:
        raise ValueError(f"reward {path!r}: {module_name} cannot be imported: {error}") from None
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}: {error.msg}"
        raise ValueError(f"reward {path!r}: {module_name} is not Python: {where}") from None


def _signature_fault(found: Any) -> str | None:
    """Why something cannot be called as a reward function, or None."""
    if inspect.isclass(found):
        return "is a class (name a function, or an object that can be called)"
    if not callable(found):
        return f"is a {type(found).__name__} and cannot be called"
    if inspect.iscoroutinefunction(found):
        return "is an async function, which is not supported"
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # of a function written in C
        return "has no signature that can be read"
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return "does not take **columns"
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_ONLY]
    return f"takes {required[0]!r} by position only" if required else None


def check_columns(name: str, function: RewardFunction, columns: Mapping[str, Any]) -> None:
    """Raise ValueError when a function asks for columns that the questions do not have.

    columns: by name, whatever they hold.
    """
    have = set(columns) | set(OURS)
    for parameter in inspect.signature(function).parameters.values():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic and parameter.name not in have:
            raise ValueError(
                f"reward {name!r} asks for {parameter.name!r}, which no question has; there are: "
                f"{', '.join(sorted(have))}"
            )


def call_reward(
    name: str,
    function: RewardFunction,
    columns: Mapping[str, Any],
    number: int,
) -> list[float | None]:
    """Call a function and check what it gives: one number or None for each of `number` completions.

    columns: all its arguments. Raises RewardError, naming the function and the place, for another
    length or type, and for a number that is not finite. What it raises itself comes through.
    """
    try:
        values = function(**columns)
    except Exception as error:
        error.add_note(f"raised by the reward function {name!r}")
        raise
    if not isinstance(values, list | tuple):
        raise RewardError(f"reward {name!r} gave a {type(values).__name__}, not a list")
    if len(values) != number:
        raise RewardError(
            f"reward {name!r} gave {len(values)} values for {number} completions; one each"
        )
    return [_checked(name, index, value) for index, value in enumerate(values)]


def _checked(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real):  # numpy's are; torch's have to be made numbers first
        raise RewardError(
            f"reward {name!r}, value {index}: {value!r} is a {type(value).__name__}; it is a "
            "number (float) or None"
        )
    if not math.isfinite(value):
        raise RewardError(
            f"reward {name!r}, value {index}: {value!r}; say None where it does not apply"
        )
    return float(value)
