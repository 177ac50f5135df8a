"""`cascade compare`: two evaluations of the same questions, and what is none."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import evaluate, files_of, metrics, predictions, questions, refused

from cascade.cli import main


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Evaluations of 30 questions with two seeds, so that some answers differ."""
    file = questions(tmp_path, 30)
    for name, seed in (("a", 1), ("b", 2)):
        evaluate(monkeypatch, file, tmp_path / name, f"--seed={seed}", "--samples=2")
    return tmp_path / "a", tmp_path / "b"


def test_compare(two: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    a, b = two
    capsys.readouterr()
    main(["compare", str(a), str(b), "--output", str(tmp_path / "c"), "--seed=3"])
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    of_a, of_b = predictions(a), predictions(b)
    right = [[r["greedy"]["outcome"] == "correct" for r in records] for records in (of_a, of_b)]
    lost = [r["id"] for r, x, y in zip(of_a, *right, strict=True) if x and not y]
    gained = [r["id"] for r, x, y in zip(of_a, *right, strict=True) if y and not x]
    assert lost and gained
    greedy = found["greedy"]
    assert (greedy["only_a"], greedy["only_b"]) == (len(lost), len(gained))
    n, least = len(lost) + len(gained), min(len(lost), len(gained))
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)
    assert greedy["p"] == pytest.approx(p)
    assert found["sampled"]["a"] == pytest.approx(metrics(a)["sampled"])
    assert found["datasets"]["heldout"]["greedy"] == greedy
    lines = (tmp_path / "c" / "flips.jsonl").read_text().splitlines()
    flips = [json.loads(line) for line in lines]
    assert [one["id"] for one in flips if one["flip"] == "gained"] == gained
    assert [one["id"] for one in flips if one["flip"] == "lost"] == lost
    assert flips[0]["a"]["completion"] != flips[0]["b"]["completion"]
    said = capsys.readouterr().out
    assert f"{len(gained)} question(s) right in B alone: {gained[0]}" in said
    before = files_of(tmp_path / "c")
    main(["compare", str(a), str(b), "--output", str(tmp_path / "c"), "--seed=3"])
    assert files_of(tmp_path / "c") == before


def test_compare_refuses_what_is_not_comparable(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    a, b = two

    def compared(one: Path, other: Path, *words: str) -> str:
        output = str(tmp_path / "c")
        return refused(
            capsys, lambda: main(["compare", str(one), str(other), "--output", output, *words])
        )

    said = compared(a, tmp_path)
    assert f"{tmp_path}: no settings.json there; give the folder of a `cascade evaluate`" in said
    fewer, changed = tmp_path / "fewer", tmp_path / "changed"
    for folder in (fewer, changed):
        shutil.copytree(b, folder)
    lines = (b / "predictions.jsonl").read_text().splitlines(keepends=True)
    (fewer / "predictions.jsonl").write_text("".join(lines[:7] + lines[8:]))
    assert f"question 'q7' of data set 'heldout' is in {a} and not in {fewer}" in compared(a, fewer)
    assert f"is in {a} and not in {fewer}" in compared(fewer, a)
    lines[4] = lines[4].replace('"answer": "24"', '"answer": "25"')
    (changed / "predictions.jsonl").write_text("".join(lines))
    said = compared(a, changed)
    assert "question 'q4' of data set 'heldout' is not the same: its answer is \"24\" in" in said
    file = tmp_path / "heldout.jsonl"
    hot = tmp_path / "hot"
    evaluate(monkeypatch, file, hot, "--temperature=0.5", "--prompts", "as_is", "direct")
    said = compared(a, hot)
    assert "were made with other settings: temperature 1.0 and 0.5." in said
    assert "--allow temperature" in said
    assert "prompt 'as_is' and 'direct'" in compared(hot, hot / "direct")
    assert "--allow colour: there is no such setting" in compared(a, b, "--allow", "colour")
    main(
        [
            "compare",
            str(hot / "direct"),
            str(hot),
            "--output",
            str(tmp_path / "d"),
            "--allow",
            "prompt",
        ]
    )
    found = json.loads((tmp_path / "d" / "compare.json").read_text())
    gap = metrics(hot)["gap"]["direct"]  # the same comparison, as_is against direct
    assert {key: found[key] for key in gap} == gap
