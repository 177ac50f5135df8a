"""Pairs as trainers read them: MMPR's own files, TRL's columns; and which pairs are made."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from broken_rows import encode, pair
from hypothesis import given
from hypothesis import strategies as st
from plain import noise_image
from sampling_cases import command
from stage_runs import StageRun

from internvl.chat import load_processor
from internvl.data import Quarantine, Row, read_rows, write_jsonl
from internvl.encoding import Encoder
from internvl.errors import DataError
from mmpr.formats import content_parts, trl_record
from mmpr.pairs import PairConfig, build_pairs, like_pairs


def verdict(qid: str, right: bool, text: str, sample: int, **more: Any) -> dict[str, Any]:
    return {
        "id": qid, "question": f"<image>\nWhat of {qid}?", "image": f"{qid}.png", "answer": "5",
        "sample": sample, "completion": text, "outcome": "correct" if right else "wrong",
        "extracted": "5" if right else "7", "format_ok": True, "finish_reason": "stop", **more,
    }  # fmt: skip


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    """Three questions: an image, two images of several tiles, none."""
    images: dict[str, Any] = {"one": "one.png", "two": ["one.png", "two.png"], "none": None}
    noise_image(56, 56, 0).save(tmp_path / "one.png")
    noise_image(112, 56, 1).save(tmp_path / "two.png")
    asked = {"one": "<image>\nWhat of it?", "two": "<image>\nand <image>\nWhich?", "none": "2 + 3?"}
    rows = [
        verdict(qid, right, f"It is {n} here. Final Answer: {n}", sample=n)
        | {"question": asked[qid], "image": images[qid], "system": "Look closely."}
        for qid, (right, n) in itertools.product(images, [(True, 5), (False, 7), (False, 8)])
    ]
    write_jsonl(tmp_path / "v.jsonl", rows)
    return tmp_path / "v.jsonl"


# ---------------------------------------------------------------- which pairs


def grouped(verdicts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The verdicts of each question, which stand together."""
    return [list(group) for _, group in groupby(verdicts, key=itemgetter("id"))]


def test_the_same_pair_of_two_questions_is_written_once() -> None:
    rows = [
        verdict(qid, right, f"It is {right}.", n) | {"question": "?", "image": "a.png"}
        for qid in ("p", "q")
        for n, right in enumerate((True, False))
    ]
    pairs, report = build_pairs(grouped(rows), PairConfig())
    assert [one["id"] for one in pairs] == ["p-0"]
    assert report.left_out == {"the same pair as another question's": 1}
    assert report.without_pairs == {"only pairs that another question gives": 1}
    for row in rows[2:]:
        row["image"] = "b.png"
    assert len(build_pairs(grouped(rows), PairConfig())[0]) == 2


