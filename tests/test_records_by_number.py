"""Rows by number: byte offsets against a reader that goes line by line, stale caches, and checks
that are shared over ranks and not done twice.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import noise_image

from internvl.chat import load_processor
from internvl.data import (
    DataError,
    Quarantine,
    Row,
    Rows,
    Selection,
    checks,
    lines,
    read_rows,
    rows,
    rowsets,
    usable_rows,
)
from internvl.data.checks import Ranks, find_faults
from internvl.data.lines import find_lines, open_lines
from internvl.encoding import Encoder

PIECES = [
    b"\n",
    b"\r\n",
    b"\r",
    b" \t\n",
    b" ",
    b"\x0b",
    b'{"a": 1}',
    "é漢\u2028".encode(),
    b"x" * 9,
]


def line_by_line(content: bytes) -> list[tuple[int, bytes]]:
    """(line number, content) of every line that is not blank, as a file object gives them."""
    return [
        (number, raw.strip())
        for number, raw in enumerate(io.BytesIO(content), start=1)
        if raw.strip()
    ]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=14), st.integers(1, 9))
def test_offsets_are_those_of_a_plain_reader(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], block: int
) -> None:
    """Any line break, blank lines, no last line break, UTF-8, lines longer than a block."""
    file = tmp_path_factory.getbasetemp() / "lines.txt"
    content = b"".join(pieces)
    file.write_bytes(content)
    table = find_lines(file, block_bytes=block, quiet=True)
    found = lines.Lines(file, table, lines.file_stamp(file))
    read = [(found.number(index), found.read(index).strip()) for index in range(len(found))]
    assert read == line_by_line(content)
    assert len(table) == 1 or len(read) < content.count(b"\n") + 1  # numbers only where needed


def records(number: int) -> list[dict[str, Any]]:
    return [{"id": f"q{n}", "question": "Q" * (n % 7 + 1), "answer": str(n)} for n in range(number)]


def write(path: Path, found: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in found))
    return path


def quarantined(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- the cache ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "internvl-posttraining"


def test_offsets_are_found_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", records(50))
    first = open_lines(path, cached_from=0)
    (kept,) = cache.glob("*.npy")

    def no_scan(*_: Any, **__: Any) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(lines, "find_lines", no_scan)
        again = open_lines(path, cached_from=0)
        assert [again.read(i) for i in range(50)] == [first.read(i) for i in range(50)]
        assert again.read(7) == path.read_bytes().splitlines(keepends=True)[7]
    # the file changes: its old offsets are not used, and not kept
    write(path, records(3))
    assert len(open_lines(path, cached_from=0)) == 3
    assert not kept.exists()
    assert len(list(cache.glob("*.npy"))) == 1
    # the same size, another time
    os.utime(path, ns=(0, 0))
    assert len(open_lines(path, cached_from=0)) == 3
    assert len(list(cache.glob("*.npy"))) == 1
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "cache"]  # nothing beside the data


def test_faults_of_a_large_file_are_found_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart puts the same rows aside with the same reasons, without reading the others."""
    path = write(tmp_path / "a.jsonl", [*records(5), {"id": "x"}, "text", records(1)[0]])

    def read(name: str) -> tuple[list[str], list[dict[str, Any]]]:
        quarantine = Quarantine(tmp_path / name, max_bad=3)
        found = read_rows(path, kind="question", quarantine=quarantine, cached_from=0)
        return [one.data["id"] for one in found], quarantined(tmp_path / name)

    first = read("1.jsonl")
    assert first[0] == [f"q{n}" for n in range(5)]
    assert [entry["line"] for entry in first[1]] == [6, 7, 8]
    with monkeypatch.context() as patch:
        patch.setattr(rowsets, "find_fault", None)  # it would be called for every row
        assert read("2.jsonl") == first
    assert len(list(cache.glob("*.faults.json"))) == 1
    # other rules, other faults
    monkeypatch.setattr(rowsets.records, "__file__", __file__)
    monkeypatch.setattr(rowsets, "find_fault", lambda record, kind: None)
    monkeypatch.setattr(rowsets, "record_key", lambda record, kind: None)
    assert len(read_rows(path, kind="question", quarantine=Quarantine(None), cached_from=0)) == 8


def test_small_files_are_not_cached(tmp_path: Path, cache: Path) -> None:
    assert len(open_lines(write(tmp_path / "a.jsonl", records(5)))) == 5
    assert not cache.exists()


