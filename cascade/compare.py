"""Two evaluation folders, question by question: which is better, and which questions flipped.

A/predictions.jsonl, B/predictions.jsonl -> the same questions? the same settings?
    -> compare.json, compare.md, flips.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.comparison import compare_results
from cascade.evaluate import PREDICTIONS, SETTINGS
from cascade.metrics import Result, result_of
from cascade.questions import Key, key_of
from cascade.report_files import read_lines, read_object
from internvl.data import write_json, write_jsonl
from internvl.errors import UserError

# of settings.json, what two evaluations may differ in: the model, and how it was run
OF_THE_MODEL = ("model", "fingerprint", "dtype", "backend", "max_model_len", "seed", "questions")
_SHOWN = 60  # characters of a value that differs


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's folder as it is compared: its settings, and its predictions by question."""

    folder: Path
    settings: dict[str, Any]
    records: dict[Key, dict[str, Any]]

    @property
    def results(self) -> list[Result]:
        """The questions' results, in the order of the file."""
        return [result_of(record) for record in self.records.values()]


def read_evaluation(folder: Path) -> Evaluated:
    """Read what `cascade evaluate` has written; `UserError` for a folder without it."""
    for name in (SETTINGS, PREDICTIONS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name} there; give the folder of a `cascade evaluate` that has ended"
            )
    records = {key_of(record): record for record in read_lines(folder / PREDICTIONS)}
    return Evaluated(folder, read_object(folder / SETTINGS), records)


def check_comparable(a: Evaluated, b: Evaluated, allow: Collection[str] = ()) -> None:
    """Raise `UserError` where settings or questions differ; allow: settings that may.

    Named are the settings, or the first question, that differ. With `prompt` allowed, a question
    may be asked in other words.
    """
    for name in allow:
        if name not in a.settings.keys() | b.settings.keys():
            names = ", ".join(sorted(a.settings))
            raise UserError(f"--allow {name}: there is no such setting; there are: {names}")
    free = {*OF_THE_MODEL, *allow, *(["cot_style"] if "prompt" in allow else [])}
    asked = [name for name in {**a.settings, **b.settings} if name not in free]
    differ = [name for name in asked if a.settings.get(name) != b.settings.get(name)]
    if differ:
        told = "; ".join(
            f"{name} {a.settings.get(name)!r} and {b.settings.get(name)!r}" for name in differ
        )
        raise UserError(
            f"{a.folder} and {b.folder} were made with other settings: {told}. Evaluate both "
            f"alike, or give --allow {' '.join(differ)}"
        )
    fields = ("answer",) if "prompt" in allow else ("question", "answer")
    for key in {**a.records, **b.records}:
        _check_question(key, a, b, fields)


def _check_question(key: Key, a: Evaluated, b: Evaluated, fields: Collection[str]) -> None:
    for one, other in ((a, b), (b, a)):
        if key not in one.records:
            raise UserError(
                f"question {key[1]!r} of data set {key[0]!r} is in {other.folder} and not in "
                f"{one.folder}; evaluate both on the same questions"
            )
    for name in fields:
        values = [json.dumps(e.records[key][name], ensure_ascii=False) for e in (a, b)]
        if values[0] != values[1]:
            raise UserError(
                f"question {key[1]!r} of data set {key[0]!r} is not the same: its {name} is "
                f"{values[0][:_SHOWN]} in {a.folder}, {values[1][:_SHOWN]} in {b.folder}"
            )


def flips(a: Evaluated, b: Evaluated) -> list[dict[str, Any]]:
    """The questions whose greedy answer is right in one evaluation only, in A's order."""
    found = []
    for key, of_a in a.records.items():
        of_b = b.records[key]
        outcomes = [one["greedy"]["outcome"] == "correct" for one in (of_a, of_b)]
        if outcomes[0] != outcomes[1]:
            shown = {
                name: {key: one["greedy"][key] for key in ("outcome", "extracted", "completion")}
                for name, one in (("a", of_a), ("b", of_b))
            }
            asked = {name: of_a[name] for name in ("image", "question", "answer")}
            flip = "gained" if outcomes[1] else "lost"
            found.append({"dataset": key[0], "id": key[1], "flip": flip, **asked, **shown})
    return found


def compare(
    a: Evaluated, b: Evaluated, output: Path, *, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare B with A and write compare.json and flips.jsonl; returns what they hold.

    seed: of the bootstrap.
    """
    found = {
        "a": str(a.folder),
        "b": str(b.folder),
        "seed": seed,
        **compare_results(a.results, b.results, seed),
    }
    flipped = flips(a, b)
    write_jsonl(output / "flips.jsonl", flipped)
    write_json(output / "compare.json", found)
    return found, flipped
