"""What a check found: its level, a code that the documentation explains, and the cure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]
_ORDER: tuple[Level, ...] = ("error", "warning", "ok")


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    level: "error" is what will stop the run or make its result worthless, "warning" what costs
    something. code: `group.name`, explained in docs/doctor.md. found: what was seen, with numbers.
    where: a file, a stage, an option. cure: a command, or a line to change.

    Example: Finding("error", "data.images", "3 of 200 rows: no such image: a.png", "sft.jsonl",
    "put the files there, or set image_root")
    """

    level: Level
    code: str
    found: str
    where: str = ""
    cure: str = ""

    @property
    def group(self) -> str:
        """The part of the code before the dot."""
        return self.code.partition(".")[0]


def ok(code: str, found: str, where: str = "") -> Finding:
    """A check that went well, with what it saw."""
    return Finding("ok", code, found, where)


def warning(code: str, found: str, where: str = "", *, cure: str) -> Finding:
    """What costs something."""
    return Finding("warning", code, found, where, cure)


def error(code: str, found: str, where: str = "", *, cure: str) -> Finding:
    """What stops the run, or makes its result worthless."""
    return Finding("error", code, found, where, cure)


def worst(findings: Sequence[Finding]) -> Level:
    """The worst level among findings; "ok" where there are none."""
    levels = {finding.level for finding in findings}
    return next((level for level in _ORDER if level in levels), "ok")


def error_codes(findings: Sequence[Finding]) -> set[str]:
    """The codes of the errors among findings."""
    return {finding.code for finding in findings if finding.level == "error"}


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings as JSON."""
    counts: dict[str, int] = {level: sum(f.level == level for f in findings) for level in _ORDER}
    return {"level": worst(findings), **counts, "findings": [asdict(f) for f in findings]}


def some(names: Sequence[object], most: int = 3) -> str:
    """The first few of a list, and how many more there are.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
