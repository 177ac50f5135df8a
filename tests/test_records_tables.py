"""Rows of parquet files, saved data sets and `meta.json`, and the commands that take them."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plain import noise_image
from record_cases import QUESTION, encoded, pixels, read, row, write
from streams import Streams

from cascade.evaluate import Evaluation, EvaluationConfig
from cascade.questions import read_questions
from internvl.data import (
    Quarantine,
    Row,
    check_images,
    image_fault,
    portable_record,
    read_rows,
    write_jsonl,
)
from internvl.data.cache import cached_file
from internvl.data.tables import open_tables
from internvl.errors import DataError, UserError
from internvl.sampler import Completion, SampleRequest, SamplingConfig
from mmpr.cli import main as mmpr
from mmpr.listing import detect_kind
from mmpr.sample import pending_rows
from rewards import VerifierPool
from rewards.judging import Verifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(index))
    return tmp_path


# ---- Hugging Face data sets ----


def hub_rows() -> list[dict[str, Any]]:
    """One row of each kind of image cell, and two that are bad."""
    cells: list[Any] = [
        [{"bytes": encoded(0), "path": None}],
        [{"bytes": None, "path": "1.png"}],
        [{"bytes": encoded(1), "path": "1.png"}, {"bytes": encoded(2), "path": None}],
        [],
        [{"bytes": b"no image", "path": "x.png"}],
        [{"bytes": None, "path": "../outside.png"}],
    ]
    return [
        {"question": "<image>" * len(cell) + "How many?", "answer": ["3"], "images": cell}
        for cell in cells
    ]


def check_hub_rows(rows: Sequence[Row], folder: Path, file: Path) -> None:
    assert [(one.file, one.line) for one in rows] == [(file, n) for n in range(1, 7)]
    quarantine = Quarantine(folder / "images.jsonl", max_bad=2)
    good = check_images(rows, quarantine=quarantine)
    assert [len(one.load_images()) for one in good] == [1, 1, 2, 0]
    assert [pixels(image) for one in good for image in one.load_images()] == [
        pixels(noise_image(30, 20, seed)) for seed in (0, 1, 1, 2)
    ]
    found = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in found] == [5, 6]
    assert {entry["file"] for entry in found} == {str(file)}
    assert found[0]["row"]["image"][0]["bytes"] == {
        "bytes": 8,
        "sha256": hashlib.sha256(b"no image").hexdigest(),
    }
    assert "outside its root" in found[1]["reason"]


@pytest.mark.parametrize("cached_from", [0, 2**40])
def test_parquet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cached_from: int, tmp_path: Path
) -> None:
    """A file, a pattern and a folder; read into memory, or copied to Arrow in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = folder / "train-00000-of-00001.parquet"
    rows = hub_rows()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    for path in (file, folder, folder / "train-*.parquet"):
        check_hub_rows(read(path, cached_from=cached_from), folder, file)
        (folder / "images.jsonl").unlink()
    copies = list((tmp_path / "cache").rglob("*.arrow"))
    assert len(copies) == (cached_from == 0)
    # a changed file is copied anew, and the old copy goes
    pq.write_table(pa.Table.from_pylist(rows[:3]), file)
    assert [one.data["id"] for one in read(file, cached_from=cached_from)] == [
        f"train-00000-of-00001-{number}" for number in (1, 2, 3)
    ]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == len(copies)
    assert detect_kind(file) == "question"


def test_saved_data_set(folder: Path) -> None:
    saved = folder / "saved"
    data_set = datasets.Dataset.from_list(hub_rows())
    data_set.save_to_disk(saved)
    (file,) = saved.glob("*.arrow")
    (saved / "1.png").write_bytes(encoded(1))
    check_hub_rows(read(saved), folder, file)
    datasets.DatasetDict({"train": data_set, "test": data_set}).save_to_disk(folder / "splits")
    with pytest.raises(DataError, match=r"several splits; give the folder of one: .*/splits/test"):
        read(folder / "splits")
    assert len(read(folder / "splits" / "train")) == 6


def test_a_column_declared_as_images_is_not_decoded(folder: Path) -> None:
    rows = [{"id": "a", "question": "Q", "answer": "1", "image": {"bytes": b"no", "path": None}}]
    data_set = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data_set.save_to_disk(folder / "saved")
    data_set.to_parquet(folder / "t.parquet")
    for path in (folder / "saved", folder / "t.parquet"):
        (one,) = read(path)
        assert one.images == [b"no"]
        assert str(image_fault(one)).startswith("image of 2 bytes: not an image")


def test_a_shuffled_data_set_is_saved_in_its_order(folder: Path) -> None:
    rows = [{"id": n, "question": "Q", "answer": str(n)} for n in range(20)]
    data_set = datasets.Dataset.from_list(rows).shuffle(seed=1)
    data_set.save_to_disk(folder / "saved", num_shards=3)
    found = read(folder / "saved")
    assert [one.data["answer"] for one in found] == data_set["answer"]
    assert [one.data["id"] for one in found] == [str(n) for n in data_set["id"]]
    assert len({one.file for one in found}) == 3


