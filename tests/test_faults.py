"""What users get wrong: bad rows are put aside with file, line and reason; the rest is one line.

The commands are called in this process as `python -m` and the console scripts call them, and
three of them as real processes.
"""

from __future__ import annotations

import importlib
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

from internvl.errors import UserError, cli_guard

GOOD_ROWS = 4


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line of a command that must fail without a traceback."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m MODULE` or a console script in this process."""

    def run(module: str, *words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            if module in ("sft", "mpo", "rl"):
                cli_guard(importlib.import_module(f"{module}.__main__").main)
            else:
                importlib.import_module(f"{module}.cli").main()
        except SystemExit as stop:
            code = stop.code
        return Ended(code or 0, *capsys.readouterr())

    return run


# ---- rows ----


def picture(path: Path) -> bytes:
    """A small good PNG, also written to `path`."""
    Image.new("RGB", (56, 56), (10, 60, 110)).save(path)
    return path.read_bytes()


def bomb() -> bytes:
    """The head of a PNG that claims 20000 x 20000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 60_001)

    def chunk(data: bytes) -> bytes:
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))

    return b"\x89PNG\r\n\x1a\n" + chunk(head) + chunk(body) + chunk(b"IEND")


@pytest.fixture
def bad_pairs(tmp_path: Path) -> tuple[Path, list[tuple[int, str]]]:
    """Pairs with every fault that a row can have, and where each must be found and why."""
    folder = tmp_path / "data"
    folder.mkdir()
    whole = picture(folder / "good.png")
    picture(tmp_path / "secret.png")
    (folder / "noise.png").write_bytes(b"this is no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    good = {
        "image": "good.png",
        "question": "<image>\nWhat is the red bar minus the blue bar?",
        "chosen": "The red bar is 5. The blue bar is 1. 5 - 1 = 4. Final Answer: 4",
        "rejected": "It looks clear from the chart. Final Answer: 2",
    }
    cases: list[tuple[Any, str]] = [
        ({"image": "noise.png"}, f"{folder}/noise.png: not an image that is read here"),
        ({"image": "empty.png"}, f"{folder}/empty.png: empty file"),
        ({"image": "cut.png"}, f"{folder}/cut.png: corrupt image: "),
        (
            {"image": "bomb.png"},
            f"{folder}/bomb.png: taken for a decompression bomb: Image size (400000000 pixels)",
        ),
        ({"image": "gone.png"}, f"{folder}/gone.png: no such image"),
        ({"image": "../secret.png"}, f"{folder}/../secret.png: outside its root {folder}"),
        ({"image": "link.png"}, f"{folder}/link.png: outside its root {folder}"),
        ({"image": str(tmp_path / "secret.png")}, "secret.png: outside its root"),
        ({"image": 3}, "field 'image' is int, expected a path, image bytes or a list of them"),
        ({"chosen": ""}, "field 'chosen' is empty"),
        ({"rejected": " \n"}, "field 'rejected' is empty"),
        ({"chosen": 4}, "field 'chosen' is int, expected a string"),
        ({"rejected": good["chosen"]}, "chosen and rejected are identical"),
        (
            {"question": "Which bar?", "image": ["good.png"] * 2},
            "2 image(s) but 0 <image> placeholder",
        ),
        ({"question": "<image><image> Which?"}, "1 image(s) but 2 <image> placeholder(s)"),
        (
            {"question": "<image> <IMG_CONTEXT>?"},
            "question holds the control token '<IMG_CONTEXT>'",
        ),
        ({"question": "<image>" + "red " * 300}, "tokens, over max_length 200"),
        (b'{"id": "torn", "question": "<image> Wh', "not valid JSON: "),
        (b'{"id": "caf\xe9"}', "not valid JSON: 'utf-8' codec can't decode"),
        (b'["a", "list"]', "the line is a JSON list, expected an object"),
    ]
    lines: list[bytes] = []
    wanted = []

    def add(row: Any) -> None:
        if isinstance(row, dict):
            row = json.dumps({"id": f"pair-{len(lines) + 1}", **good, **row}).encode()
        lines.append(row)

    for number in range(GOOD_ROWS):
        add({})
        for row, reason in cases[number::GOOD_ROWS]:
            add(row)
            wanted.append((len(lines), reason))
        add(b"")  # an empty line is no row
    file = folder / "pairs.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file, wanted


@pytest.fixture
def mpo_config(bad_pairs: tuple[Path, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_model),
        "output_dir": str(tmp_path / "out"),
        "train_file": str(bad_pairs[0]),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "max_length": 200,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }


def write_config(tmp_path: Path, options: Any) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    return str(file)


def test_bad_rows_are_put_aside_and_the_run_goes_on(
    command: Command,
    bad_pairs: tuple[Path, list[tuple[int, str]]],
    mpo_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    file, wanted = bad_pairs
    config = write_config(tmp_path, {**mpo_config, "max_bad": 100})
    ended = command("mpo", "--config", config)
    assert ended.code == 0
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    assert f"{len(wanted)} bad rows so far, see {quarantine}" in ended.out

    found = sorted(map(json.loads, quarantine.read_text().splitlines()), key=lambda e: e["line"])
    assert [entry["line"] for entry in found] == [line for line, _ in wanted]
    for entry, (line, reason) in zip(found, wanted, strict=True):
        assert reason in entry["reason"], line
    assert {entry["file"] for entry in found} == {str(file)}
    by_line = {entry["line"]: entry["row"] for entry in found}
    assert by_line[2]["image"] == "noise.png"  # the row itself, to mend it

    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == GOOD_ROWS / 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_too_many_bad_rows_stop_the_run(
    command: Command,
    bad_pairs: tuple[Path, list[tuple[int, str]]],
    mpo_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Those that the file shows by itself are enough here; no image is looked at."""
    shown = sum(
        "/" not in reason and "token" not in reason and "outside" not in reason
        for _, reason in bad_pairs[1]
    )
    total = GOOD_ROWS + len(bad_pairs[1])
    ended = command("mpo", "--config", write_config(tmp_path, mpo_config))
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    assert ended.error == (
        f"error: {shown} of {total} rows are bad, more than max_bad=0.05 allows; their reasons "
        f"are in {quarantine}. Mend them, or raise max_bad."
    )
    assert len(quarantine.read_text().splitlines()) == shown
    assert not (tmp_path / "out" / "model.safetensors").exists()

    config = write_config(tmp_path, {**mpo_config, "max_bad": len(bad_pairs[1]) - 1})
    said = command("mpo", "--config", config).error
    assert f"more than max_bad={len(bad_pairs[1]) - 1} allows" in said


# ---- options ----

NOT_HERE = "/no/such"
CASES: list[tuple[str, Any, str]] = [
    ("sft", {"lerning_rate": 1}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    ("rl", {"xyzzy": 1}, "unknown key 'xyzzy' (--help lists the options)"),
    ("sft", {"max_tiles": "twelve"}, "max_tiles is 'twelve'; expected a whole number"),
    ("sft", {"max_tiles": 1.5}, "max_tiles is 1.5; expected a whole number"),
    ("sft", {"max_tiles": [1, 2]}, "max_tiles is [1, 2]; expected one value"),
    ("sft", {"max_steps": None}, "max_steps is None; leave the line out to take the default"),
    ("sft", {"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number"),
    ("mpo", {"bf16": "perhaps"}, "bf16 is 'perhaps'; expected true or false"),
    ("mpo", {"save_strategy": False}, 'reads a bare no as false, write "no" with its quotes'),
    ("mpo", {"lr_scheduler_type": "cosin"}, "not one of its values; did you mean 'cosine'?"),
    ("mpo", {"loss_weights": 0.8}, "loss_weights is 0.8; expected a list"),
    ("mpo", {"loss_weights": [0.8, 0.2]}, "loss_weights is [0.8, 0.2]; give a number for"),
    ("mpo", {"beta": 0}, "beta is 0"),
    ("mpo", {"loss_type": "bco_pear"}, "loss_type has 'bco_pear'; did you mean 'bco_pair'?"),
    ("mpo", {"loss_type": ["ipo"], "label_smoothing": 0.1}, "label_smoothing is 0.1, which only"),
    ("mpo", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2; leave it at 1"),
    ("sft", {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at"),
    ("sft", {"loss_average": "median"}, "loss_average 'median' is not one of ['token', 'sample',"),
    ("sft", {"stop_gold_probability": 0.3}, "needs eval_file and eval_strategy: steps"),
    ("sft", {"resume": "yes"}, "resume is 'yes'; it is 'auto' or 'never'"),
    ("sft", {"resume_from_checkpoint": "x"}, "resume_from_checkpoint is not read"),
    ("sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, which is not"),
    ("sft", {"load_best_model_at_end": True}, "load_best_model_at_end is True, which is not"),
    ("sft", {"report_to": "nothing"}, "report_to names 'nothing', which is not installed"),
    ("sft", {"train_file": ""}, "train_file is missing: the JSONL (or meta.json) of conv"),
    ("sft", {"train_file": f"{NOT_HERE}.jsonl"}, f"{NOT_HERE}.jsonl: no such file"),
    ("mpo", {"eval_file": f"{NOT_HERE}.jsonl"}, f"{NOT_HERE}.jsonl: no such file"),
    (
        "sft",
        {"model_name_or_path": NOT_HERE},
        f"{NOT_HERE}: no config.json there; expected",
    ),
    ("rl", {"num_generations": 1}, "num_generations is 1; a group needs at least 2"),
    ("rl", {"sampler": "magic"}, "sampler is 'magic': one of auto, vllm, server, transformers"),
    ("rl", {"max_steps": -1}, "max_steps is missing: the number of optimizer steps"),
    ("rl", {"temperature": 0}, "temperature is 0"),
    ("sft", "a: [1", "config.yaml: not valid YAML: while parsing a flow sequence"),
    ("sft", "- a\n- b\n", "config.yaml: expected a mapping of options, one 'key: value' a line"),
    ("sft", "", "config.yaml: expected a mapping of options, one 'key: value' a line"),
]


@pytest.mark.parametrize(("stage", "options", "message"), CASES)
def test_a_wrong_configuration_is_one_line(
    command: Command, tmp_path: Path, stage: str, options: Any, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    base = {
        "model_name_or_path": str(tmp_path),
        "train_file": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
    }
    config = write_config(tmp_path, options if isinstance(options, str) else {**base, **options})
    ended = command(stage, "--config", config)
    assert message in ended.error
    assert ended.err.count("\n") == 1  # nothing beside it
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"sft --config {NOT_HERE}.yaml", f"--config {NOT_HERE}.yaml: no such file"),
        (f"sft --config={NOT_HERE}.yaml", f"--config {NOT_HERE}.yaml: no such file"),
        ("sft --config", "--config needs the path of a YAML file"),
        ("sft", "the following arguments are required: --model_name_or_path"),
        ("mpo --lerning-rate 1", "unknown option --lerning-rate; did you mean 'learning_rate'?"),
        ("mpo --loss_weights 1 x 1", "argument --loss_weights/--loss-weights: invalid float"),
        (
            "mpo --model_name_or_path m --train_file t stray",
            "not used by the HfArgumentParser: ['s",
        ),
        ("rl --seed x --model_name_or_path m", "argument --seed: invalid int value: 'x'"),
        ("mmpr", "the following arguments are required: COMMAND"),
        ("mmpr smaple", "invalid choice: 'smaple'"),
        ("mmpr verify r.jsonl --ouput v.jsonl", "the following arguments are required: --output"),
        ("mmpr pair v --output p --colour red", "unrecognized arguments: --colour red"),
        ("mmpr sample q --model m --n x --output r", "argument --n: invalid int value: 'x'"),
        (f"mmpr pair {NOT_HERE}.jsonl --output p", f"{NOT_HERE}.jsonl: no such file"),
        (f"mmpr sample q --model {NOT_HERE} --output r", f"{NOT_HERE}: no config.json there"),
        ("mmpr stats .", ".: a folder without parquet files, and not made by save_to_disk"),
        ("cascade demoo", "invalid choice: 'demoo'"),
        ("cascade demo --speed 1", "unrecognized arguments: --speed 1"),
        ("cascade demo --seed x", "argument --seed: invalid int value: 'x'"),
        ("cascade demo --preset huge", "argument --preset: invalid choice: 'huge'"),
        (f"cascade report {NOT_HERE}", f"{NOT_HERE}/manifest.json: not found; a report needs it"),
        ("cascade world w --sft -3", "--sft is -3; give a number of records"),
        ("cascade evaluate q --model m --output e", "q: no such file"),
        ("cascade evaluate q --model m --output e --samples 0", "--samples is 0; give 1 or more"),
    ],
)
def test_a_wrong_command_is_one_line(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command(*words.split())
    assert message in ended.error
    assert ended.err.count("\n") == 1


def test_a_folder_that_is_no_checkpoint(command: Command, tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    rows = str(tiny_world / "heldout.jsonl")
    out = str(tmp_path / "out")
    said = command("cascade", "evaluate", rows, "--model", str(tiny_world), "--output", out).error
    assert said == (
        f"error: {tiny_world}: no config.json there; expected an InternVL checkpoint folder"
    )
    options = {"train_file": str(tiny_world / "sft.jsonl"), "output_dir": out}
    for model, message in (
        (tiny_world, f"error: {tiny_world}: no config.json there; expected an InternVL"),
        (tmp_path, f"error: {tmp_path}/config.json: model_type is None, expected 'internvl' or"),
    ):
        config = write_config(tmp_path, {**options, "model_name_or_path": str(model)})
        assert command("sft", "--config", config).error.startswith(message)


def test_options_that_do_not_go_together(
    command: Command, tiny_world: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Found by transformers or PEFT when the trainer is made: still one line."""
    base = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(tiny_world / "sft.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "disable_tqdm": True,
    }
    for changes, message in (
        ({"eval_strategy": "steps"}, "asks for evaluations: give an eval_file"),
        ({"use_peft": True, "lora_target_modules": ["nothing"]}, "Target modules {'nothing'} not"),
    ):
        ended = command("sft", "--config", write_config(tmp_path, {**base, **changes}))
        assert message in ended.error


def test_a_place_that_cannot_be_written(command: Command, tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    under = str(tmp_path / "file" / "out.jsonl")
    rows = str(tiny_world / "heldout.jsonl")
    assert command("mmpr", "verify", rows, "--output", under).error == (
        f"error: {under}.quarantine.jsonl: Not a directory"
    )


def test_other_faults_keep_their_traceback() -> None:
    """Only what a user can mend becomes one line."""

    def wrong() -> None:
        raise FileNotFoundError(2, "No such file or directory", "ours")

    with pytest.raises(FileNotFoundError):
        cli_guard(wrong)


def test_an_error_of_several_lines_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise UserError("first\nsecond")

    with pytest.raises(SystemExit) as stop:
        cli_guard(wrong)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"
