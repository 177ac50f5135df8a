"""Two real processes share the checks of rows, before the first step and while training goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plain import noise_image

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]
ROOT = Path(__file__).parents[1]
ROWS, BAD = 23, (4, 9, 17)  # lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "It is 3."}]
    lines = []
    for line in range(1, ROWS + 1):
        noise_image(40, 40, line).save(tmp_path / f"{line}.png")
        lines.append(json.dumps({"image": f"{line}.png", "conversations": turns}))
    for line in BAD:
        (tmp_path / f"{line}.png").write_bytes(b"broken")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def train(model: Path, folder: Path, check_rows: str, max_bad: int) -> subprocess.CompletedProcess:
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {
        "model_name_or_path": model,
        "train_file": folder / "rows.jsonl",
        "output_dir": folder / "out",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "use_cpu": "true",
        "check_rows": check_rows,
        "max_bad": max_bad,
        "save_strategy": "no",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, "-m", *launch, "-m", "sft", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("check_rows", "name", "steps"),
    [("before", "quarantine.jsonl", 5), ("when_used", "quarantine.used.jsonl", 6)],
)
def test_two_ranks_put_aside_the_same_rows(
    tiny_model: Path, folder: Path, check_rows: str, name: str, steps: int
) -> None:
    ended = train(tiny_model, folder, check_rows, max_bad=3)
    assert ended.returncode == 0, ended.stderr
    entries = [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]
    assert sorted(entry["line"] for entry in entries) == list(BAD)
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == steps
    if check_rows == "before":  # each rank looked at its half
        known = [
            (folder / "out" / "checked_rows" / f"{rank}.bin").stat().st_size for rank in (0, 1)
        ]
        assert sum(known) == 16 * (ROWS - len(BAD))
        assert min(known) > 0


def test_two_ranks_stop_together(tiny_model: Path, folder: Path) -> None:
    ended = train(tiny_model, folder, "when_used", max_bad=2)
    assert ended.returncode != 0
    # each says so, unless the launcher ends it first
    assert ended.stderr.count("rows are bad, more than max_bad=2 allows") in (1, 2)
