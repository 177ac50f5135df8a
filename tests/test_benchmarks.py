"""The training benchmarks: their FLOP model against hand counts, their fixed data, and one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks import data  # noqa: E402
from benchmarks._flops import (  # noqa: E402
    Work,
    forward_flops,
    forward_parts,
    packed_work,
    padded_work,
    step_flops,
)
from benchmarks._report import replace_part  # noqa: E402

# one layer each, 4 patches of 2 x 2 pixels a tile, 1 visual token, width 2, vocabulary 10
HAND = data.Shape(
    *("hand", 4, 1, 2, 1, 8, 1, 2, 2, 1, 4, 6, 10),
    patch=2,
)


def test_forward_by_hand() -> None:
    parts = forward_parts(HAND, Work(tiles=3, tokens=7, scores=11, scored=5))
    assert parts == {
        "patches": 2 * (3 * 4) * (3 * 2 * 2) * 2,  # 12 patches of 12 numbers to 2
        # 15 rows: query, key, value, output 2 x 2 each; two MLP products of 2 x 8
        "vision_linear": 2 * 15 * (4 * 4 + 2 * 16),
        "vision_attention": 2 * 2 * 15 * 5 * 2,  # 15 queries x 5 keys, scores and values, width 2
        "projector": 2 * 3 * (8 * 2 + 2 * 2),  # one token of 4 x 2 numbers a tile, then 2 to 2
        # query and output 2 x 8, key and value 2 x 4, three MLP products of 2 x 6
        "text_linear": 2 * 7 * (2 * 16 + 2 * 8 + 3 * 12),
        "text_attention": 2 * 2 * 11 * 8,
        "head": 2 * 5 * 2 * 10,
    }


def test_step_by_hand() -> None:
    work = Work(tiles=3, tokens=7, scores=11, scored=5)
    p = forward_parts(HAND, work)
    vision, text = p["vision_linear"], p["text_linear"]
    linear = vision + text + p["projector"] + p["head"]
    attention = p["vision_attention"] + p["text_attention"]
    plain = 2 * p["patches"] + 3 * linear + 3.5 * attention
    assert step_flops(HAND, work) == plain
    again = replace(work, head_again=True)
    assert step_flops(HAND, again) == plain + p["head"]
    assert step_flops(HAND, work, checkpointing=True) == plain + vision + text + attention
    frozen = step_flops(HAND, work, frozen_vision=True)
    backward = p["patches"] + 2 * (vision + p["projector"]) + 2.5 * p["vision_attention"]
    assert frozen == plain - backward
    assert forward_flops(HAND, work) == sum(p.values())


def test_work_of_a_packed_and_of_a_padded_pair() -> None:
    # a prompt of 3, answers of 2 and 1: causal 6; 2 x 3 + 3; 1 x 3 + 1
    assert packed_work([3], [[2, 1]], tiles=4) == Work(4, 6, 6 + 9 + 4, 3)
    assert padded_work(2, 5, tiles=8, scored=3) == Work(8, 10, 50, 3, head_again=True)


def test_the_fixed_pairs_are_those_that_the_goals_were_measured_on() -> None:
    pairs = data.pair_sizes()
    assert len(pairs) == 32
    assert {pair.tiles for pair in pairs} == {1, 3, 4, 5, 6}
    assert sum(pair.tiles for pair in pairs) == 106
    assert [sum(pair.answers[i] for pair in pairs) for i in (0, 1)] == [3915, 3877]
    # 11 tokens of the template, and each tile's
    assert sum(11 + pair.words + 64 * pair.tiles for pair in pairs) == 8180
    assert all(50 <= length <= 200 for pair in pairs for length in pair.answers)


def test_a_part_of_the_page_is_replaced() -> None:
    page = "a\n<!-- mpo: written by benchmarks/mpo.py -->\nold\n<!-- mpo: end -->\nb"
    replaced = replace_part(page, "mpo", "new")
    assert replaced == page.replace("old", "new")
    with pytest.raises(ValueError, match="no place for gspo"):
        replace_part(page, "gspo", "new")


KEYS = {
    "sft": {"speedup", "flop_model", "speedup_gc", "memory_ratio", "tokens_a_second", "loss_gap"},
    "mpo": {"speedup", "flop_model", "speedup_gc", "flop_model_gc", "memory_ratio", "facts"},
    "gspo": {"speedup_g8_short", "flop_model_g8_short", "memory_ratio", "facts"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "mpo", "gspo"])
def test_benchmark_runs(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= KEYS[name]
    ratios = [value for key, value in result.items() if key.startswith(("speedup", "memory_ratio"))]
    assert all(value > 0 for value in ratios)
