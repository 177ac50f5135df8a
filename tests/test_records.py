"""Records of every form a data set has them in, and what is said of those that cannot be used."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from plain import noise_image

from cascade.evaluate import EvaluationConfig, evaluate
from internvl.chat import load_processor
from internvl.data import (
    Quarantine,
    Row,
    check_images,
    find_fault,
    image_fault,
    portable_record,
    read_rows,
    write_jsonl,
)
from internvl.encoding import Encoder
from internvl.errors import DataError, UserError
from internvl.records import tidy_record
from internvl.sampler import Completion, SampleRequest, SamplingConfig
from internvl.tables import open_tables
from mmpr.cli import main as mmpr
from mmpr.sample import make_request
from mmpr.stats import detect_kind

QUESTION = {"id": "q", "question": "<image>\nHow many?", "answer": "3"}


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """The bytes of an image file of 30 x 20 pixels."""
    out = io.BytesIO()
    noise_image(30, 20, seed).save(out, kind)
    return out.getvalue()


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(index))
    return tmp_path


def row(folder: Path, **fields: Any) -> Row:
    return Row({**QUESTION, **fields}, folder / "rows.jsonl", 1, folder)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def read(path: Path, kind: Any = "question", **options: Any) -> list[Row]:
    quarantine = Quarantine(path.with_name("quarantine.jsonl"), max_bad=100)
    return list(read_rows(path, kind=kind, quarantine=quarantine, **options))


def reasons(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


# ---- images and videos of a record ----


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_every_form_of_an_image(folder: Path, kind: str) -> None:
    data = encoded(7, kind)
    (folder / "7").write_bytes(data)
    forms: list[Any] = [
        *("7", ["7"], data, [data], str(folder / "7"), {"bytes": None, "path": "7"}),
        *({"bytes": data, "path": None}, {"bytes": data, "path": "gone.png"}, [{"path": "7"}]),
    ]
    shown = []
    for form in forms:
        one = row(folder, image=form)
        assert find_fault(one.data, "question") is None
        assert image_fault(one) is None
        assert one.image_sizes() == [(30, 20)]
        (image,) = one.load_images()
        shown.append(pixels(image))
    assert len(set(shown)) == 1


@pytest.mark.parametrize("nothing", [None, "", []])
def test_no_image(folder: Path, nothing: Any) -> None:
    one = row(folder, image=nothing, question="How many?")
    assert tidy_record(one.data, "question") == one.data
    assert find_fault(one.data, "question") is None
    assert one.load_images() == one.image_sizes() == one.image_sources() == []


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (3, "field 'image' is int, expected a path, image bytes or a list of them"),
        ([""], "field 'image' is a list with empty str, expected a path, image bytes or"),
        (["a.png", None], "field 'image' is a list with NoneType, expected"),
        ({"url": "x"}, "field 'image' is an object with 'url', expected"),
        ({"bytes": None, "path": None}, "field 'image' is an object with 'bytes', 'path'"),
        ([["a.png"]], "field 'image' is a list with list, expected"),
        (b"", "field 'image' is empty bytes, expected"),
    ],
)
def test_what_is_no_image(image: Any, fault: str) -> None:
    assert str(find_fault({**QUESTION, "image": image}, "question")).startswith(fault)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"max_tiles": 0}, "field 'max_tiles' is 0, expected a whole number of at least 1"),
        ({"max_tiles": True}, "field 'max_tiles' is True, expected a whole number"),
        ({"num_frames": "8"}, "field 'num_frames' is '8', expected a whole number"),
        ({"video": "v.mp4", "image": "a.png"}, "both 'image' and 'video' are given"),
        ({"images": "a.png"}, "field 'images' beside 'image', or not a list; give one of them"),
        ({"question": "a <video>"}, "0 video(s) but 1 <video> placeholder(s)"),
        ({"question": "<image>"}, "0 image(s) but 1 <image> placeholder(s)"),
        ({"image": ["a", "b"], "question": "Q"}, "2 image(s) but 0 <image> placeholder(s)"),
        ({"video": "v", "question": "<video><video>"}, "1 video(s) but 2 <video> placeholder(s)"),
        ({"question": "\ud800"}, "field 'question' holds half of a surrogate pair"),
    ],
)
def test_faults_of_pictures(fields: dict[str, Any], fault: str) -> None:
    record = tidy_record({"id": "q", "question": "Q", "answer": "3", **fields}, "question")
    assert str(find_fault(record, "question")).startswith(fault)


def test_one_image_needs_no_placeholder() -> None:
    """As in InternVL's published code; several images do."""
    pair = {"image": "a.png", "question": "Which?", "chosen": "a", "rejected": "b"}
    assert tidy_record(pair, "pair")["question"] == "<image>\nWhich?"
    turns = [("human", "Hi"), ("gpt", "Yes?"), ("human", "And?"), ("gpt", "So.")]
    chat: dict[str, Any] = {
        "images": ["a.png"],
        "conversations": [{"from": f, "value": v} for f, v in turns],
    }
    tidy = tidy_record(chat, "conversation")
    assert [turn["value"] for turn in tidy["conversations"]] == [
        *("<image>\nHi", "Yes?", "And?", "So."),
    ]
    assert tidy["image"] == ["a.png"]
    assert "images" not in tidy
    assert chat["conversations"][0]["value"] == "Hi"  # the record itself is not changed
    chat["conversations"][2]["value"] = "<image> And?"  # it stands in a later turn
    assert tidy_record(chat, "conversation")["conversations"][0]["value"] == "Hi"


