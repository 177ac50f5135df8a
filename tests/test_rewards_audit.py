"""python -m rewards: audit: likely mistakes in a file of rollouts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rewards_command import Capture, fail, run

from rewards import MATCHERS, Outcome, Task, Verdict
from rewards.audit.audit import MOST_EXAMPLES, audit
from rewards.audit.findings import KINDS, find, wants_math
from rewards.audit.rollouts import Rollout, parse_line

FORMAT = "I look at the picture.\n"


def rows_of(dataset: str, gold: Any, completion: str, n: int = 1, **fields: Any) -> list[Any]:
    return [{"dataset": dataset, "answer": gold, "completion": FORMAT + completion, **fields}] * n


# rows, then the one finding that they give: kind, pattern; None for no finding
FINDINGS: list[tuple[list[Any], tuple[str, str] | None]] = [
    (rows_of("own", "Jean-Paul Sartre", "Final answer: Jean Paul Sartre"),
     ("false negative", "wrong by exact, vqa accepts")),
    (rows_of("own", "red", "Final answer: a red car", matcher="vqa"),
     ("false negative", "wrong by vqa, though the gold answer stands in it")),
    (rows_of("own", "New York City", "Final answer: New York"),
     ("false negative", "wrong by exact, though the answer stands in the gold one")),
    (rows_of("own", "9", "I count 9 of them"),
     ("false negative", "no answer found, though the gold answer stands in the last line")),
    (rows_of("own", "B", "it is B\nthat much is plain\n"),
     ("false negative", "no answer found, though the gold answer stands in the last three lines")),
    (rows_of("own", "0.5", r"Final answer: \sqrt{1/4}"),
     ("false negative", "wrong by number, math accepts")),
    (rows_of("chartqa", "1137", "Final answer: 1164"),
     ("false positive", "correct by relaxed, number reads another number")),
    (rows_of("own", "x < 3", "Final answer: x > 3", matcher="vqa"),
     ("false positive", "correct by vqa, other signs")),
    (rows_of("own", "May 12, 1998", "Final answer: May 12, 1999", matcher="anls"),
     ("false positive", "correct by anls, other digits")),
    (rows_of("own", "9", "and then, on and on", finish_reason="length"),
     ("cut off", "no final answer, and no room for one")),
    (rows_of("own", "9 of them", "Final answer: 9", matcher="box"),
     ("not judged", "cannot judge by box: gold answer … is no box")),
    (rows_of("own", "9", "Final answer: 9", outcome="wrong", matcher="exact"),
     ("changed", "stored as wrong, now correct by number")),
    (rows_of("own", "9", "Final answer: 9", outcome="correct", matcher="exact"), None),
    (rows_of("own", "5", "Final answer: 15"), None),
    (rows_of("own", "5", "Final answer: 5.5"), None),
    (rows_of("own", "9", "nothing to be seen"), None),
    (rows_of("own", "A", "A red bar is what I see"), None),
    (rows_of("own", "red", "Final answer: blue"), None),
    (rows_of("docvqa", "1234567890", "Final answer: 7"), None),
    (rows_of("sroie", {"total": "9.00"}, 'Final answer: {"total": "9.00"}'), None),
]  # fmt: skip


ANY_TEXT = st.text(max_size=40) | st.sampled_from(
    ["9**9**9", "(" * 999, "\ud800", "A or B", "-3,5"]
)


@settings(max_examples=150, deadline=None)
@given(gold=ANY_TEXT, answer=ANY_TEXT, name=st.sampled_from([*MATCHERS]))
def test_any_text_can_be_audited(gold: str, answer: str, name: str) -> None:
    """No text raises, a finding has a kind and a likelihood, and equal texts give none."""
    task = Task(f"Final answer: {answer}", (gold,), (name,), ("Paris", "London"))
    for outcome in Outcome:
        text = None if outcome == Outcome.NO_ANSWER else answer
        score = 1.0 if outcome == Outcome.CORRECT else 0.0
        verdict = Verdict(outcome, text, name, score, True, f"gold answer {gold!r} is none")
        for finding in find({}, task, verdict, "correct"):
            assert finding.kind in KINDS
            assert 0 < finding.likelihood <= 1
            assert finding.kind != "false positive" or gold != answer
        assert wants_math(task, verdict) in (True, False)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_audit_findings(tmp_path: Path) -> None:
    """Each pattern by itself, and nothing of verdicts that are as they should be."""
    for number, (rows, finding) in enumerate(FINDINGS):
        report = audit([write(tmp_path / f"{number}.jsonl", rows)])
        found = [(group.kind, group.pattern) for group in report.groups.values()]
        assert report.rows == 1, rows
        assert len(found) == (finding is not None), (rows, found)
        if finding is not None:
            assert found[0][0] == finding[0], rows
            assert found[0][1].startswith(finding[1]), rows


def test_audit_groups(tmp_path: Path) -> None:
    """500 rows of one pattern are one group with a count and a few distinct examples."""
    rows = [
        rows_of("own", f"New York {i % 20}", f"Final answer: York {i % 20}")[0] for i in range(500)
    ]
    rows += rows_of("own", "The dog", "Final answer: dog", n=3)
    report = audit([write(tmp_path / "a.jsonl", rows)])
    first, second = report.ranked("false negative")  # the likeliest first
    assert (first.pattern, first.count) == ("wrong by exact, vqa accepts", 3)
    assert [example.count for example in first.examples.values()] == [3]
    assert (second.count, len(second.examples)) == (500, MOST_EXAMPLES)
    assert report.counts() == {
        "changed": 0, "false negative": 503, "false positive": 0, "not judged": 0, "cut off": 0,
    }  # fmt: skip


def everything(folder: Path) -> Path:
    """A file of rollouts with every kind of finding, three bad lines and an image."""
    Image.new("RGB", (400, 200), "navy").save(folder / "a.png")
    # but mathematics, whose process takes a second to start
    rows = [row for rows, found in FINDINGS for row in rows if "math" not in str(found)]
    hostile = "<script>alert('x')</script>"
    rows += rows_of("<b>odd</b>", "\x1b\u202e The dog", f"{hostile}\nFinal answer: dog",
                    question=f"<image>\n{hostile}", image=["a.png", "gone.png"])  # fmt: skip
    path = write(folder / "rollouts.jsonl", rows)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"no\n\n{"answer": "9"}\n{"completion": "9", "answer": "9", "matcher": "m"}\n')
        file.write("[" * 100_000 + "\n")
    return path


class Page(HTMLParser):
    """What a test looks at: groups, images, scripts, visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[str, str]] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        if found.get("class") == "card group":
            self.groups.append((found["data-kind"], found["data-dataset"]))
        if tag == "img":
            self.images.append(found["src"])
        assert not any(name.startswith("on") for name in found)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_audit_page(tmp_path: Path, capsys: Capture) -> None:
    """Every finding is on the page; what completions hold is text there, and nothing is fetched."""
    path, html = everything(tmp_path), tmp_path / "audit.html"
    told = run(capsys, "audit", str(path), "--html", str(html), "--max-bad", "4")
    source = html.read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    text = "".join(page.text)
    kinds = ["changed"] + ["false negative"] * 6 + ["false positive"] * 3
    assert [kind for kind, _ in page.groups] == [*kinds, "not judged", "cut off"]
    assert ("false negative", "<b>odd</b>") in page.groups
    assert page.tags.count("script") == 1
    assert "b>odd" not in source
    assert "<script>alert('x')</script>" in text
    assert "\\x1b\\u202e The dog" in text
    assert len(page.images) == 1
    assert page.images[0].startswith("data:image/jpeg;base64,")
    assert "image gone.png could not be read" in text
    assert not re.search(r"https?://|src=\"(?!data:)", source)
    assert "script-src &#39;sha256-" in source or "script-src 'sha256-" in source
    for reason in ("not JSON: ", "field 'completion' is missing", "matcher 'm' is unknown"):
        assert reason in text
        assert reason in told
    assert f"{html}: the page" in " ".join(told.split())


