"""Token, sample and square averaging in whole runs: what x counts, and what must not matter.

The closed forms are in test_losses.py, the gradients against transformers' own forward in
test_trainer.py (square by packing, too), two ranks in test_ranks.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from plain import gradient_error, load_plain, plain_logprobs
from test_trainer import plain_conversation
from trainer_cases import LARGE, SMALL, Recorded, conversations, make_trainer, train, write_images

from internvl.chat import load_processor
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.packing import pack
from sft.losses import EXPONENTS, total_weight


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 5)
    return folder


def test_x_is_all_response_tokens_of_a_conversation(tiny_model: Path, images: Path) -> None:
    """A sample is the whole conversation, however many replies (as in the published code)."""
    processor = load_processor(str(tiny_model))
    replies = ["Final Answer: 9", "The blue bar is 2. Final Answer: 2", "Final Answer: 4"]
    turns = [
        t
        for r in replies
        for t in ({"from": "human", "value": "What?"}, {"from": "gpt", "value": r})
    ]
    row = Row({"id": "0", "conversations": turns}, images / "rows.jsonl", 1, images)
    batch = pack([Encoder(processor).conversation(row)])
    x = sum(len(processor.tokenizer(reply)["input_ids"]) + 1 for reply in replies)
    assert batch.lengths.tolist() == [x] and len(batch.targets) == x
    end = processor.tokenizer.eos_token_id
    assert (batch.targets == end).sum() == 3  # and nothing of a question
    assert total_weight(batch.lengths.tolist(), "square") == pytest.approx(math.sqrt(x))


def test_the_evaluation_loss_is_the_weighted_mean_of_the_set(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """In batches of 1, 2 and 4, by packing or without: sum w (-log p) / sum w over all rows."""
    rows = conversations(images, 4)
    model, processor = load_plain(tiny_model)
    model.eval()
    with torch.no_grad():
        scored = [plain_logprobs(model, plain_conversation(processor, row))[0] for row in rows]
    trainer = make_trainer("sft", tiny_model, tmp_path, rows, Recorded(), eval_rows=4)
    for average, exponent in EXPONENTS.items():
        trainer.args.loss_average = average
        weights = [len(logprobs) ** -exponent for logprobs in scored]
        above = -sum(w * float(logprobs.sum()) for w, logprobs in zip(weights, scored, strict=True))
        below = sum(w * len(logprobs) for w, logprobs in zip(weights, scored, strict=True))
        for size, budget in ((1, LARGE), (3, SMALL), (4, LARGE)):
            trainer.args.per_device_eval_batch_size = size
            trainer.args.max_tokens_per_microbatch = budget
            assert trainer.evaluate()["eval_loss"] == pytest.approx(above / below, rel=1e-6)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_packing_and_microbatches_change_no_gradient(
    average: str, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    one, many = (
        train(
            *("sft", tiny_model, tmp_path / str(budget), conversations(images, 5)),
            per_device_train_batch_size=5,
            max_tokens_per_microbatch=budget,
            loss_average=average,
        )
        for budget in (LARGE, SMALL)
    )
    assert one.microbatches == [1] and many.microbatches[0] >= 4
    assert many.losses == pytest.approx(one.losses, rel=1e-6)
    assert gradient_error(many.gradients[0], one.gradients[0]) < 1e-5
