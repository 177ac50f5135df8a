"""Pairs with 0 to 3 pictures of 1 to 6 tiles, and an MPOTrainer whose policy left its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from plain import noise_image
from trainer_cases import COMMON

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from mpo.config import MPOConfig
from mpo.trainer import MPOTrainer
from training.batches import STEP_BATCH

# by tiles: 1; 2, 3, 4 or 5 and a thumbnail. The budget, which the pictures of a pair share, is more
# than any of them needs, so that who shares it and who does not cut the same tiles
SIZES = {1: (56, 56), 3: (112, 56), 4: (168, 56), 5: (112, 112), 6: (280, 56)}
MAX_TILES = 12
# tiles of each picture, chosen, rejected
Pair = tuple[list[int], str, str]
PAIRS: list[Pair] = [
    ([6], "The red bar is 5. 5 - 2 = 3. Final Answer: 3", "Final Answer: 4"),
    ([1, 3], "The red bar is 5.", "It looks clear from the chart. Final Answer: 7"),
    ([5], "It is 2. Final Answer: 2", "The blue bar is 2. The red bar is 3."),
    ([4, 1, 3], "Final Answer: 9", "The red bar. The blue bar. Final Answer: 9"),
    ([], "4 + 5 = 9. Final Answer: 9", "Final Answer: 8"),
]
EQUAL_CHOSEN: list[Pair] = [(tiles, "The red bar is 5.", rejected) for tiles, _, rejected in PAIRS]
QUESTION = "What is the red bar minus the blue bar?"


def pictures(number: int, tiles: Sequence[int]) -> list[Image.Image]:
    """The pictures of a pair by its number."""
    return [noise_image(*SIZES[n], seed=10 * number + i) for i, n in enumerate(tiles)]


def make_rows(folder: Path, pairs: Sequence[Pair]) -> list[Row]:
    """The pairs as rows whose pictures lie in `folder`."""
    rows = []
    for number, (tiles, chosen, rejected) in enumerate(pairs):
        names = [f"{number}-{place}.png" for place in range(len(tiles))]
        for name, picture in zip(names, pictures(number, tiles), strict=True):
            picture.save(folder / name)
        data: dict[str, Any] = {"id": str(number)}
        data |= {"question": "<image>\n" * len(tiles) + QUESTION, "image": names}
        data |= {"chosen": chosen, "rejected": rejected}
        rows.append(Row(data, folder / "rows.jsonl", number, folder))
    return rows


def add_noise(model: Any) -> None:
    """Move every weight, the same way for the same names."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)


def moved_trainer(
    folder: Path,
    output: Path,
    rows: Sequence[Row],
    eval_dataset: Sequence[Row] | None = None,
    **options: Any,
) -> MPOTrainer:
    """A trainer whose reference is the checkpoint, and whose policy is that and noise."""
    trainer = MPOTrainer(
        model=load_model(folder),
        args=MPOConfig(
            output_dir=str(output),
            **{
                **COMMON,
                "max_tiles": MAX_TILES,
                "per_device_train_batch_size": len(rows),
                **options,
            },
        ),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=load_processor(str(folder)),
    )
    trainer._announced = True  # the first loss is not what it is while policy = reference
    add_noise(trainer.model)
    return trainer


def one_step(trainer: MPOTrainer) -> tuple[float, dict[str, float], int]:
    """The loss of all pairs as one step, its metrics, and the number of micro-batches.

    The gradients stay with the model.
    """
    (inputs,) = trainer.get_train_dataloader()
    loss = float(trainer.training_step(trainer.model, inputs))
    return loss, trainer._metrics.values(), len(inputs[STEP_BATCH].microbatches)