def test_audit_terminal(tmp_path: Path, capsys: Capture) -> None:
    """The tables fit a hundred columns, and hold the counts."""
    told = run(capsys, "audit", str(everything(tmp_path)), "--max-bad", "0.5")
    tables, _, after = told.partition("not judged: ")
    assert max(map(len, tables.splitlines())) <= 100
    assert "\x1b" not in told
    flat = " ".join(told.split())
    assert "Stored verdicts that differ from today's: 1" in flat
    assert "Likely false negatives: rejected, though right: 6" in flat
    assert "Likely false positives: accepted, though wrong: 3" in flat
    assert "2 of 20 came with a verdict, 1 differ today" in flat
    assert re.search(r"^ all +20 +\d", tables, re.MULTILINE)
    assert f"{len(FINDINGS) + 1}: not JSON: " in after
    assert after.strip().endswith("20 rollouts, 4 bad lines")


def test_audit_options(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "a.jsonl", rows_of("own", "The dog", "Final answer: dog"))
    assert "vqa accepts" in run(capsys, "audit", str(path))
    assert "No verdict looks like a mistake." in run(capsys, "audit", str(path), "--matcher", "vqa")
    table = tmp_path / "mine.yaml"
    table.write_text("- {match: own, matcher: vqa, why: ours}", encoding="utf-8")
    told = run(capsys, "audit", str(path), str(path), "--datasets", str(table))
    assert "No verdict looks like a mistake." in told
    assert "2 rollouts, 0 bad lines" in told
    html = tmp_path / "a.html"
    run(capsys, "audit", str(path), "--html", str(html), "--style", "final")
    command = f"python -m rewards explain {path}:1 --style=final<"
    assert command in html.read_text(encoding="utf-8")
    run(capsys, "audit", str(path), "--html", str(html), "--max-rows", "0")
    assert "No room on this page (--max-rows)." in html.read_text(encoding="utf-8")