@pytest.mark.parametrize("data_set_tiles", [None, 6])
def test_tile_budgets(folder: Path, data_set_tiles: int | None) -> None:
    def budget(**fields: Any) -> int | None:
        return Row({**QUESTION, **fields}, folder, 1, folder, data_set_tiles).tile_budget(None)

    assert budget() == data_set_tiles
    assert budget(max_tiles=24) == 24
    assert budget(video="v.mp4", max_tiles=24) == 1
    assert row(folder).tile_budget(12) == 12


def test_a_video_is_a_line_a_frame(folder: Path) -> None:
    one = row(folder, video="clip", num_frames=2, question="<video>\nWho?")
    assert one.prompt_text(one.data["question"]) == "Frame1: <image>\nFrame2: <image>\nWho?"
    assert one.prompt_text("Where? <video>") == "Where? Frame1: <image>\nFrame2: <image>\n"
    assert row(folder, video="clip").num_frames == 8
    assert row(folder).prompt_text("<video>") == "<video>"
    assert tidy_record(row(folder, video="clip", question="Who?").data, "question")[
        "question"
    ].startswith("<video>\n")


def test_a_video_for_trainer_and_sampler(folder: Path, tiny_model: Path) -> None:
    """One prompt for both: a line, an image and a tile for each frame."""
    clip = folder / "clip"
    clip.mkdir()
    for index in range(9, 12):
        noise_image(120, 60, index).save(clip / f"frame{index}.png")
    clips = [
        {"id": "a", "video": "clip", "num_frames": 3, "question": "Who?", "answer": "1"},
        {"id": "b", "video": "none", "question": "Who?", "answer": "1"},
        {"id": "c", "video": "out", "question": "Who?", "answer": "1"},
    ]
    (folder / "out").mkdir()
    (folder / "out" / "1.png").symlink_to(tiny_model / "config.json")
    found = read(write(folder / "rows.jsonl", clips))
    aside = Quarantine(folder / "images.jsonl", max_bad=2)
    (one,) = check_images(found, quarantine=aside)
    lines = (folder / "images.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [
        f"{folder}/none: no such video",
        f"{folder}/out/1.png: outside its root {folder}",
    ]
    encoder = Encoder(load_processor(str(tiny_model)))
    example = encoder.completions(one, [[1]])
    assert len(example.tiles) == 3
    assert encoder.length(one, "question") == len(example.prompt_ids)
    request = make_request(one, seed=0)
    assert request.question == "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nWho?"
    assert request.max_tiles == 1
    frames = [
        pixels(noise_image(120, 60, index)) for index in (9, 10, 10)
    ]  # the middles of three thirds
    assert [pixels(image) for image in request.images] == frames
    record = portable_record(one, folder / "r" / "rollouts.jsonl")
    assert (record["video"], record["num_frames"]) == ("clip", 3)


# ---- paths ----


