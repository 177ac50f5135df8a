"""Two gloo processes do what one does with twice the batch: gradients, norms, losses, metrics.

The ranks have different numbers of micro-batches and a last step that is smaller, or empty, on the
second one. All cases of a kind run in one start of two_ranks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import gradient_error
from tiny_llms import make_family
from trainer_cases import train, write_images
from two_ranks import CASES, IMAGES, WORLD, Case

pytestmark = pytest.mark.xdist_group("ranks")  # in one test process, so that it is one start
QUICK = ["mpo-uneven-last", "sft-empty-last", "fsdp-no-sync"]
# test_sft_packed.py has these: which samples share a step depends on the ranks
ELSEWHERE = [name for name in CASES if "packed" in name]
SLOW = [name for name in CASES if name not in QUICK + ELSEWHERE]
Start = tuple[Path, dict[str, list[dict[str, Any]]]]


def start(model: Path, folder: Path, cases: list[str]) -> Start:
    """Run the two ranks; returns the folder with the images and what each rank recorded."""
    write_images(folder, IMAGES)
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, str(root / "tests" / "two_ranks.py"), str(model), str(folder), *cases],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder, {
        name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)] for name in cases
    }


@pytest.fixture(scope="module")
def quick_start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return start(tiny_model, tmp_path_factory.mktemp("ranks"), QUICK)


@pytest.fixture(scope="module")
def slow_start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return start(tiny_model, tmp_path_factory.mktemp("ranks"), SLOW)


def check_shares(case: Case, ranks: list[dict[str, Any]], rows: list[str]) -> None:
    """Each row once an epoch, and each step's rows those of the one process, shared out."""
    places = [0, 0]
    together = []
    epochs = len(rows) // case.rows
    for step in range(len(case.shares[0]) * epochs):
        for rank in range(WORLD):
            share = case.shares[rank][step % len(case.shares[rank])]
            together += ranks[rank]["rows"][places[rank] : places[rank] + share]
            places[rank] += share
    assert together == rows
    for epoch in range(epochs):
        seen = rows[epoch * case.rows : (epoch + 1) * case.rows]
        assert sorted(seen, key=int) == [str(index) for index in range(case.rows)]


def check_case(name: str, model: Path, started: Start) -> None:
    folder, results = started
    case, ranks = CASES[name], results[name]
    one = train(
        *(case.stage, model, folder / f"{name}-one", case.make_rows(folder)), **case.run_options(1)
    )
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one.losses, rel=1e-6, abs=1e-7)
        assert rank["norms"] == pytest.approx(one.norms, rel=1e-5)
        if not case.fsdp:
            seen = [log["num_tokens"] for log in one.logs]
            assert [log["num_tokens"] for log in rank["logs"]] == seen
        assert len(rank["gradients"]) == len(one.gradients)
        for step, expected in enumerate(one.gradients):
            error = gradient_error(rank["gradients"][step], expected)
            print(f"{name}, step {step}: gradients differ by {error:.1e}")
            assert error < 1e-5
        for key, value in one.evaluation.items():
            if not case.fsdp:
                assert rank["evaluation"][key] == pytest.approx(value, rel=1e-4), key
    assert set(one.microbatches) <= {0, 1}
    first, second = (rank["microbatches"] for rank in ranks)
    if case.stage != "rl":
        check_shares(case, ranks, one.rows)
        assert first != second  # the ranks really differ in their number of micro-batches
    if case.stage == "mpo" and not case.fsdp:
        assert ranks[0]["delta"] == ranks[1]["delta"] == pytest.approx(one.delta, rel=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_are_one_process(name: str, tiny_model: Path, quick_start: Start) -> None:
    check_case(name, tiny_model, quick_start)


def test_a_backend_that_accelerate_passes_over_is_refused(quick_start: Start) -> None:
    for rank in range(WORLD):
        told = (quick_start[0] / f"refusal-{rank}.txt").read_text()
        assert told == "FSDP was asked for, but accelerate runs MULTI_CPU here"


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_ranks_are_one_process_in_every_case(
    name: str, tiny_model: Path, slow_start: Start
) -> None:
    check_case(name, tiny_model, slow_start)


@pytest.mark.slow
def test_two_ranks_are_one_process_over_qwen2(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tiny model is a Qwen3; InternVL2.5 and 3 come with Qwen2."""
    model = make_family(tmp_path_factory.mktemp("qwen2"), "qwen2")
    name = "mpo-every-loss"
    check_case(name, model, start(model, tmp_path_factory.mktemp("ranks"), [name]))
