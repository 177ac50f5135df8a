"""SFTTrainer on what a program has loaded: a datasets.Dataset, a list of records."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from stream_cases import record, write_pictures
from trainer_cases import train

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.data.loaded import as_rows
from internvl.errors import UserError
from sft.config import SFTConfig
from sft.trainer import SFTTrainer

TURN = {"from": Value("string"), "value": Value("string")}


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    """Text, one image, two images; the fourth has one that is not there."""
    write_pictures(tmp_path)
    found = [record(number, kind) for number, kind in enumerate([0, 1, 6, 1])]
    found[3]["image"] = ["gone.png"]
    return found


def as_dataset(records: list[dict[str, Any]], folder: Path) -> Dataset:
    """Three of the records with their images inside, as the hub has them."""
    rows = [
        {
            "conversations": one["conversations"],
            "images": [
                {"bytes": (folder / name).read_bytes(), "path": None} for name in one["image"]
            ],
        }
        for one in records[:3]
    ]
    features = Features({"conversations": List(TURN), "images": List(Image())})
    return Dataset.from_list(rows, features=features)


def test_records_are_checked_and_trained_on(
    tiny_model: Path, tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    recorded = train(
        *("sft", tiny_model, out, records),
        image_root=str(tmp_path),
        max_bad=1,
        per_device_train_batch_size=4,
    )
    assert sorted(recorded.rows) == ["0", "1", "2"] and recorded.losses[0] > 0
    (line,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert (line["file"], line["line"]) == ("train_dataset", 4)
    assert "no such image" in line["reason"]


def test_a_dataset_is_its_records(
    tiny_model: Path, tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    """Its images stay encoded; a selection of it is read in its own order."""
    dataset = as_dataset(records, tmp_path)
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), train_file="none", use_cpu=True, report_to=[]
    )
    processor = load_processor(str(tiny_model))
    trainer = SFTTrainer(load_model(tiny_model), args, dataset, processor, dataset.select([0]))
    assert trainer.eval_dataset is not None and len(trainer.eval_dataset) == 1
    alone = as_rows(records[:3], "conversation", tmp_path, "records")
    assert alone is not None
    for ours, theirs in zip(trainer.train_dataset, alone, strict=True):
        assert ours.data["conversations"] == theirs.data["conversations"]
        assert [i.tobytes() for i in ours.load_images()] == [
            i.tobytes() for i in theirs.load_images()
        ]
    turned = as_rows(dataset.select([2, 0]), "conversation", tmp_path, "turned")
    assert turned is not None and len(turned) == 2
    assert [len(row.images) for row in turned] == [2, 0]
    assert turned.fingerprint() != trainer.train_dataset.fingerprint()  # type: ignore[attr-defined]


def test_a_fingerprint_holds_one_row_at_a_time(tmp_path: Path) -> None:
    """Of a hundred times the bytes that it may take."""
    rows = [{"images": [bytes([place]) * 100_000]} for place in range(100)]
    found = as_rows(Dataset.from_list(rows), "conversation", tmp_path, "rows")
    assert found is not None
    tracemalloc.start()
    try:
        found.fingerprint()  # type: ignore[attr-defined]
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_rows_stay_as_they_are(tmp_path: Path) -> None:
    rows = [Row({}, tmp_path / "a.jsonl", 1, tmp_path)]
    assert as_rows(rows, "conversation", tmp_path, "x") is rows
    assert as_rows(None, "conversation", tmp_path, "x") is None


def test_what_has_no_rows_by_number(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"a": 1}])
    for found, told in (
        (dataset.to_iterable_dataset(), "eval_dataset is a IterableDataset, a stream, which a run"),
        (dataset[:1], "eval_dataset is a dict; give a datasets.Dataset, a list of records, or"),
        (DatasetDict(test=dataset), "of several splits: give one, eval_dataset['test']"),
        ([], "eval_dataset is empty"),
        (dataset.select([]), "eval_dataset is empty"),
        ("rows.jsonl", "eval_dataset is a str; give a datasets.Dataset, a list of records, or"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            as_rows(found, "conversation", tmp_path, "eval_dataset")