def question(right: list[int], wrong: list[int]) -> list[dict[str, Any]]:
    """Verdicts of one question whose completions have these lengths (all different texts)."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    rows = [(True, length) for length in right] + [(False, length) for length in wrong]
    return [verdict("q", good, next(letters) * length, n) for n, (good, length) in enumerate(rows)]


def test_balance_length_takes_replies_of_like_length() -> None:
    rows = question([10, 50, 90], [11, 48, 95, 400])
    pairs, report = build_pairs(grouped(rows), PairConfig(max_pairs=3, balance_length=True))
    lengths = [(len(one["chosen"]), len(one["rejected"])) for one in pairs]
    assert sorted(lengths) == [(10, 11), (50, 48), (90, 95)]
    assert report.as_dict()["chosen_over_rejected_length"] == {
        **dict.fromkeys(report.differences, 0), "0.8-1": 2, "1-1.25": 1
    }  # fmt: skip
    drawn = [build_pairs(grouped(rows), PairConfig(max_pairs=3, seed=seed))[0] for seed in range(9)]
    assert max(len(one["rejected"]) for others in drawn for one in others) == 400


@given(
    right=st.lists(st.integers(1, 99), min_size=1, max_size=7),
    wrong=st.lists(st.integers(1, 99), min_size=1, max_size=7),
)
def test_like_pairs_covers_the_table_evenly(right: list[int], wrong: list[int]) -> None:
    sides: Any = [
        [{"completion": "x" * length, "number": n} for n, length in enumerate(lengths)]
        for lengths in (right, wrong)
    ]
    made = [(a["number"], b["number"]) for a, b in like_pairs(*sides)]
    assert sorted(made) == [*itertools.product(range(len(right)), range(len(wrong)))]
    assert made == [(a["number"], b["number"]) for a, b in like_pairs(*sides)]
    # no completion is used more than needed, however many pairs are taken
    for taken in range(1, len(made) + 1):
        for side, number in ((0, len(right)), (1, len(wrong))):
            uses = Counter(one[side] for one in made[:taken])
            assert max(uses.values()) <= -(-taken // number) + 1
    ratio = [max(right[a], wrong[b]) / min(right[a], wrong[b]) for a, b in made]
    assert ratio[0] == min(ratio)


# ---------------------------------------------------------------- MMPR's own files


def as_internvl_reads(meta: Path) -> list[dict[str, Any]]:
    """What InternVL's `internvl_chat_dpo.py` asks of meta.json and its rows, started beside it."""
    rows = []
    for entry in json.loads(meta.read_text()).values():
        assert entry["annotation"].endswith("jsonl")
        assert type(entry["repeat_time"]) in (int, float) and isinstance(entry["root"], str)
        for line in (meta.parent / entry["annotation"]).read_text().splitlines():
            row = json.loads(line)
            images = row["image"] if "image" in row and len(row["image"]) != 0 else []
            images = images if type(images) is list else [images]
            assert row["question"].count("<image>") == len(images)
            for image in images:
                assert os.path.isfile(os.path.join(meta.parent, entry["root"], image))
            assert all(type(row[name]) is str for name in ("question", "chosen", "rejected"))
            rows.append(row)
    return rows


def test_mmpr_pairs_as_internvl_reads_them(verdicts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out/pairs.jsonl"
    meta = tmp_path / "out/meta.json"
    assert command("pair", verdicts, "--output", out, "--meta", meta, "--balance-length") == 0
    rows = as_internvl_reads(meta)
    assert len(rows) == 6 == json.loads(meta.read_text())["pairs"]["length"]
    assert sum("image" not in row for row in rows) == 2
    assert command("check", meta, "--max-bad", 0) == 0


def test_trl_s_pairs_without_their_images_are_not_written(
    verdicts: Path, tmp_path: Path, capsys: Any
) -> None:
    """The verdicts lie in another folder than the images: nothing is lost without a word."""
    elsewhere = tmp_path / "elsewhere/verdicts.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(verdicts.read_bytes())
    out = tmp_path / "pairs.parquet"
    assert command("pair", elsewhere, "--output", out, "--format", "trl") == 2
    assert "so no pair can be written; give --image-root" in capsys.readouterr().err
    assert not out.exists()
    root = ("--image-root", verdicts.parent)
    assert command("pair", elsewhere, "--output", out, "--format", "trl", *root) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "p.jsonl", "--format", "trl"], "--format trl is parquet; name it *.parquet"),
        (["--output", "p.parquet", "--format", "trl", "--meta", "m"], "are of MMPR's format, not"),
        (["--output", "p.jsonl", "--quarantine", "v.jsonl"], "v.jsonl is the verdicts itself"),
        (["--output", "p.jsonl", "--embed-images"], "--embed-images is an option of --format trl"),
        (["--output", "p.json", "--meta", "m.json"], "trainer reads only *.jsonl from a meta.json"),
    ],
)
def test_formats_that_do_not_go_together(
    words: list[str], message: str, verdicts: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(verdicts.parent)
    assert command("pair", verdicts, *words) == 2
    assert message in capsys.readouterr().err
    assert verdicts.is_file()


# ---------------------------------------------------------------- TRL's columns


def test_an_image_keeps_its_place_in_the_text(tmp_path: Path) -> None:
    assert content_parts("Left: <image>\nright: <image>\nWhich?") == [
        {"type": "text", "text": "Left: "}, {"type": "image", "text": None},
        {"type": "text", "text": "right: "}, {"type": "image", "text": None},
        {"type": "text", "text": "Which?"},
    ]  # fmt: skip
    (tmp_path / "good.png").write_bytes(encode("PNG"))
    row = Row(pair(chosen="a", rejected="b"), tmp_path / "p.jsonl", 1, tmp_path)
    assert trl_record(row, embed=False)["images"] == [
        {"bytes": None, "path": str(tmp_path / "good.png")}
    ]
    assert trl_record(row, embed=True)["images"] == [{"bytes": encode("PNG"), "path": "good.png"}]
    for wrong in ({"image": "none.png"}, {"image": None, "video": "v.mp4"}):
        with pytest.raises(DataError, match=r"no such image|a video"):
            trl_record(Row(pair(**wrong), tmp_path, 1, tmp_path), embed=False)


def test_export_of_published_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From MMPR's layout, repeat_time minded; a missing image is put aside."""
    import datasets

    (tmp_path / "MMPR/images").mkdir(parents=True)
    (tmp_path / "MMPR/images/good.png").write_bytes(encode("PNG"))
    write_jsonl(
        tmp_path / "MMPR/a.jsonl",
        [pair(id=str(n), chosen=f"{n}") for n in range(4)] + [pair(image="none.png")],
    )
    entry = {"root": "MMPR/images", "annotation": "MMPR/a.jsonl", "repeat_time": 2}
    (tmp_path / "MMPR/meta.json").write_text(json.dumps({"a": entry | {"max_dynamic_patch": 6}}))
    out = tmp_path / "p.parquet"
    words = ("export", tmp_path / "MMPR/meta.json", "--output", out, "--embed-images")
    assert command(*words, "--max-bad", 1) == 0
    told = capsys.readouterr().out
    assert "8 pairs" in told and "some rows name a tile budget" in told and "1 bad row" in told
    cache = str(tmp_path / "cache")
    read = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=cache)
    assert [one["chosen"][0]["content"][0]["text"] for one in read] == [*"0123", *"0123"]
    assert read[0]["images"][0].size == (30, 20)
    assert command("export", tmp_path / "MMPR/meta.json", "--output", tmp_path / "p.jsonl") == 2
    assert "name it *.parquet" in capsys.readouterr().err


