"""Records of every form a data set has them in, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plain import noise_image
from record_cases import QUESTION, encoded, pixels, read, row, write

from internvl.chat import load_processor
from internvl.data import (
    Quarantine,
    Row,
    check_images,
    find_fault,
    image_fault,
    portable_record,
    read_rows,
)
from internvl.data.records import tidy_record
from internvl.data.rows import look_at_images
from internvl.encoding import Encoder
from internvl.errors import DataError
from internvl.sampler import request_of
from mmpr.sample import make_request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(index))
    return tmp_path


# ---- files ----


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.json",
            b'[{"id": 1}]',
            r"one JSON list.* jq -c '\.\[\]' .*/a\.json > .*/a\.lines\.jsonl",
        ),
        (
            "a.jsonl",
            b'\xef\xbb\xbf[\r\n  {"id": 1}\r\n]',
            "one JSON list, but a record is expected",
        ),
        ("a.json", b'{"id": 1}\n{"id": 2}', r"a record on each line is named \*\.jsonl"),
        ("a.jsonl", '{"id": 1}'.encode("utf-16"), "not JSON lines, but text in UTF-16; write it"),
        ("a b.jsonl.gz", b"\x1f\x8b\x08", "not JSON lines, but a packed file; unpack it first"),
        ("a.jsonl", b"PAR1", r"but a parquet file; name it \*\.parquet"),
        ("a.arrow", b"\xff\xff\xff\xff", "but an Arrow file; give the folder that save_to_disk"),
    ],
)
def test_files_of_another_format(folder: Path, name: str, content: bytes, told: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read(folder / name, "conversation")


def test_a_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    """And an id that is a number: it becomes its text."""
    lines = [json.dumps({**QUESTION, "id": n, "image": "0.png"}).encode() for n in ("a", 7)]
    (folder / "Übung 1.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    found = read(folder / "Übung 1.jsonl")
    assert [(one.data["id"], one.line) for one in found] == [("a", 1), ("7", 3)]
    assert [image_fault(one) for one in found] == [None, None]


def test_without_a_quarantine_file_the_first_reason_is_told(folder: Path) -> None:
    file = write(folder / "a.jsonl", [QUESTION, {"id": "q"}, {"id": "r"}])
    told = r"3 of 3 rows are bad, more than max_bad=0 allows; the first: .*a\.jsonl:1: 0 image\(s\)"
    with pytest.raises(DataError, match=told):
        read_rows(file, kind="question", quarantine=Quarantine(None, 0))


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
        assert look_at_images(one) == (None, [(30, 20)])
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
        ({"system": "\ud800"}, "field 'system' holds half of a surrogate pair"),
        ({"image": "https://a.b/c.png"}, "'https://a.b...' is not a path; save it as a file"),
        ({"image": ["s3://a/b.png"], "question": "<image>"}, "'s3://a...' is not a path;"),
        ({"image": "data:image/png;base64,iVBO"}, "'data:image/png;base64...' is not a path;"),
        ({"video": "http://a/b.mp4"}, "'http://a...' is not a path; save it as a file and give"),
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


def test_a_request_of_a_row_holds_no_pixels(folder: Path) -> None:
    """A batch that waits for a sampler costs no memory: each image is decoded when its turn is."""
    noise_image(40, 30, 1).save(folder / "late.png")
    asked = {"id": "a", "image": ["late.png", "late.png"], "answer": "1"}
    asked["question"] = "<image> and <image>"
    (one,) = read(write(folder / "rows.jsonl", [asked]))
    request = request_of(one, seed=3)
    assert (len(request.images), request.seed, request.max_tiles) == (2, 3, None)
    noise_image(40, 30, 2).save(folder / "late.png")
    assert [pixels(image) for image in request.images] == [pixels(noise_image(40, 30, 2))] * 2
    assert pixels(request.images[1]) == pixels(noise_image(40, 30, 2))
    (folder / "late.png").unlink()
    with pytest.raises(DataError, match=r"late\.png: no such image"):
        list(request.images)


# ---- paths ----


def test_paths_stay_in_their_root(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    for index in range(3):  # a relative root is that of the folder that one is in now
        (folder / f"cwd{index}").mkdir()
        (folder / f"cwd{index}" / "0.png").write_bytes(encoded(0))
        monkeypatch.chdir(folder / f"cwd{index}")
        assert image_fault(Row({"image": "0.png"}, folder, 1, Path())) is None


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
        "field 'question' is NoneType, expected a string",
    ]
    assert image_fault(lazy[0]) == lazy[0].fault