def test_paths_stay_in_their_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.png").write_bytes(encoded(1))
    (folder / "link").symlink_to(outside)
    (folder / "inner").symlink_to(folder / "1.png")
    (folder.parent / f"{folder.name}-twin").mkdir()  # a name that begins like the root's
    (folder.parent / f"{folder.name}-twin" / "0.png").write_bytes(encoded(0))
    good = ["0.png", "./0.png", "inner", f"../{folder.name}/0.png", str(folder / "0.png")]
    for name in good:
        assert image_fault(row(folder, image=name)) is None, name
    bad = [
        *("link/secret.png", str(outside / "secret.png"), "../../../../../../etc/passwd"),
        *(f"../{folder.name}-twin/0.png", "link/../secret.png"),
    ]
    for name in bad:
        fault = image_fault(row(folder, image=name))
        assert fault == f"{folder / name}: outside its root {folder}", name
        with pytest.raises(DataError, match="outside its root"):
            row(folder, image=["0.png", name]).load_images()
    for name in ("a\0.png", "\udc80\ud800.png"):
        assert "not a path" in str(image_fault(row(folder, image=name)))
    assert image_fault(Row({"image": str(folder / "0.png")}, folder, 1, Path("/"))) is None
    link = folder / "root"
    link.symlink_to(folder)
    assert image_fault(Row({"image": "0.png"}, folder, 1, link)) is None
    assert "outside" in str(image_fault(row(folder, video="link")))


# ---- Hugging Face data sets ----


def hub_rows(folder: Path) -> list[dict[str, Any]]:
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
    rows = hub_rows(folder)
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
    data_set = datasets.Dataset.from_list(hub_rows(folder))
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
        (folder / "state", "not written by save_to_disk"),
        (Path("owner/name"), "hub is downloaded first: hf download owner/name --repo-type"),
        (Path("hf://datasets/owner/name"), "no such file"),
        (folder / "gone.jsonl", r"gone\.jsonl: no such file$"),
    ):
        with pytest.raises(DataError, match=reason):
            read_rows(path, kind="question", quarantine=Quarantine(None))


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
        "b": {"annotation": "b.parquet", "repeat_time": 2, "length": 1},
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


# ---- the quarantine ----


def test_quarantine_lines_are_json(folder: Path) -> None:
    """Also where the row is none: bytes, NaN, half characters, nesting, huge numbers."""
    lines = [
        b'{"id": "a", "question": "\\ud800", "answer": NaN}',
        b'{"id": "b", "question": "Q", "answer": Infinity}',
        b'{"id": "c\\ud800", "question": "", "answer": "1"}',
        b'{"id": "d", "deep": ' + b"[" * 100_000,
        b'{"id": "e", "n": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
        b"\0",
        "\ufeff".encode() + json.dumps({**QUESTION, "question": "Q"}).encode(),  # good: a BOM
    ]
    (folder / "rows.jsonl").write_bytes(b"\n\n".join(lines))
    (good,) = read(folder / "rows.jsonl")
    assert good.line == 15

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    text = (folder / "quarantine.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    assert [entry["line"] for entry in found] == [1, 3, 5, 7, 9, 11, 13]
    assert found[3]["reason"] == "not valid JSON: nested too deeply"
    assert [entry["reason"][:14] for entry in found[4:]] == ["not valid JSON"] * 3
    assert found[0]["row"]["question"] == "\\ud800"
    assert found[1]["row"]["answer"] == "inf"


def test_rows_that_are_looked_at_when_they_are_used(folder: Path) -> None:
    rows = [QUESTION, {**QUESTION, "image": "0.png"}, {"id": 3}]
    path = write(folder / "rows.jsonl", rows)
    quarantine = Quarantine(None, max_bad=0)
    lazy = read_rows(path, kind="question", quarantine=quarantine, checked=False)
    assert len(lazy) == 3
    assert quarantine.count == 0
    assert [one.fault for one in lazy] == [
        "0 image(s) but 1 <image> placeholder(s)",
        None,
        "field 'answer' is NoneType, expected a string or a list of strings",
    ]
    assert image_fault(lazy[0]) == lazy[0].fault


# ---- the commands ----


class Fixed:
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
    pq.write_table(pa.Table.from_pylist(rows), folder / "charts.parquet")
    meta = {"charts": {"annotation": "charts.parquet", "max_dynamic_patch": 6}}
    (folder / "meta.json").write_text(json.dumps(meta))
    sampler = Fixed()
    monkeypatch.setattr("internvl.sampler.open_sampler", lambda *_, **__: sampler)
    output = folder / "out" / "rollouts.jsonl"
    command = ["sample", str(folder / "meta.json"), "--model", str(tiny_model), "--n", "2"]
    command += ["--output", str(output)]
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
    evaluate(
        read(folder / "t.parquet"), sampler, EvaluationConfig(), model="m", output=folder / "e"
    )
    lines = (folder / "e" / "predictions.jsonl").read_text().splitlines()
    (stored,), (file,) = (json.loads(line)["image"] for line in lines)
    assert Path(stored).read_bytes() == encoded(0)
    assert Path(stored).parent == folder / "e" / "images"
    assert file == str(folder / "1.png")
