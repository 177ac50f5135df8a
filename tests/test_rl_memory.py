"""Host memory of a long online run: flat over 200 steps, and each image in it once a group."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import noise_image
from trainer_cases import COMMON, LARGE, RIGHT, WRONG, SampleOnly

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.sampler import Completion, SampleRequest, SamplingConfig
from rewards import Outcome, Verdict
from rl.config import RLConfig
from rl.trainer import RLTrainer

TILES = 5  # of a picture of 4 x 1 tiles, the thumbnail included
G, STEPS, WARM = 8, 200, 40
SIDE = 56
TILE_BYTES = 3 * SIDE * SIDE  # uint8
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_tokens_per_microbatch": LARGE,
    "num_generations": G,
    "steps_per_generation": 2,
    "max_completion_length": 24,
    "learning_rate": 1e-4,
    "canary_questions": 0,
    "log_completions": True,
    "logging_steps": 20,
    "dynamic_sample": False,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    out = []
    for index in range(12):
        noise_image(4 * SIDE, SIDE, index).save(folder / f"{index}.png")
        data = {"id": str(index), "image": f"{index}.png", "question": f"<image>\n{index} + 5?"}
        data |= {"answer": "5", "matcher": "number"}
        out.append(Row(data, folder / "rows.jsonl", index, folder))
    return out


def judge(asked: Sequence[Any]) -> list[Verdict]:
    outcomes = [Outcome.CORRECT if text == RIGHT else Outcome.WRONG for _, text in asked]
    return [Verdict(o, None, "exact", float(o == "correct"), False) for o in outcomes]


class ByRote(SampleOnly):
    """Two completions by turns; log-probabilities mean nothing."""

    def __init__(self, folder: Path):
        tokenizer = load_processor(str(folder)).tokenizer
        self.made = []
        for number in range(G):
            text = (RIGHT, WRONG)[number % 2]
            ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
            self.made.append(Completion(text, ids, (-1.0,) * len(ids), "stop"))

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        return [list(self.made) for _ in requests]


def start(model: Path, output: Path, rows: list[Row], **changes: Any) -> Any:
    """A trainer of which nothing is recorded."""
    return RLTrainer(
        model=load_model(model),
        args=RLConfig(output_dir=str(output), **{**COMMON, **OPTIONS, **changes}),
        train_dataset=rows,
        processing_class=load_processor(str(model)),
        sampler=ByRote(model),
        verify=judge,
    )


def test_a_step_holds_the_tiles_of_a_group_once(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """As uint8, whatever G is; none where the frozen tower's features are kept instead."""
    for frozen in (False, True):
        trainer = start(tiny_model, tmp_path, rows, max_steps=2, freeze_vit=frozen)
        for _ in range(2):
            step = trainer.next_step()
            assert sum(batch.num_completions for batch in step.microbatches) == 2 * G
            (batch,) = step.microbatches
            assert batch.tiles.dtype == torch.uint8
            assert batch.tiles.shape == (0 if frozen else 2 * TILES, 3, SIDE, SIDE)
            assert batch.tiles.untyped_storage().nbytes() == batch.tiles.nbytes
            assert batch.tiles.nbytes == (0 if frozen else 2 * TILES * TILE_BYTES)
            held = 0 if batch.vision_features is None else len(batch.vision_features)
            assert held == (2 * TILES if frozen else 0)
        assert len(trainer.groups._prompts) == (4 if frozen else 0)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_flat_over_200_steps(
    frozen: bool, tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """A step's tiles are 92 KiB: kept, they would be 14 MiB over what is measured, G times 115."""
    trainer = start(tiny_model, tmp_path, rows, max_steps=STEPS, freeze_vit=frozen)
    sizes: list[int] = []
    step = trainer.training_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if len(sizes) % 10 == 0:
            gc.collect()
        sizes.append(resident())
        return loss

    trainer.training_step = watched
    trainer.train()
    assert len(sizes) == STEPS
    mib = np.array(sizes[WARM:]) / 2**20
    first, last = np.median(mib[:20]), np.median(mib[-20:])
    slope = np.polyfit(np.arange(len(mib)), mib, 1)[0]
    print(f"frozen={frozen}: {first:.1f} -> {last:.1f} MiB, {1024 * slope:+.1f} KiB a step")
    assert last - first < 4.0
    one_image = TILES * TILE_BYTES / 2**20
    assert slope < one_image / 2  # of two images a step, not even half of one stays
