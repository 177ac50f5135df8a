"""A run goes on with the data that it began with: told by their content, not by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from record_cases import QUESTION, write

from internvl.data import Quarantine, Row, read_rows
from internvl.data.fingerprint import file_digest, fingerprint

ROWS: list[dict[str, Any]] = [{"id": f"{n}", "question": "Why?", "answer": "3"} for n in range(4)]


def of(path: Path, **options: Any) -> str | None:
    return fingerprint(read_rows(path, kind="question", quarantine=Quarantine(None, 9), **options))


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = of(write(tmp_path / "a.jsonl", ROWS))
    assert first is not None
    assert of(write(tmp_path / "other/b.jsonl", ROWS)) == first
    assert of(write(tmp_path / "c.jsonl", [*ROWS[:3], {**ROWS[3], "answer": "4"}])) != first
    assert of(write(tmp_path / "d.jsonl", ROWS[::-1])) != first


def test_what_is_left_out_counts(tmp_path: Path) -> None:
    """Of the same number of rows, others; a slice of them, too."""
    file = write(tmp_path / "a.jsonl", ROWS)
    rows = read_rows(file, kind="question", quarantine=Quarantine(None))
    marks = {fingerprint(part) for part in (rows, rows[:2], rows[2:], rows[:4:2])}
    assert len(marks) == 4 and None not in marks
    assert of(file, limit=2) not in marks


def test_what_meta_json_says_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    entry = {"root": ".", "annotation": "a.jsonl", "repeat_time": 1, "data_augment": False}
    marks = set()
    for change in ({}, {"repeat_time": 2}, {"max_dynamic_patch": 6}):
        (tmp_path / "meta.json").write_text(json.dumps({"a": {**entry, **change}}))
        marks.add(of(tmp_path / "meta.json"))
    assert len(marks) == 3
    (tmp_path / "meta.json").write_text(json.dumps({"another name": {**entry, "length": 4}}))
    assert of(tmp_path / "meta.json") in marks


def test_rows_in_memory_and_rows_of_another_kind(tmp_path: Path) -> None:
    rows = [Row({**QUESTION, "image": image}, tmp_path, 1, tmp_path) for image in (b"a", b"b")]
    assert fingerprint(rows[:1]) == fingerprint(list(rows[:1])) != fingerprint(rows[1:])
    assert fingerprint([1, 2]) is None


def test_the_digest_of_a_large_file_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    from internvl.data import fingerprint as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / "a.jsonl", ROWS)
    digest = file_digest(file, cached_from=1)
    assert digest == file_digest(file)
    read = monkeypatch.setattr(module, "_read_digest", lambda path: "read again")
    assert read is None and file_digest(file, cached_from=1) == digest
    file.write_text("another\n")
    assert file_digest(file, cached_from=1) == "read again"
