"""SFT on packs: what a sample is trained by does not depend on what it is packed with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
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
    record,
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

EVERY_KIND = [0, 1, 6, 2, VIDEO, 3, 4, 5]
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
        assert float(ours.mean()) == pytest.approx(float(theirs.detach().mean()), rel=1e-6)
        weights.append(len(theirs) ** 0.5)
        terms.append(-theirs.sum() / len(theirs) ** 0.5)
    plain = sum(terms, torch.zeros(())) / sum(weights)
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-6)
    error = gradient_error(found, gradients(model, all_reached=False))
    print(f"gradients differ by {error:.1e}")
    assert error < 1e-5


def test_text_over_a_pack_is_split_and_weighs_as_a_whole(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    """Each response token once, in a pack of 150; the loss is that of whole samples' weights."""
    file = write_rows(pictures / "long.jsonl", [0, 1, 0])
    long = record(3, 0, words=300)
    with file.open("a") as out:
        out.write(json.dumps(long) + "\n")
    rows = rows_of(file)
    limits = {"max_tokens_per_microbatch": 150, "per_device_train_batch_size": 20}
    trainer, (step,) = packed_steps(tiny_model, tmp_path, rows, **limits)
    whole = trainer.encode(rows[3])
    x = sum(whole.loss_masks[0])
    assert whole.num_tokens > 300
    samples = [x for b in step.microbatches for x in b.completion_values["sample_length"].tolist()]
    lengths = [n for batch in step.microbatches for n in batch.lengths.tolist()]
    pieces = [n for n, of in zip(lengths, samples, strict=True) if of == x]
    assert len(pieces) >= 3 and sum(pieces) == x
    weight = sum(n**0.5 for n, of in zip(lengths, samples, strict=True) if of != x) + x**0.5
    assert step.counts["weight"] == pytest.approx(weight, rel=1e-12)
    logprobs, loss, _ = sft_gradient(trainer, step)
    terms = [
        float(-part.double().sum()) / of**0.5 for part, of in zip(logprobs, samples, strict=True)
    ]
    assert loss == pytest.approx(sum(terms) / weight, rel=1e-6)
    trainer.note_counts(step.counts)
    assert list(trainer._accounts.describe())[-1] == f"split: 1 samples in {len(pieces)} pieces"
    assert "drawn: 4 samples" in next(trainer._accounts.describe())


def test_what_a_question_over_a_pack_loses_is_told(tiny_model: Path, tmp_path: Path) -> None:
    """Its answer fits, so it is one piece, without the question's beginning."""
    said = ["the red bar is " * 60 + "5 ?", "Final Answer: 9"]
    turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"id": 0, "conversations": turns}) + "\n")
    limits = {"max_tokens_per_microbatch": 150, "per_device_train_batch_size": 20}
    trainer, (step,) = packed_steps(tiny_model, tmp_path, rows_of(file), **limits)
    (batch,) = step.microbatches
    whole = trainer.encode(rows_of(file)[0])
    assert batch.lengths.tolist() == [sum(whole.loss_masks[0])]
    lost = whole.num_tokens - len(batch.input_ids)
    assert lost > 90
    trainer.note_counts(step.counts)
    told = list(trainer._accounts.describe())[-1]
    assert told == f"cut: {lost} tokens of questions longer than a pack"