def test_columns_that_json_has_no_form_for(folder: Path) -> None:
    import datetime

    rows = [
        {"id": "a", "question": "Q", "answer": "1", "day": datetime.date(2026, 1, 2), "blob": None},
        {"id": "b", "question": "Q", "answer": "1", "day": None, "blob": b"\0\1"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    dated, blob = read(folder / "t.parquet")
    assert "blob" not in dated.data  # a null is an absent field
    assert portable_record(dated, folder / "o.jsonl")["day"] == "2026-01-02"
    with pytest.raises(DataError, match="field 'blob' holds 2 bytes, which JSON cannot hold"):
        portable_record(blob, folder / "o.jsonl")
    with pytest.raises(DataError, match="field 'day' cannot be written: Object of type date"):
        write_jsonl(folder / "o.jsonl", [dated.data])


def test_what_is_no_data_set(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    empty = folder / "empty"
    (empty / "data").mkdir(parents=True)
    two = folder / "two"
    two.mkdir()
    for split in ("test", "train"):
        name = f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist([QUESTION]), two / name)
    (folder / "state").mkdir()
    (folder / "state" / "state.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    for path, reason in (
        (folder / "broken.parquet", "broken.parquet: cannot be read: "),
        (empty, "a folder without parquet files, and not made by save_to_disk"),
        (two, r"several splits; give one: '.*/two/test-\*\.parquet' or '.*/two/train-"),
        (folder / "none-*.parquet", "no such files"),
        (folder / "*.png", r"0\.png is not parquet; a meta\.json lists several JSONL files"),
        (folder / "state", "not written by save_to_disk"),
        (Path("owner/name"), "hub is downloaded first: hf download owner/name --repo-type"),
        (Path("hf://datasets/owner/name"), "no such file"),
        (folder / "gone.jsonl", r"gone\.jsonl: no such file$"),
    ):
        with pytest.raises(DataError, match=reason):
            read_rows(path, kind="question", quarantine=Quarantine(None))


@pytest.mark.parametrize("cached_from", [0, 2**40])
def test_damaged_tables(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached_from: int
) -> None:
    """A file that breaks off inside, and a cell that is no text: told, each in its place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = folder / "whole.parquet"
    pq.write_table(pa.table({"id": [noise * 99 for noise in "abc"] * 99}), whole)
    (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(40) + whole.read_bytes()[44:])
    with pytest.raises(DataError, match=r"damaged\.parquet: cannot be read: "):
        open_tables(folder / "damaged.parquet", cached_from=cached_from)
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"Q\xff\xfe"))
    pq.write_table(pa.table({"id": [1, 2], "question": text, "answer": ["3", "3"]}), whole)
    (one,) = read(whole, cached_from=cached_from)
    assert one.data == {"id": "1", "question": "Q", "answer": "3"}
    (line,) = (folder / "quarantine.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["line"] == 2
    assert found["reason"].startswith("a cell cannot be read: 'utf-8' codec can't decode byte")


def test_a_data_file_that_cannot_be_read_is_not_the_caches_fault(folder: Path) -> None:
    def make(target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "0.png"))

    with pytest.raises(PermissionError):
        cached_file([folder / "0.png"], ".x", make, version=1)


def test_a_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.Table.from_pylist([QUESTION]), folder / "t.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "0.png"))
    with pytest.raises(UserError, match=r"Set XDG_CACHE_HOME to a folder that can be written"):
        open_tables(folder / "t.parquet", cached_from=0)


# ---- meta.json ----


def test_data_sets_of_a_meta_json(folder: Path) -> None:
    """Each its own root, tile budget and number of repetitions, whatever its format."""
    (folder / "charts").mkdir()
    (folder / "charts" / "c.png").write_bytes(encoded(4))
    pair = {"question": "Q", "chosen": "a", "rejected": "b"}
    write(folder / "a.jsonl", [{**pair, "image": "c.png", "n": n} for n in range(4)])
    pq.write_table(pa.Table.from_pylist([{**pair, "image": {"bytes": encoded(5)}}]),
                   folder / "b.parquet")  # fmt: skip
    meta = {
        "a": {"root": "charts", "annotation": "a.jsonl", "repeat_time": 1.5,
              "max_dynamic_patch": 6},
        "b": {"annotation": "b*.parquet", "repeat_time": 2, "length": 1},
        "c": {"annotation": "a.jsonl", "repeat_time": 0},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = read(folder / "meta.json", "pair")
    assert [one.data.get("n") for one in rows] == [0, 1, 2, 3, 0, 1, None, None]
    assert [one.tile_budget(12) for one in rows] == [6] * 6 + [12] * 2
    assert [one.data["question"] for one in rows] == ["<image>\nQ"] * 8
    assert check_images(rows, quarantine=Quarantine(None)) is rows
    # for another file, paths start from one folder and the budget goes along
    record = portable_record(rows[0], folder / "out" / "o.jsonl", folder)
    assert record["image"] == "charts/c.png"
    assert record["max_tiles"] == 6


def test_questions_of_several_data_sets_are_sampled_once(folder: Path) -> None:
    """Repetitions are one question; two questions with one id cannot be told apart later."""
    for name, first in (("a", 0), ("b", 2), ("c", 3)):
        one, other = ({**QUESTION, "id": f"q{first + n}", "image": "0.png"} for n in range(2))
        write(folder / f"{name}.jsonl", [one, other])
    meta = {"a": {"annotation": "a.jsonl", "repeat_time": 3}, "b": {"annotation": "b.jsonl"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    pending = pending_rows(read(folder / "meta.json"), {}, folder / "out.jsonl")
    assert [one.data["id"] for one in pending] == ["q0", "q1", "q2", "q3"]
    (folder / "meta.json").write_text(json.dumps({**meta, "c": {"annotation": "c.jsonl"}}))
    with pytest.raises(UserError, match=r"c\.jsonl:1: id 'q3' is that of .*b\.jsonl:2, too; give"):
        pending_rows(read(folder / "meta.json"), {}, folder / "out.jsonl")


def test_image_bytes_become_files(folder: Path) -> None:
    output = folder / "out" / "rollouts.jsonl"
    data = encoded(3, "JPEG")
    one = row(folder, image=[{"bytes": data, "path": "x"}, "0.png"])
    named = portable_record(one, output, write=False)
    assert not output.parent.exists()
    record = portable_record(one, output)
    assert record == named
    digest = hashlib.sha256(data).hexdigest()[:32]
    assert record["image"][0] == f"images/{digest}.jpg"
    assert (output.parent / record["image"][0]).read_bytes() == data
    again = Row(json.loads(json.dumps(record)), output, 1, output.parent)
    assert list(map(pixels, again.load_images())) == list(map(pixels, one.load_images()))
    assert portable_record(row(folder, image=data), output)["image"] == record["image"][0]
    with pytest.raises(DataError, match="image of 3 bytes"):
        portable_record(row(folder, image=b"abc"), output)


# ---- the commands ----


class Fixed(Streams):
    """A sampler that answers with the number of the question's images and its tile budget."""

    name = "fixed"

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        self.asked += requests
        answers = [f"Final answer: {len(r.images)}" for r in requests]
        return [[Completion(text, (1,), (-0.5,), "stop")] * config.n for text in answers]

    def update_weights(self, named_parameters: Any) -> None: ...

    def close(self) -> None: ...


def test_from_parquet_to_pairs(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Rollouts of images that were bytes are read with their pictures, and go on after a kill."""
    rows = [
        {"id": i, "question": "How many?", "answer": str(i % 2), "image": {"bytes": encoded(i)}}
        for i in range(4)
    ]
    bad = {"id": 9, "question": "?", "answer": "1", "image": {"bytes": b"none"}}
    pq.write_table(pa.Table.from_pylist([bad, *rows]), folder / "charts.parquet")
    meta = {"charts": {"annotation": "charts.parquet", "max_dynamic_patch": 6}}
    (folder / "meta.json").write_text(json.dumps(meta))
    sampler = Fixed()
    monkeypatch.setattr("internvl.sampler.open_sampler", lambda *_, **__: sampler)
    output = folder / "out" / "rollouts.jsonl"
    command = ["sample", str(folder / "meta.json"), "--model", str(tiny_model), "--n", "2"]
    command += ["--output", str(output), "--max-bad", "1"]
    mmpr(command)
    assert [request.max_tiles for request in sampler.asked] == [6] * 4
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])  # it was killed
    mmpr(command)
    assert output.read_bytes() == whole
    assert "give --image-root" not in capsys.readouterr().out
    rollouts = read(output, "rollout")
    assert len(rollouts) == 8
    assert [one.tile_budget(12) for one in rollouts] == [6] * 8
    for one in rollouts:
        (image,) = one.load_images()
        assert pixels(image) == pixels(noise_image(30, 20, int(one.data["id"])))
    assert len(list((output.parent / "images").iterdir())) == 4
    verdicts = output.with_name("verdicts.jsonl")
    mmpr(["verify", str(output), "--output", str(verdicts)])
    outcomes = [one.data["outcome"] for one in read(verdicts, "verdict")]
    assert outcomes == ["wrong", "wrong", "correct", "correct"] * 2


def test_evaluation_shows_images_that_were_bytes(folder: Path) -> None:
    rows = [
        {**QUESTION, "image": [{"bytes": encoded(0)}]},
        {**QUESTION, "image": [{"path": "1.png"}], "id": "b"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    sampler = Fixed()
    facts, quarantine = {"model": "m"}, Quarantine(None)
    rows_read = read_questions([folder / "t.parquet"], quarantine=quarantine)
    with Verifier(VerifierPool()) as verifier:
        Evaluation(
            *(rows_read, EvaluationConfig(), facts, verifier),
            *(lambda: sampler, quarantine, folder / "e"),
        ).run()
    lines = (folder / "e" / "predictions.jsonl").read_text().splitlines()
    (stored,), (file,) = (json.loads(line)["image"] for line in lines)
    assert Path(stored).read_bytes() == encoded(0)
    assert Path(stored).parent == folder / "e" / "images"
    assert file == str(folder / "1.png")
