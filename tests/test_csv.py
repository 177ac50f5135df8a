"""CSV files of questions, and what of them `cascade split` holds out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade.cli import main
from cascade.split import held_out
from internvl.data import Quarantine, read_rows
from internvl.data.csv_tables import CsvTable
from internvl.errors import DataError


def read(path: Path, text: str | bytes) -> list[tuple[object, str | None]]:
    """What a file of this text holds: its records, or why a row is none."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = CsvTable(path)
    return [table.read(number) for number in range(len(table))]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_spreadsheet_becomes_questions(tmp_path: Path, mark: str) -> None:
    """Byte order mark, capitals, line breaks in a cell, empty cells and lists, by any delimiter."""
    rows = [
        ["\ufeffImage", "Question", "Answer", "Options", "id"],
        ["a.png", '"How many\nbars, all; in all?"', "3", "", "q1"],
        ['"[""a.png"", ""b.png""]"', "Which?", "B", '"[""cat"", ""dog""]"', ""],
    ]
    text = "\r\n\r\n".join(mark.join(row) for row in rows)
    question = "How many\nbars, all; in all?"
    assert read(tmp_path / "mine.csv", text) == [
        ({"image": "a.png", "question": question, "answer": "3", "id": "q1"}, None),
        (
            {
                "image": ["a.png", "b.png"],
                "question": "Which?",
                "answer": "B",
                "options": ["cat", "dog"],
                "id": "mine-2",
            },
            None,
        ),
    ]


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ('"[""a"", ""b""]"', ["a", "b"]),
        ('"[1, 2]"', "[1, 2]"),
        ("[x)", "[x)"),
        ("3", "3"),
        (" 007 ", "007"),
    ],
)
def test_answers(tmp_path: Path, cell: str, answer: object) -> None:
    ((record, fault),) = read(tmp_path / "a.csv", f"question,answer\nWhat?,{cell}\n")
    assert fault is None
    assert isinstance(record, dict)
    assert record["answer"] == answer


def test_bad_rows_are_told(tmp_path: Path) -> None:
    """Each with the line it begins in; the rows behind it are read."""
    path = tmp_path / "q.csv"
    path.write_bytes(
        b"question,answer,max_tiles,options\nA?,1\nB?,2,many,\nC?,3,,[x\n\xff?,4,,\n"
        b'"D\n?",5,,\n"E?,6,,\nF?,7,12,\n'
    )
    quarantine = Quarantine(tmp_path / "bad.jsonl", max_bad=10)
    rows = read_rows(path, kind="question", quarantine=quarantine)
    assert [(row.line, row.data["question"]) for row in rows] == [(6, "D\n?"), (9, "F?")]
    assert rows[1].data["max_tiles"] == 12
    told = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(bad["line"], bad["reason"][:38]) for bad in told] == [
        (2, "not a row of the table: 2 cells, expec"),
        (3, "column 'max_tiles': 'many' is no whole"),
        (4, "column 'options' begins like JSON and "),
        (5, "not a row of the table: 'utf-8' codec "),
        (8, "not a row of the table: unexpected end"),
    ]


def test_what_spreadsheets_leave_is_no_row(tmp_path: Path) -> None:
    """Columns without a name, and rows of separators alone."""
    rows = read(tmp_path / "q.csv", "question,answer,,\nA?,1,,\n,,,\n , ,,\nB?,2,,x\n")
    assert [(record["question"], fault) for record, fault in rows] == [("A?", None), ("B?", None)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "prompt,answer\n",
            "no column 'question'; expected a table with a header: image, question",
        ),
        ("question,Answer,answer\n", "two columns are called 'answer'"),
        ("", "no column 'question'"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(tmp_path / "q.csv", text)


def test_a_file_says_where_its_images_go(tmp_path: Path) -> None:
    """One image without `<image>` gets it in front; pairs of a file that writes it do not."""
    path = tmp_path / "q.csv"
    read(path, "image,question,answer\na.png,What?,1\n")
    (row,) = read_rows(path, kind="question", quarantine=Quarantine(None))
    assert row.data["question"] == "<image>\nWhat?"
    assert CsvTable(path).image_in_front
    read(path, "image,question,answer\na.png,<image> What?,1\nb.png,And?,2\n")
    assert not CsvTable(path).image_in_front


@given(
    keys=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=60),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_no_key_is_on_both_sides(keys: list[list[int]], share: float, seed: int) -> None:
    """Nor does the order of the rows matter; something stays and something is held out."""
    names = [str(number) for number in range(len(keys))]
    out = held_out(keys, share, seed, names)
    sides = [
        {key for own, held in zip(keys, out, strict=True) if held is s for key in own}
        for s in (True, False)
    ]
    assert not sides[0] & sides[1]
    assert not all(out)
    order = random.Random(seed).sample(range(len(keys)), len(keys))
    again = held_out([keys[n] for n in order], share, seed, [names[n] for n in order])
    assert [again[order.index(n)] for n in range(len(keys))] == out


def test_so_many_are_held_out() -> None:
    """The share, to half a group; another seed draws others, a row more moves few."""
    keys = [[number // 3] for number in range(900)]
    names = [f"q{number}" for number in range(900)]
    out = held_out(keys, 0.1, 0, names)
    assert sum(out) == 90
    assert held_out(keys, 0.1, 1, names) != out
    more = held_out([*keys, [999]], 0.1, 0, [*names, "new"])
    assert sum(a != b for a, b in zip(out, more[:900], strict=True)) <= 3


def test_split_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two names of one picture are one picture; a bad row is put aside; ids and words are kept."""
    for number in range(20):
        Image.new("RGB", (8, 8), (number % 10, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,How many?,{number}" for number in range(20)]
    (tmp_path / "q.csv").write_text("\n".join(["image,question,answer", *lines, "x.png,Why?,1"]))
    main(["split", str(tmp_path / "q.csv"), "--heldout", "0.2"])
    sides = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    ]
    assert [len(side) for side in sides] == [16, 4]
    train, held = ({int(row["answer"]) % 10 for row in side} for side in sides)
    assert (len(train), len(held), train & held) == (8, 2, set())
    number = int(sides[0][0]["answer"])
    assert sides[0][0] == {
        "id": f"q-{number + 1}",
        "image": f"{number}.png",
        "question": "<image>\nHow many?",
        "answer": str(number),
    }
    assert capsys.readouterr().out.splitlines() == [
        f"1 unusable rows: {tmp_path / 'split.quarantine.jsonl'}",
        f"{tmp_path / 'train.jsonl'}: 16 questions, 8 pictures",
        f"{tmp_path / 'heldout.jsonl'}: 4 questions, 2 pictures",
    ]


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("q.csv", ("--heldout", "1.5"), "--heldout is 1.5; give a share between 0 and 1"),
        ("train.jsonl", (), "train.jsonl would be written over: give --output DIR"),
        ("q.csv", (), "all 2 questions share pictures: none can be held out"),
    ],
)
def test_what_split_refuses(
    name: str, words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    text = "image,question,answer\na.png,How many?,1\na.png,And?,2\n"
    (tmp_path / name).write_text(text if name == "q.csv" else "{}")
    with pytest.raises(SystemExit) as stop:
        main(["split", str(tmp_path / name), *words])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