def test_packs_are_drawn_by_the_data_seed_and_augmented_anew_in_each_epoch(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    rows = rows_of(write_rows(pictures / "few.jsonl", [1, 0, 0, 0, 0, 0]))
    options = {"jpeg_quality": [5, 60], "num_train_epochs": 3, "max_tokens_per_microbatch": 150}
    orders = []
    for seed in (3, 4):
        trainer, steps = packed_steps(
            tiny_model, tmp_path / f"{seed}", rows, data_seed=seed, **options
        )
        batches = [batch for step in steps for batch in step.microbatches]
        tiles = torch.cat([batch.tiles for batch in batches])
        assert len(tiles) == len({tile.numpy().tobytes() for tile in tiles}) == 3
        orders.append(told(batches, trainer.processing_class.tokenizer))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    # a rank whose share has ended goes on with empty steps, counted under the same names
    after = next(iter(trainer.get_train_dataloader()))[STEP_BATCH]
    assert after.microbatches == [] and after.counts == dict.fromkeys(steps[0].counts, 0.0)


def test_images_over_a_pack_are_put_aside(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """Too many tokens, too many tiles: never cut. Over-long text is none of that."""
    records = [record(0, 1), record(1, 5), record(2, 0, words=300), record(3, 2, words=200)]
    trainer = make_trainer(
        *("sft", tiny_model, tmp_path, records, Recorded()),
        **{**PACKING, "max_tokens_per_microbatch": 150, "max_tiles_per_microbatch": 6},
        image_root=str(pictures),
        max_bad=5,
        eval_rows=1,
    )
    assert [row.data["id"] for row in trainer.train_dataset] == ["0", "2"]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    reasons = {entry["line"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons[2].startswith("7 tiles, over max_tiles_per_microbatch 6: more than a pack holds")
    assert "tokens, over the 150 of a sample in a pack (with images it is never" in reasons[4]


@pytest.mark.slow
def test_what_a_step_is_made_of_is_all_that_counts(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    """The same samples in packs, in other packs, and each by itself: loss and gradients."""
    rows = rows_of(write_rows(pictures / "some.jsonl", [0, 1, 6, 2, 0, 3], words=8))
    trainer, (step,) = packed_steps(tiny_model, tmp_path, rows, per_device_train_batch_size=9)
    numbers = told(step.microbatches, trainer.processing_class.tokenizer)
    _, loss, expected = sft_gradient(trainer, step)
    for tokens in (1, 10_000):
        collator = replace(trainer.collator, max_tokens=tokens, max_tiles=None)
        other = collator([rows[number] for number in reversed(numbers)])[STEP_BATCH]
        assert len(other.microbatches) == (len(rows) if tokens == 1 else 1)
        _, other_loss, gradient = sft_gradient(trainer, other)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert gradient_error(gradient, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_on_packs_are_one_process_on_their_samples(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Each step of two ranks, as one process sees the same samples without packing.

    Also where one has more packs than the other, which may have none at all.
    """
    from test_ranks import start
    from two_ranks import CASES

    names = [name for name in CASES if "packed" in name]
    folder, results = start(tiny_model, tmp_path, names)
    for name in names:
        check_ranks(results[name], CASES[name].make_rows(folder), tiny_model, tmp_path / name)
    packs = [rank["microbatches"] for rank in results["sft-packed-uneven"]]
    assert packs == [[2, 1], [2, 0]]
    assert [rank["rows"] for rank in results["sft-packed-alone"]] == [["0"], []]


def check_ranks(ranks: Any, rows: Sequence[Row], model: Path, output: Path) -> None:
    """What two ranks have recorded: each row once, each step one process's on its samples."""
    trainer = make_trainer("sft", model, output, rows, Recorded())
    assert sorted(map(int, ranks[0]["rows"] + ranks[1]["rows"])) == list(range(len(rows)))
    places = [0, 0]
    for number in range(len(ranks[0]["losses"])):
        ids: list[str] = []
        for rank in (0, 1):
            more = ranks[rank]["samples"][number]
            ids += ranks[rank]["rows"][places[rank] : places[rank] + more]
            places[rank] += more
        step = trainer.collator([rows[int(name)] for name in ids])[STEP_BATCH]
        _, loss, gradient = sft_gradient(trainer, step)
        for rank in (0, 1):
            assert ranks[rank]["losses"][number] == pytest.approx(loss, rel=1e-6)
            assert gradient_error(ranks[rank]["gradients"][number], gradient) < 1e-5