def test_what_a_judge_has_judged_is_audited_by_the_rules(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "verdicts.jsonl"
    row = {"id": "1", "question": "?", "answer": "9", "completion": "Final answer: 9",
           "outcome": "correct", "matcher": "judge", "score": 1.0, "format_ok": True}  # fmt: skip
    asked = [{**row, "requested_matcher": name} for name in ("judge", ["math", "judge"])]
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    found = [
        parse_line(str(file), n, line) for n, line in enumerate(file.read_bytes().splitlines())
    ]
    assert [one.task.matchers for one in found if isinstance(one, Rollout)] == [
        ("exact",), ("math",)
    ]  # fmt: skip


def test_audit_errors(tmp_path: Path, capsys: Capture) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{}\n{"completion": "9", "answer": "9"}\n')
    few = "1 of 2 lines are bad, more than --max-bad 0.05 allows; the first: "
    cases = [
        ([], "the following arguments are required: ROLLOUTS.jsonl"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl: No such file"),
        ([str(tmp_path)], "Is a directory"),
        ([str(empty)], f"{empty}: no rollouts"),
        ([str(bad)], f"{few}{bad}:1: field 'completion' is missing"),
        ([str(bad), "--max-bad", "-1"], "--max-bad is -1.0; at least 0"),
        ([str(bad), "--workers", "0"], "--workers is 0; at least 1"),
        ([str(bad), "--html", str(bad)], f"--html {bad} is the input itself"),
        ([str(bad), "--max-bad", "1", "--html", str(tmp_path / "no/a.html")], "No such file"),
    ]
    for argv, message in cases:
        assert message in fail(capsys, "audit", *argv)