def test_built_pairs_train_with_mpo_and_with_trl(
    verdicts: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """One step of each, on the same pairs; in both the policy is the reference before it."""
    import datasets
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    meta, parquet = tmp_path / "meta.json", tmp_path / "pairs.parquet"
    assert command("pair", verdicts, "--output", tmp_path / "pairs.jsonl", "--meta", meta) == 0
    assert command("pair", verdicts, "--output", parquet, "--format", "trl") == 0
    common = {"max_steps": 1, "use_cpu": True, "report_to": "none", "logging_steps": 1}
    run = StageRun(
        "mpo",
        {
            "model_name_or_path": str(tiny_model),
            "train_file": str(meta),
            "output_dir": str(tmp_path / "mpo"),
            "per_device_train_batch_size": 6,
            "loss_weights": [1.0, 0.0, 0.0],
            "save_strategy": "no",
            **common,
        },
    )
    run.finish()
    (first,) = [entry for entry in run.logged() if "loss" in entry]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)

    cache = str(tmp_path / "cache")
    train = datasets.load_dataset(
        "parquet", data_files=str(parquet), split="train", cache_dir=cache
    )
    processor = AutoProcessor.from_pretrained(tiny_model)
    options: dict[str, Any] = {**common, "save_strategy": "no", "bf16": False, "max_length": None}
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(tiny_model),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=6, **options),
        train_dataset=train,
        processing_class=processor,
    )
    batch = trainer.data_collator([train[n] for n in range(6)])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert 0 < trainer.state.log_history[0]["grad_norm"] < 1e3

    # TRL's tokens are ours, but for the line break that the template writes after a reply
    encoder = Encoder(load_processor(str(tiny_model)))
    rows = read_rows(meta, kind="pair", quarantine=Quarantine(None, 0))
    for number, side in itertools.product(range(6), (0, 1)):
        place = number + 6 * side
        example = encoder.pair(rows[number])
        ids = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist()
        ours = example.prompt_ids + example.completions[side]
        assert ids[:-1] == ours and processor.tokenizer.decode(ids[-1:]) == "\n"
