"""python -m rewards: explain: how a verdict came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rewards_command import Capture, fail, run

from rewards.__main__ import main
from rewards.explain.explain import explain


def test_explain_lines(capsys: Capture) -> None:
    told = run(capsys, "explain", "--completion", "3 + 12.\nFinal answer: 15", "--answer", "5")
    assert told.splitlines() == [
        "gold answer   '5'",
        "completion    3 + 12.",
        "              Final answer: ⟦15⟧",
        "final answer  '15', found as final (asked for: auto)",
        "format        followed",
        "options       none given, and none listed by the question",
        "matcher       number: chosen by the gold answer's form",
        "  number      gold '5' read as 5",
        "              answer read as 15",
        "              score 0 (a match from 1 on): no match",
        "others say    cannot judge: choice, box, point",
        "              wrong: exact, vqa, relaxed, anls, math, list",
        "outcome       wrong, decided by number, score 0",
        "reward        0",
    ]


# the command's options, and lines or parts of lines that it prints
EXPLAINED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (
        ("--question", "Which?\nA. Paris\nB. London", "--answer", "B"),
        (
            "question      Which? A. Paris B. London",
            "options       A Paris · B London (listed by the question)",
            "matcher       choice: chosen by the options",
            "  choice      gold 'B' read as option B: London",
            "answer read as no single one of the 2 options",
        ),
    ),
    (
        ("--options", "Paris", "London", "--answer", "London"),
        ("options       A Paris · B London (given)", "gold 'London' read as option B: London"),
    ),
    (
        ("--answer", "May 12, 1999", "--answer", "1999", "--dataset", "DocVQA"),
        (
            "matcher       anls from 0.9 on with the same digits: data set 'DocVQA' fits",
            "of datasets.yaml (DocVQA's ANLS,",
            "score 0.92 (a match from 0.9 on): no match; alike enough, but with other digits: "
            "121998, not 121999",
            "outcome       wrong, decided by anls, score 0.92",
        ),
    ),
    (
        ("--answer", "nine", "--answer", "May 12, 1998", "--dataset", "ours"),
        (
            "matcher       number for 'nine', exact for 'May 12, 1998': the table has nothing for "
            "data set",
            "outcome       correct, decided by exact, score 1",
            "reward        1",
        ),
    ),
    (
        ("--answer", "[[0, 0, 10, 10]]", "--matcher", "box"),
        (
            "  box         gold '[[0, 0, 10, 10]]' read as box 0 0 10 10",
            "answer read as no box and no point",
            "score 0 (a match from 0.5 on): no match",
        ),
    ),
    (
        ("--answer", "9", "--matcher", "choice", "--matcher", "box"),
        (
            "matcher       one of choice, box (in that order): named with the question",
            "outcome       cannot_judge, decided by choice: gold answer '9' is no option letter",
            "reward        none: not judged, so in no pair and no average",
        ),
    ),
]


@pytest.mark.parametrize(("options", "lines"), EXPLAINED)
def test_explain(options: Sequence[str], lines: Sequence[str], capsys: Capture) -> None:
    told = run(capsys, "explain", "--completion", "Final answer: May 12, 1998", *options)
    flat = " ".join(told.split())  # wherever the lines were broken
    for line in lines:
        assert " ".join(line.split()) in flat
    assert "\x1b" not in told
    assert max(map(len, told.splitlines())) <= 100


def test_explain_many_answers(capsys: Capture) -> None:
    """Equal gold answers are one comparison; of many the matches come first."""
    answers = [*("red car",) * 9, *(f"car {number}" for number in range(20)), "Red"]
    golds = [word for answer in answers for word in ("--answer", answer)]
    told = run(
        capsys, *("explain", "--completion", "Final answer: red", "--matcher", "vqa"), *golds
    )
    assert told.count("gold 'red car'") == 1
    assert "gold answer   'red car' or 'car 0' or" in told
    assert told.index("gold 'Red'") < told.index("gold 'red car'")
    assert "and 10 more, which change nothing" in told


def test_explain_what_cannot_be_seen(capsys: Capture) -> None:
    """Escape sequences and halves of a pair reach neither the terminal nor JSON as they are."""
    told = run(capsys, "explain", "--completion", "\x1b[31m I \ud800 \u202e", "--answer", "9")
    assert "\\x1b[31m I \\ud800 \\u202e" in told
    assert "final answer  none: " in told
    assert "outcome       no_answer" in told
    assert "reward        0" in told
    told = run(capsys, "explain", "--completion", "\ud800", "--answer", "9", "--json")
    assert json.loads(told)["completion"] == "\ud800"


def test_explain_mathematics(capsys: Capture) -> None:
    """Both sides are shown as they were parsed, in a process of its own."""
    told = run(
        capsys, "explain", "--completion", r"so \boxed{x^2+1}", "--answer", "1+x^2", "--json"
    )
    found = json.loads(told)
    assert found["span"] == [len(r"so \boxed{"), len(r"so \boxed{x^2+1")]
    (step,) = found["steps"]
    assert (step["matcher"], step["accepted"]) == ("math", True)
    assert step["gold_read"] == step["answer_read"] == "x**2 + 1"
    assert (found["verdict"]["outcome"], found["reward"]) == ("correct", 1.0)
    assert {one["matcher"]: one["outcome"] for one in found["others"]}["exact"] == "wrong"


SPANS = [
    ("Final answer: 9\nI am 99% sure of 9.", "9", (14, 15)),
    ("9 is it. The answer is 9", "9", (23, 24)),
    ("B", "B", (0, 1)),
    (r"<think>\boxed{7}</think> \boxed{7}", "7", (32, 33)),
    ("no idea", "9", None),
]


@pytest.mark.parametrize(("completion", "gold", "span"), SPANS)
def test_explain_span(completion: str, gold: str, span: tuple[int, int] | None) -> None:
    """The place that decides is marked, not the first nor the last that looks like it."""
    assert explain({"answer": gold}, completion).span == span


def test_explain_files(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "completion.txt"
    text.write_text("Final answer: @9", encoding="utf-8")
    told = run(capsys, "explain", "--completion", f"@{text}", "--answer", "@@9")
    assert "gold '@9' read as '@9'" in told
    assert "outcome       correct" in told
    rollouts = tmp_path / "rollouts.jsonl"
    record = {"answer": "9", "completion": "Final answer: 9", "outcome": "wrong", "matcher": "vqa"}
    rollouts.write_text(f"{{}}\n\n{json.dumps(record)}\n", encoding="utf-8")
    # of a verdict, `matcher` is the one that decided, not one that was asked for
    assert "number: chosen by the gold" in run(capsys, "explain", f"{rollouts}:3")
    assert "relaxed: named" in run(capsys, "explain", f"{rollouts}:3", "--matcher", "relaxed")
    table = tmp_path / "mine.yaml"
    table.write_text("- {match: 'mine*', matcher: list, why: 'ours'}", encoding="utf-8")
    told = run(
        capsys, *("explain", "--completion", "Final answer: b, a", "--answer", "a, b"),
        *("--dataset", "Mine-2", "--datasets", str(table)),
    )  # fmt: skip
    assert "list: data set 'Mine-2' fits 'mine*', entry 1 of mine.yaml (ours)" in told
    assert "outcome       correct, decided by list" in told


def test_explain_errors(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "rollouts.jsonl"
    file.write_text('{"completion": "9"}\n[1]\n', encoding="utf-8")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    one = ("--completion", "9", "--answer", "9")
    cases = [
        ([], "give --completion and --answer, or ROLLOUTS.jsonl:LINE"),
        (["--answer", "9"], "give --completion, or ROLLOUTS.jsonl:LINE"),
        (["--completion", "-", "--answer", "-"], "standard input can be read once"),
        ([*one, "--matcher", "psychic"], "argument --matcher: invalid choice: 'psychic'"),
        ([*one, "--style", "loud"], "argument --style: invalid choice: 'loud'"),
        ([*one, "--limit", "0"], "--limit is 0.0; give seconds, above 0"),
        ([*one, "--datasets", str(tmp_path / "none.yaml")], "none.yaml: No such file"),
        ([*one, "--datasets", str(file)], f"{file}:2: not YAML: "),
        (["--completion", f"@{bad}", "--answer", "9"], f"{bad}: not UTF-8 at byte 0"),
        ([f"{file}"], "names no line; write ROLLOUTS.jsonl:LINE, from 1 on"),
        ([f"{file}:0"], "names no line"),
        ([f"{file}:7"], f"{file}:7: the file has no such line"),
        ([f"{file}:1"], f"{file}:1: field 'answer', the gold answer, is missing"),
        ([f"{file}:2"], f"{file}:2: not a JSON object"),
        ([f"{file}:1", *one], "have no meaning with a line"),
    ]
    for argv, message in cases:
        assert message in fail(capsys, "explain", *argv)


def test_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: python -m rewards ")
    assert "\nexample:\n  python -m rewards explain --completion" in told
