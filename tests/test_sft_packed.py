"""SFT on packs: what a sample is trained by does not depend on what it is packed with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import gradient_error, gradients, load_plain, plain_logprobs
from stream_cases import (
    MAX_TILES,
    VIDEO,
    plain_row,
    rows_of,
    told,
    write_pictures,
    write_rows,
)
from torch import Tensor
from trainer_cases import Recorded, make_trainer

from internvl.data import Row
from training.batches import STEP_BATCH, StepBatch
from training.metrics import sum_over_ranks

EVERY_KIND = [0, 1, 6, 2, VIDEO, 3, 0, 4, 5, 0, 1, 2]
PACKING: dict[str, Any] = {
    "packing": True,
    "max_tiles": MAX_TILES,
    "max_tokens_per_microbatch": 400,
    "max_tiles_per_microbatch": 12,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


def packed_steps(
    model: Path, output: Path, rows: Sequence[Row], **options: Any
) -> tuple[Any, list[StepBatch]]:
    """A trainer and the steps that it would train on, an epoch of them."""
    trainer = make_trainer("sft", model, output, rows, Recorded(), **{**PACKING, **options})
    steps = islice(trainer.get_train_dataloader(), trainer.args.max_steps)
    return trainer, [inputs[STEP_BATCH] for inputs in steps]


def sft_gradient(trainer: Any, step: StepBatch) -> tuple[list[Tensor], float, dict[str, Tensor]]:
    """Log-probabilities of each sample's tokens, the step's loss and its gradients."""
    counts = sum_over_ranks(step.counts, trainer.args.device)
    found: list[Tensor] = []
    total = 0.0
    for batch in step.microbatches:
        scores = trainer.score(trainer.model, batch)
        loss, _ = trainer.loss(scores, batch, counts)
        loss.backward()
        total += float(loss.detach())
        found += scores.logprobs.detach().split(batch.lengths.tolist())
    return found, total, gradients(trainer.model, all_reached=False)


def test_a_pack_is_its_samples(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """Text, 1 to 6 tiles, several images and a video in packs of up to 400 tokens, one by one as
    transformers' own model and processor see them: log-probs, losses and gradients.
    """
    rows = rows_of(write_rows(pictures / "rows.jsonl", EVERY_KIND))
    trainer, steps = packed_steps(tiny_model, tmp_path, rows, per_device_train_batch_size=20)
    (step,) = steps
    assert 3 <= len(step.microbatches) < len(rows)
    numbers = told(step.microbatches, trainer.processing_class.tokenizer)
    assert sorted(numbers) == list(range(len(rows)))
    kinds = [
        {EVERY_KIND[n] for n in told([batch], trainer.processing_class.tokenizer)}
        for batch in step.microbatches
    ]
    assert any(0 in found and len(found) > 1 for found in kinds)  # text beside images
    model, processor = load_plain(tiny_model)
    logprobs, loss, found = sft_gradient(trainer, step)
    weights, terms = [], []
    for number, ours in zip(numbers, logprobs, strict=True):
        (theirs,) = plain_logprobs(model, plain_row(rows[number], processor))
        assert torch.allclose(ours, theirs.detach(), atol=1e-6, rtol=1e-6)
        assert float(ours.mean()) == pytest.approx(float(theirs.mean()), rel=1e-6)
        weights.append(len(theirs) ** 0.5)
        terms.append(-theirs.sum() / len(theirs) ** 0.5)
    plain = sum(terms, torch.zeros(())) / sum(weights)
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-6)
    error = gradient_error(found, gradients(model, all_reached=False))
    print(f"gradients differ by {error:.1e}")
    assert error < 1e-5
