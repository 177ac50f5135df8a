"""The faults that a newcomer's data have, each alone among 63 good rows, at default options.

One bad row of 64 is less than max_bad, so the run goes on, and the row is in the quarantine with
file, line and reason before the model makes a step.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from plain import noise_image
from test_faults import Command, bomb
from test_faults import command as command

from internvl.chat import load_processor
from internvl.encoding import Encoder
from mpo.config import MPOConfig
from training.stage import Stage

ROWS, BAD_LINE, MAX_LENGTH = 64, 17, 200
GOOD = {"image": "0.png", "question": "<image>\nHow many?", "chosen": "3", "rejected": "4"}


def jpeg() -> bytes:
    out = io.BytesIO()
    noise_image(200, 100, 1).save(out, "JPEG")
    return out.getvalue()


def write_pictures(folder: Path) -> None:
    """Good ones, the bad ones, and one that is good but lies outside."""
    folder.mkdir()
    noise_image(56, 56, 0).save(folder / "0.png")
    (folder / "cut.jpg").write_bytes(jpeg()[: len(jpeg()) // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bomb())
    noise_image(56, 56, 0).save(folder.parent / "outside.png")


Fault = tuple[dict[str, Any] | bytes, str]
FAULTS: dict[str, Fault] = {
    "missing image": ({"image": "nope.png"}, "{folder}/nope.png: no such image"),
    "truncated JPEG": ({"image": "cut.jpg"}, "{folder}/cut.jpg: corrupt image: "),
    "zero-byte image": ({"image": "zero.jpg"}, "{folder}/zero.jpg: empty file"),
    "../../etc/passwd": (
        {"image": "../../etc/passwd"},
        "{folder}/../../etc/passwd: outside its root {folder}",
    ),
    "real picture outside the root": (
        {"image": "../outside.png"},
        "{folder}/../outside.png: outside its root {folder}",
    ),
    "20000 x 20000 pixels": ({"image": "bomb.png"}, "{folder}/bomb.png: taken for a decompression"),
    "empty chosen": ({"chosen": ""}, "field 'chosen' is empty"),
    "chosen is rejected": ({"rejected": "3"}, "chosen and rejected are identical"),
    "image but no <image>": (
        {"question": "How many?"},
        "1 image(s) but 0 <image> placeholder(s)",
    ),
    "two <image>, one image": (
        {"question": "<image>\n<image>\nHow many?"},
        "1 image(s) but 2 <image> placeholder(s)",
    ),
    "prompt over max_length": (
        {"question": "<image>\n" + "red " * MAX_LENGTH},
        f"tokens, over max_length {MAX_LENGTH} (never cut",
    ),
    "malformed JSON line": (b'{"image": "0.png", "question": "<image>\n', "not valid JSON: "),
}


def write_rows(folder: Path, bad: dict[str, Any] | bytes) -> Path:
    """63 good lines and the bad one."""
    lines = [json.dumps({"id": f"{number}", **GOOD}).encode() for number in range(ROWS)]
    own = bad.strip() if isinstance(bad, bytes) else json.dumps({**GOOD, **bad}).encode()
    lines[BAD_LINE - 1] = own
    file = folder / "pairs.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer") / "data"
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def open_rows(tiny_model: Path, pictures: Path) -> Callable[[Path, Path], Stage]:
    """What `python -m mpo` reads its rows with, without the model."""
    encoder = Encoder(load_processor(str(tiny_model)), max_length=MAX_LENGTH)

    def stage(file: Path, output: Path) -> Stage:
        args = MPOConfig(str(output), train_file=str(file), use_cpu=True, disable_tqdm=True)
        model: Any = None
        return Stage(model, encoder.processor, encoder, args, output / "quarantine.jsonl")

    return stage


@pytest.mark.parametrize("name", FAULTS)
def test_each_is_put_aside_alone(
    name: str, pictures: Path, open_rows: Callable[[Path, Path], Stage], tmp_path: Path
) -> None:
    bad, reason = FAULTS[name]
    file = write_rows(pictures, bad)
    rows = open_rows(file, tmp_path).rows(str(file), "pair")
    assert len(rows) == ROWS - 1
    assert BAD_LINE not in {row.line for row in rows}
    (entry,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (entry["file"], entry["line"]) == (str(file), BAD_LINE)
    assert reason.format(folder=pictures) in entry["reason"]


def test_a_file_that_never_writes_the_placeholder_means_it_in_front(
    pictures: Path, open_rows: Callable[[Path, Path], Stage], tmp_path: Path
) -> None:
    """As InternVL's published code reads it; beside rows that write it, it is a fault (above)."""
    row = json.dumps({**GOOD, "question": "How many?"})
    file = pictures / "without.jsonl"
    file.write_text("".join(f"{row}\n" for _ in range(ROWS)))
    rows = open_rows(file, tmp_path).rows(str(file), "pair")
    assert [row.data["question"] for row in rows] == ["<image>\nHow many?"] * ROWS


def test_the_run_goes_on_to_its_end(
    command: Command, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """From MMPR's own files, with no glue; too many bad rows would have stopped it."""
    shutil.copytree(pictures, tmp_path / "MMPR")
    write_rows(tmp_path / "MMPR", {"image": "cut.jpg"})
    entry = {"root": ".", "annotation": "pairs.jsonl", "data_augment": False, "repeat_time": 1}
    meta = tmp_path / "MMPR/meta.json"
    meta.write_text(json.dumps({"noise": {**entry, "length": ROWS}}))
    options = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(meta),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    config = tmp_path / "mpo.yaml"
    config.write_text(yaml.safe_dump(options))
    ended = command("mpo", "--config", str(config))
    assert ended.code == 0, ended.err
    quarantine = tmp_path / "out/quarantine.jsonl"
    told = ended.out.index(f"{meta}: 1 bad rows so far, see {quarantine}")
    assert told < ended.out.index("first loss")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1e-4}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"loss_type": ["sigmoid", "bco_pear", "sft"]}, "bco_pear"),
    ],
)
def test_a_wrong_option_is_found_before_the_model_is_looked_for(
    command: Command, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base = {"model_name_or_path": "/no/model", "train_file": "/no/file.jsonl", "output_dir": "out"}
    config = tmp_path / "mpo.yaml"
    config.write_text(yaml.safe_dump({**base, **options}))
    assert message in command("mpo", "--config", str(config)).error
