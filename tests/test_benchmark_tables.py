"""VLMEvalKit's TSV files: what a row becomes, and what of a bad file is lost."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl.data import Quarantine, check_images, read_rows
from internvl.data.benchmarks import BenchmarkTable
from internvl.errors import DataError
from rewards.verdict import task_of

COLUMNS = ("index", "image", "image_path", "question", "hint", "A", "B", "C", "answer", "category")


def picture(colour: str) -> str:
    """A picture as the files hold it."""
    stored = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(stored, "PNG")
    return base64.b64encode(stored.getvalue()).decode()


RED, BLUE = picture("red"), picture("blue")


def write(path: Path, *rows: dict[str, Any], columns: Any = COLUMNS) -> Path:
    """A TSV as pandas writes one: absent cells empty."""
    with path.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, columns, delimiter="\t", lineterminator="\n", restval="")
        table.writeheader()
        table.writerows({"index": number, "image": RED, **row} for number, row in enumerate(rows))
    return path


def read(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """The good records, and (line, reason) of the bad ones."""
    aside = path.with_suffix(".bad.jsonl")
    quarantine = Quarantine(aside, max_bad=1000)
    rows = read_rows(path, kind="question", quarantine=quarantine)
    good = check_images(rows, quarantine=quarantine)
    told = aside.read_text(encoding="utf-8").splitlines() if aside.exists() else []
    return [row.data for row in good], [
        (json.loads(t)["line"], json.loads(t)["reason"]) for t in told
    ]


def test_a_choice_is_asked_as_vlmevalkit_asks(tmp_path: Path) -> None:
    row = {"question": "What?", "hint": "Look.", "A": "cat", "B": "None", "C": "nan", "answer": "B"}
    ((record,), bad) = read(write(tmp_path / "MMStar.tsv", {**row, "category": "pets"}))
    assert bad == []
    (image,) = record.pop("image")
    assert base64.b64encode(image).decode() == RED
    assert record == {
        "id": "MMStar-0",
        "index": "0",
        "dataset": "MMStar",
        "category": "pets",
        "question": "<image>\nHint: Look.\nQuestion: What?\nOptions:\nA. cat\nB. None\n"
        "Please select the correct answer from the options above.",
        "answer": "B",
        "options": ["cat", "None"],
    }


def test_the_file_name_chooses_the_matcher(tmp_path: Path) -> None:
    for name, matchers in (
        ("ChartQA_TEST_local", ("relaxed",)),
        ("MMMU_DEV_VAL", ("choice", "number", "math", "exact")),
        ("MathVista_MINI", ("choice", "number", "math", "exact")),
        ("DocVQA_VAL", ("anls",)),
    ):
        ((record,), _) = read(
            write(tmp_path / f"{name}.tsv", {"question": "How many?", "answer": "3"})
        )
        assert record["dataset"] == name.removesuffix("_local")
        assert task_of(record, "").matchers == matchers


def test_several_images_stand_as_internvl_reads_them(tmp_path: Path) -> None:
    both = str([RED, BLUE])
    records, _ = read(
        write(
            tmp_path / "MMMU_DEV_VAL.tsv",
            {"image": both, "question": "Is <image 2> <image 1>?", "A": "<image 1>", "answer": "A"},
            {"question": "What does <image 1> show?", "answer": "x"},
            {"image": both, "question": "First <image>, then <image>?", "answer": "x"},
        )
    )
    assert [record["question"] for record in records] == [
        "Image-1: <image>\nImage-2: <image>\nQuestion: Is <Image-2> <Image-1>?\nOptions:\n"
        "A. <Image-1>\nPlease select the correct answer from the options above.",
        "<image>\nWhat does show?",
        "First <image>, then <image>?",
    ]
    stored = [base64.b64encode(image).decode() for image in records[0]["image"]]
    assert stored == [RED, BLUE]


def test_an_image_may_be_another_row_s(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.tsv",
        {"question": "a", "answer": "1"},
        {"image": "0", "question": "b", "answer": "1"},
        {"image": "9", "question": "c", "answer": "1"},
        {"image": "1", "question": "d", "answer": "1"},
        {"image": "", "question": "e", "answer": "1"},
        {"image": RED[:-3] + "!!!", "question": "f", "answer": "1"},
        {"image": base64.b64encode(b"no picture " * 20).decode(), "question": "g", "answer": "1"},
        {"image": f"data:image/png;base64,{BLUE}", "question": "h", "answer": "1"},
    )
    records, bad = read(path)
    assert [r["question"][-1] for r in records] == ["a", "b", "h"]
    assert records[0]["image"] == records[1]["image"] != records[2]["image"]
    reasons = dict(bad)
    assert reasons[4] == "column 'image' names row '9', which is not in the file"
    assert reasons[5] == "column 'image' names row '1', which holds no image itself"
    assert reasons[6] == "column 'image' is empty (VLMEvalKit leaves such a row out)"
    assert reasons[7].startswith("column 'image' is no base64: ")
    assert "not an image that is read here" in reasons[8]
    assert len(bad) == 5


def test_paths_stand_for_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    columns = [name for name in COLUMNS if name != "image"]
    names = ("a.png", "['a.png', 'a.png']", "../x.png")
    path = tmp_path / "t.tsv"
    with path.open("w", newline="") as out:
        table = csv.DictWriter(out, columns, delimiter="\t", restval="")
        table.writeheader()
        table.writerows(
            {"index": n, "image_path": name, "question": "q", "answer": "1"}
            for n, name in enumerate(names)
        )
    records, ((line, reason),) = read(path)
    assert [record["image"] for record in records] == [["a.png"], ["a.png", "a.png"]]
    assert line == 4 and "outside its root" in reason


def test_answers_that_are_lists(tmp_path: Path) -> None:
    written = [
        "['3', 'three']",
        "[1, 2]",
        "['a', __import__('os')]",
        "[" * 3000 + "]" * 3000,
        "nan",
    ]
    records, bad = read(
        write(tmp_path / "t.tsv", *({"question": "q", "answer": text} for text in written))
    )
    assert bad == []  # an empty answer is the verifier's affair
    assert [record["answer"] for record in records] == [["3", "three"], *written[1:4], ""]


def test_bad_rows_cost_themselves_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.tsv",
        {"question": "first", "answer": "1"},
        {"question": "gap", "B": "x", "answer": "1"},
        {"question": "no <image 2>", "answer": "1"},
        {"question": " ", "answer": "1"},
        {"index": "0", "question": "twice", "answer": "1"},
    )
    line = f"7\t{RED}\t\tlast\t\t\t\t\t1\t"
    with path.open("ab") as out:
        out.write(f'5\t{RED}\t\t"open quote\t\t\t\t\t1\t\n'.encode())
        out.write(b"6\t\xff\xfe\t\tnot UTF-8\t\t\t\t\t1\t\n\n")
        out.write(b"8\ttoo few\n")
        out.write(line.encode())
    records, bad = read(path)
    assert [record["question"] for record in records] == ["<image>\nfirst", "<image>\nlast"]
    assert [line for line, _ in sorted(bad)] == [3, 4, 5, 6, 7, 8, 10]
    reasons = dict(bad)
    assert reasons[3] == "there is an option B but no A"
    assert reasons[4] == "the question speaks of <image 2>, and there are 1"
    assert reasons[5] == "column 'question' is empty"
    assert reasons[6] == "the id of line 2 again: 't-0'"
    assert reasons[7] == "not a row of the table: unexpected end of data"
    assert "can't decode byte 0xff" in reasons[8]
    assert reasons[10] == "not a row of the table: 2 cells, expected 10"


def test_a_file_that_is_no_such_table(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("question\tanswer\nq\t1\n")
    with pytest.raises(DataError, match=r"t\.tsv: no column 'index'; expected a table as VLMEval"):
        BenchmarkTable(path)


def test_cells_longer_than_csv_s_limit(tmp_path: Path) -> None:
    """And its limit, which is a global, is what it was."""
    before = csv.field_size_limit()
    path = write(tmp_path / "t.tsv", {"question": "q" * 2 * before, "answer": "1"})
    ((record,), _) = read(path)
    assert len(record["question"]) == 2 * before + len("<image>\n")
    assert csv.field_size_limit() == before


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=12)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6))
def test_what_csv_writes_is_read(tmp_path_factory: Any, rows: list[tuple[str, str]]) -> None:
    """Quotes, tabs and line breaks inside cells, at any place of the file."""
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    write(path, *({"question": f"q{q}", "category": f"c{c}", "answer": "1"} for q, c in rows))
    table = BenchmarkTable(path)
    found = [table.read(number) for number in range(len(table))]
    assert [fault for _, fault in found] == [None] * len(rows)
    kept = [(record["question"], record["category"]) for record, _ in found]
    assert [c for _, c in kept] == [f"c{c}" for _, c in rows]
    wanted = [f"q{q}".strip() for q, _ in rows if "<image" not in q]
    assert [q.removeprefix("<image>\n") for q, _ in kept if "<image " not in q] == wanted