def test_two_that_open_a_file_at_once(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(200))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: len(open_lines(path, cached_from=0)), range(8)))
    assert found == [200] * 8
    assert len(list(cache.glob("*.npy"))) == 1
    assert not list(cache.glob("*.partial"))


class _Together(type(Path())):  # type: ignore[misc]
    """A path that four threads open at once."""

    barrier = threading.Barrier(4)

    def open(self, *args: Any, **options: Any) -> Any:
        file = super().open(*args, **options)
        self.barrier.wait(5)
        return file


def test_threads_that_first_read_a_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(4))
    raw = path.read_bytes().splitlines(keepends=True)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(60):
            found = open_lines(path)
            found.path = _Together(path)
            assert list(pool.map(found.read, range(4))) == raw


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(5))
    found = read_rows(path, kind="question", quarantine=Quarantine(None))
    assert found[4].data["id"] == "q4"
    with path.open("a") as out:
        out.write("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl: it was changed while it was read"):
        found[0]


# ---- rows as a sequence ----


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    every = records(10)
    bad = [{"id": "x"}, "", every[3]]  # the last one: an id again
    path = tmp_path / "a.jsonl"
    text = [json.dumps(item) if item else "" for item in [every[0], *bad, *every[1:]]]
    path.write_text("\n".join(text))
    quarantine = Quarantine(tmp_path / "bad.jsonl", max_bad=3)
    found = read_rows(path, kind="question", quarantine=quarantine)
    assert isinstance(found, Rows)
    wanted = [every[0], every[3], *every[1:3], *every[4:]]
    assert [one.data for one in found] == wanted
    assert [one.line for one in found] == [1, 4, 5, 6, *range(8, 14)]
    assert [entry["reason"] for entry in quarantined(tmp_path / "bad.jsonl")] == [
        "field 'question' is NoneType, expected a string",
        "the id of line 4 again: 'q3'",
    ]
    assert found[-1].data == wanted[-1]
    assert [one.data for one in found[2:8:3]] == wanted[2:8:3]
    assert isinstance(found[2:8], Selection)
    assert [one.data for one in found[2:8][::-1][:2]] == wanted[7:5:-1]
    for index in (10, -11):
        with pytest.raises(IndexError):
            found[index]
    again = pickle.loads(pickle.dumps(found))  # as a worker of a data loader may get them
    assert [one.data for one in again] == wanted


