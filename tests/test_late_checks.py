"""Rows that are checked when they are used: put aside in their turn; nothing takes their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import noise_image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import DataError, Quarantine, Row, read_rows
from internvl.errors import cli_guard
from sft.config import SFTConfig
from sft.trainer import SFTTrainer
from training import late_checks
from training.batches import BadRow, StepBatch
from training.late_checks import LateChecks


def chat(image: str | None, answer: str = "It is 3.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


GOOD = [chat("0.png"), chat("1.png", "No."), chat(None, "Sure.")]
BAD: list[Any] = [
    *(chat("gone.png"), chat("cut.png"), {"conversations": []}, "text"),
    *(chat(None, "so " * 70), chat(None, "<IMG_CONTEXT>"), chat("../x.png")),
]
REASONS = [
    *("no such image", "corrupt image", "field 'conversations'", "expected an object"),
    *("over max_length 100 (never cut)", "control token", "outside its root"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(2):
        noise_image(40, 40, index).save(tmp_path / f"{index}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    return tmp_path


def train(model: Path, folder: Path, found: Sequence[Any], **options: Any) -> tuple[Path, Any]:
    """One run over these rows; returns its output folder and its losses."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in found))
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    args = SFTConfig(
        output_dir=str(options.pop("output_dir", out)),
        train_file="t",
        **{"max_length": 100, "max_bad": 100, "per_device_train_batch_size": 16, **options},
        num_train_epochs=1,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )
    late = args.check_rows == "when_used"
    rows = read_rows(path, kind="conversation", quarantine=Quarantine(None), checked=not late)
    trainer = SFTTrainer(load_model(str(model)), args, rows, load_processor(str(model)))
    trainer.run()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Path(str(args.output_dir)), losses


def test_bad_rows_leave_their_places_empty(tiny_model: Path, folder: Path) -> None:
    """The step is the one of the good rows alone; the others are written with their reasons."""
    mixed = [GOOD[0], *BAD[:3], GOOD[1], *BAD[3:], GOOD[2]]
    late, losses = train(tiny_model, folder, mixed, check_rows="when_used")
    alone, wanted = train(tiny_model, folder, GOOD)
    assert len(losses) == len(wanted) == 1
    assert losses == pytest.approx(wanted, rel=1e-5)
    left, right = (load_file(out / "model.safetensors") for out in (late, alone))
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in right)
    lines = (late / "quarantine.used.jsonl").read_text().splitlines()
    found = {entry["line"]: entry["reason"] for entry in map(json.loads, lines)}
    assert sorted(found) == [2, 3, 4, 6, 7, 8, 9]
    for line, reason in zip(sorted(found), REASONS, strict=True):
        assert reason in found[line]


def test_a_step_of_bad_rows_only(tiny_model: Path, folder: Path) -> None:
    out, losses = train(
        *(tiny_model, folder, [BAD[0], *GOOD]),
        check_rows="when_used",
        per_device_train_batch_size=1,
    )
    assert sorted(losses)[0] == 0.0
    weights = load_file(out / "model.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_too_many_stop_the_run(
    tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_checks, "FEWEST_ROWS", 1)
    with pytest.raises(DataError, match=r"7 of 10 rows are bad, more than max_bad=0.5 allows; "):
        train(tiny_model, folder, [*GOOD, *BAD], check_rows="when_used", max_bad=0.5)


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_but_bad_rows_ends_the_run(tiny_model: Path, folder: Path, packing: bool) -> None:
    """Also of few rows, which come again and are counted once; packs are not looked for forever."""
    with pytest.raises(DataError, match=r"(\d) of \1 rows are bad, more than max_bad=0.5 allows; "):
        train(
            *(tiny_model, folder, BAD[:4] + BAD[5:]),  # packs take over-long text in pieces
            check_rows="when_used",
            packing=packing,
            max_steps=4,
            max_bad=0.5,
            per_device_train_batch_size=2,
            max_tokens_per_microbatch=60,
        )


def test_the_count_goes_on_after_a_restart(folder: Path) -> None:
    file = folder / "quarantine.used.jsonl"

    def step(*lines: int) -> StepBatch:
        rows = [Row({}, folder / "a.jsonl", line, folder) for line in lines]
        return StepBatch([], {}, rows=600, bad=[BadRow(row, "why") for row in rows])

    def checks() -> LateChecks:
        return LateChecks(file, 0.01, rank=0, device=torch.device("cpu"))

    first = checks()
    first.look(step(*range(1, 9)))  # 8 of 600, and of 1000 at least
    seen, bad = first.seen, first.bad  # a checkpoint; what comes after it is lost by a kill
    first.look(step(20, 21))
    with file.open("a") as out:
        out.write('{"torn')
    again = checks()
    again.go_on(seen, bad)
    again.look(step(7, 8, 9))  # 9 of 1200: two were known
    again.look(step(10, 11, 12))
    assert len(file.read_text().splitlines()) == 12
    with pytest.raises(DataError, match="28 of 2400 rows are bad"):
        again.look(step(*range(20, 36)))
    for seen in (0, 600):  # a checkpoint without a bad row
        fresh = checks()
        fresh.go_on(seen, 0)
        fresh.look(step(1))
        assert len(file.read_text().splitlines()) == 1


def test_an_error_in_a_worker_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that was taken away after the checks; torch would show the worker's traceback."""
    rows: Any = [Row({"image": "gone.png"}, folder / "a.jsonl", 1, folder)]
    loader: DataLoader[Any] = DataLoader(
        rows,
        collate_fn=lambda batch: [one.load_images() for one in batch],
        num_workers=1,
        multiprocessing_context="fork",
    )

    def read_all() -> None:
        for _ in loader:
            pass

    with pytest.raises(SystemExit):
        cli_guard(read_all)
    assert capsys.readouterr().err == f"error: {folder}/gone.png: no such image\n"
