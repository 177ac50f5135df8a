"""`sft review`: what the page shows of rejected rows, and what it never does."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path

import pytest
from data_tool_cases import beside, command, row
from PIL import Image

from internvl.data import write_jsonl
from sft.data_tools.review import Line, draw_lines
from sft.data_tools.review_cards import mark_text

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \u202e"
ROWS = [
    row(0, "<image>\nWrite zeros.", f"{EVIL} 1{'0' * 60}", image="a.png", dataset="web"),
    row(1, "Again?", "0" * 70, "And?", "Fine."),
    row(2, "<image>\nWhat?", "哈" * 60, image="gone.png"),
    row(3, "What?", "Fine."),
]


@pytest.fixture
def rejected(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    out = tmp_path / "kept.jsonl"
    assert command("filter", tmp_path / "in.jsonl", "--output", out) == 0
    return out.with_name("kept.jsonl.rejected.jsonl")


def test_the_page(rejected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert command("review", rejected, "--output", page) == 0
    assert "3 of 3 rows" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    keys = [entry["key"] for entry in beside(tmp_path / "kept.jsonl", "rejected.jsonl")]
    assert re.findall(r'data-key="(\w+)"', text) == keys
    assert f"<mark>{'0' * 60}</mark>" in text and f"<mark>{'0' * 70}</mark>" in text
    assert "60 zeros in a row" in text and "60 &gt; 50, turn 1" in text
    assert text.count('src="data:image/png;base64,') == 1
    assert "gone.png" in text and "picture not shown" in text
    assert '<span class="slot">&lt;image&gt;</span>' in text
    assert '<span class="unseen">U+202E</span>' in text and "\u202e" not in text
    # one script, named by its hash; what rows hold is text
    assert text.count("<script>") == 1 and "<img src=x" not in text
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "http" not in text.replace("http-equiv", "")
    before = page.read_bytes()
    assert command("review", rejected, "--output", page) == 0
    assert page.read_bytes() == before


def test_only_a_rule(rejected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert command("review", rejected, "--output", page, "--rule", "character_run") == 0
    assert page.read_text(encoding="utf-8").count("<article") == 1
    assert command("review", rejected, "--output", page, "--rule", "long_word") == 2
    assert "there are character_run, repeated_ngrams, zero_run" in capsys.readouterr().err


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "none.jsonl").write_text("")
    page = tmp_path / "page.html"
    assert command("review", tmp_path / "in.jsonl", "--output", page) == 2
    assert "in.jsonl:1: not a line of a file *.rejected.jsonl" in capsys.readouterr().err
    assert command("review", tmp_path / "none.jsonl", "--output", page) == 2
    assert "no row in it" in capsys.readouterr().err
    assert not page.exists()


def test_undecided_rows_too(tmp_path: Path) -> None:
    entry = {"key": "k", "file": "in.jsonl", "line": 7, "reason": "quality: timed out",
             "image_root": str(tmp_path), "row": row(1, "What?", "That.")}  # fmt: skip
    (tmp_path / "u.jsonl").write_text(json.dumps(entry) + "\n")
    assert command("review", tmp_path / "u.jsonl", "--output", tmp_path / "page.html") == 0
    assert "quality: timed out" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_drawn_evenly_by_rule() -> None:
    rules = ["a"] * 50 + ["b"] * 3 + ["c"] * 50
    lines = [Line(start, (rule,)) for start, rule in enumerate(rules)]
    drawn = draw_lines(lines, 23, seed=0)
    names = [line.rules[0] for line in drawn]
    assert (names.count("a"), names.count("b"), names.count("c")) == (10, 3, 10)
    assert drawn == sorted(drawn, key=lambda line: line.start)
    assert drawn != draw_lines(lines, 23, seed=1) and drawn == draw_lines(lines, 23, seed=0)
    assert draw_lines(lines, 999, seed=0) == lines


def test_a_long_text_is_cut_around_its_mark() -> None:
    text = "a" * 50_000 + "MARK" + "b" * 50_000
    runs = mark_text(text, [(50_000, 50_004)])
    assert [run.kind for run in runs] == ["more", "plain", "marked", "plain", "more"]
    assert runs[2].text == "MARK" and runs[0].text == "44,000 characters before"
    assert sum(len(run.text) for run in runs[1:-1]) == 12_000