def test_a_limit_looks_at_no_more(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": "bad"}, *records(5), {"id": "worse"}])
    quarantine = Quarantine(tmp_path / "bad.jsonl", max_bad=1)
    found = read_rows(path, kind="question", quarantine=quarantine, limit=3)
    assert [one.data["id"] for one in found] == ["q0", "q1", "q2"]
    assert [entry["line"] for entry in quarantined(tmp_path / "bad.jsonl")] == [1]


def test_a_file_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said early: the whole of a large file is not looked at."""
    monkeypatch.setattr(rowsets, "HOPELESS", 5)
    path = write(tmp_path / "a.jsonl", records(6))
    with pytest.raises(DataError, match=r"a\.jsonl: none of the first 5 records is a usable pair"):
        read_rows(path, kind="pair", quarantine=Quarantine(None))


def test_rows_are_read_in_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(300))
    found = read_rows(path, kind="question", quarantine=Quarantine(None))
    order = np.random.default_rng(0).permutation(300).tolist()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda index: found[index].data["answer"], order))
    assert read == [str(index) for index in order]


# ---- checks ----


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve questions with an image; that of every fourth is broken."""
    found = []
    for number in range(12):
        noise_image(40, 40, number).save(tmp_path / f"{number}.png")
        if number % 4 == 3:
            (tmp_path / f"{number}.png").write_bytes(b"broken")
        found.append({"id": str(number), "image": f"{number}.png", "question": "Q", "answer": "3"})
    return write(tmp_path / "rows.jsonl", found)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded from here on."""
    names: list[str] = []
    lock = threading.Lock()
    whole = rows.load_image

    def counting(source: Any) -> Any:
        with lock:
            names.append(source.name)
        return whole(source)

    monkeypatch.setattr(rows, "load_image", counting)
    return names


def check(path: Path, model: Path, **options: Any) -> tuple[list[str], list[int]]:
    """The ids that are left, and the lines that are put aside."""
    aside = path.with_name("aside.jsonl")
    aside.unlink(missing_ok=True)
    quarantine = Quarantine(aside, max_bad=0.5)
    found = read_rows(path, kind="question", quarantine=quarantine)
    encoder = Encoder(load_processor(str(model)), max_length=options.pop("max_length", 100))
    good = usable_rows(found, encoder, "question", quarantine, quiet=True, **options)
    put = [entry["line"] for entry in quarantined(aside)]
    return [one.data["id"] for one in good], put


def test_good_rows_are_not_decoded_twice(
    mixed: Path, tiny_model: Path, decoded: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "checked_rows"
    wanted = ([str(n) for n in range(12) if n % 4 != 3], [4, 8, 12])
    assert check(mixed, tiny_model, known_folder=folder) == wanted
    assert len(decoded) == 12
    decoded.clear()
    assert check(mixed, tiny_model, known_folder=folder) == wanted
    assert sorted(decoded) == ["11.png", "3.png", "7.png"]  # the bad ones are looked at again
    # an image that was mended, one that was broken, a record that changed, a torn last hash
    noise_image(40, 40, 3).save(tmp_path / "3.png")
    (tmp_path / "5.png").write_bytes(b"broken now")
    text = mixed.read_text()
    mixed.write_text(text.replace('"id": "0"', '"id": "zero"'))
    with (folder / "0.bin").open("ab") as out:
        out.write(b"torn")
    decoded.clear()
    ids, put = check(mixed, tiny_model, known_folder=folder)
    assert ids == ["zero", "1", "2", "3", "4", "6", "8", "9", "10"]
    assert put == [6, 8, 12]
    assert sorted(decoded) == ["0.png", "11.png", "3.png", "5.png", "7.png"]
    # another limit may find other rows bad
    decoded.clear()
    with pytest.raises(DataError, match="12 of 12 rows are bad"):
        check(mixed, tiny_model, known_folder=folder, max_length=5)
    assert len(decoded) == 12
    # nothing is kept without a folder
    decoded.clear()
    check(mixed, tiny_model)
    check(mixed, tiny_model)
    assert len(decoded) == 24


def test_repeated_rows_are_decoded_once(
    mixed: Path, tiny_model: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_AT_ONCE", 12)
    meta = mixed.with_name("meta.json")
    meta.write_text(json.dumps({"a": {"annotation": mixed.name, "repeat_time": 3}}))
    ids, put = check(meta, tiny_model, known_folder=mixed.with_name("checked_rows"))
    assert len(ids) == 27
    assert put == [4, 8, 12]
    assert len(decoded) == 12 + 2 * 3  # the bad ones again


def test_the_share_of_bad_rows_is_of_all(tmp_path: Path, tiny_model: Path) -> None:
    """Half may be bad, and half are: those of the first pass count among the second's."""
    noise_image(40, 40, 0).save(tmp_path / "0.png")
    asked = [{**one, "image": "0.png"} for one in records(3)]
    bad = [{"id": "bad"}, {"id": "worse"}, {**records(1)[0], "id": "image", "image": "no.png"}]
    path = write(tmp_path / "rows.jsonl", [*asked, *bad])
    assert check(path, tiny_model) == (["q0", "q1", "q2"], [4, 5, 6])


def test_ranks_share_the_checks(mixed: Path, tiny_model: Path, decoded: list[str]) -> None:
    """Each looks at its share, and all agree on the rows that are left."""
    found = read_rows(mixed, kind="question", quarantine=Quarantine(None))
    shares = [
        find_faults(found, desc="", quiet=True, ranks=Ranks(rank, 5, dict)) for rank in range(5)
    ]
    assert len(decoded) == 12
    assert sorted(number for share in shares for number in share) == [3, 7, 11]
    together = {number: fault for share in shares for number, fault in share.items()}
    alone = check(mixed, tiny_model)
    for rank in range(5):
        assert check(mixed, tiny_model, ranks=Ranks(rank, 5, lambda mine: together)) == alone


def test_few_rows_are_in_memory_together(
    mixed: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_AT_ONCE", 5)
    assert check(mixed, tiny_model)[1] == [4, 8, 12]


def test_an_unchecked_row_is_found_bad(tmp_path: Path, tiny_model: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*records(3), {"id": "x"}])
    lazy = read_rows(path, kind="question", quarantine=Quarantine(None), checked=False)
    encoder = Encoder(load_processor(str(tiny_model)))
    quarantine = Quarantine(None, max_bad=1)
    good = usable_rows(lazy, encoder, "question", quarantine, quiet=True)
    assert [one.data["id"] for one in good] == ["q0", "q1", "q2"]
    assert isinstance(lazy[3], Row)
