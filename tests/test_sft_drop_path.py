"""Drop path of the vision tower: its draws, its arithmetic, and what must not change it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import gradient_error, gradients, load_plain, plain_logprobs
from test_trainer import plain_conversation
from torch import Tensor
from trainer_cases import SMALL, Recorded, conversations, make_trainer, train, write_images

from internvl.data import Row
from internvl.drop_path import block_rates, uniform
from internvl.packing import tile_keys

MASK = (1 << 64) - 1
RATE = 0.6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 6)
    return folder


# ---------------------------------------------------------------- draws, in plain Python


def scrambled(value: int) -> int:
    """splitmix64's finisher, on numbers without a sign."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def drawn(key: int, *numbers: int) -> float:
    mixed = scrambled(key & MASK)
    for number in numbers:
        mixed = scrambled((mixed + (number + 1) * 0x1E3779B97F4A7C15) & MASK)
    return (mixed >> 11) / 2**53


def key_of(row: Row, seed: int, tile: int) -> int:
    """Of a tile of a conversation: by its texts and the seed alone."""
    texts = json.dumps([None, None, None, None, row.data["conversations"]])
    digest = hashlib.sha256(f"{seed}/{texts}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True) + tile * 0x632BE59BD9B4E019


def test_draws_are_those_of_plain_python() -> None:
    # a change here would change the input of every run that is gone on with
    keys = tile_keys(-(1 << 62), 7)
    for numbers in ((0, 0, 0), (12_345, 23, 1)):
        expected = [drawn(-(1 << 62) + n * 0x632BE59BD9B4E019, *numbers) for n in range(7)]
        assert uniform(keys, *numbers).tolist() == expected


def test_draws_are_even_and_independent() -> None:
    keys = tile_keys(17, 20_000)
    columns = [uniform(keys, *n) for n in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))]
    columns.append(uniform(tile_keys(18, 20_000), 0, 1, 0))
    columns.append(uniform(keys + 0, 0, 1, 0).roll(1))  # the next tile's
    for values in columns:
        for share in (0.1, 0.5, 0.9):
            assert abs(float((values < share).double().mean()) - share) < 4 * 0.5 / 20_000**0.5
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 4 / 20_000**0.5


def test_rates_rise_from_nothing_to_the_rate() -> None:
    assert block_rates(0.1, 24) == pytest.approx([0.1 * k / 23 for k in range(24)])
    assert block_rates(0.4, 1) == [0.0]


# ---------------------------------------------------------------- in a run


def run(model: Path, output: Path, images: Path, **options: Any) -> Recorded:
    fixed = {"per_device_train_batch_size": 4, "vit_drop_path": RATE, **options}
    return train("sft", model, output, conversations(images, 4), **fixed)


def drop_by_hand(model: Any, row: Row, step: int, seed: int) -> list[Any]:
    """Hooks on transformers' own blocks: after the scaling by lambda, unlike ours."""
    layers = model.model.vision_tower.encoder.layer

    def factors(block: int, branch: int, tiles: int) -> Tensor:
        rate = RATE * block / (len(layers) - 1)
        kept = [drawn(key_of(row, seed, t), step, block, branch) >= rate for t in range(tiles)]
        return torch.tensor(kept).float()[:, None, None] / (1 - rate)

    def block_hook(block: int) -> Any:
        def forward(layer: Any, inputs: Any, output: Tensor) -> Tensor:
            (x,) = inputs
            attention = layer.attention(layer.layernorm_before(x))[0]
            x = x + factors(block, 0, len(x)) * (layer.lambda_1 * attention)
            inner = layer.mlp(layer.layernorm_after(x))
            return x + factors(block, 1, len(x)) * (layer.lambda_2 * inner)

        return forward

    return [layer.register_forward_hook(block_hook(n)) for n, layer in enumerate(layers)]


def test_a_step_is_the_one_worked_out_by_hand(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """Gradients of the second step, on transformers' own model, row by row: of any packing."""
    recorded = run(
        *(tiny_model, tmp_path, images),
        max_steps=2,
        num_train_epochs=2,
        max_tokens_per_microbatch=SMALL,
        gradient_checkpointing=True,
    )
    assert min(recorded.microbatches) >= 2
    model, processor = load_plain(tiny_model)
    model.load_state_dict(recorded.weights[1], strict=False)
    above, below = torch.zeros(()), 0.0
    for row in conversations(images, 4):
        hooks = drop_by_hand(model, row, step=1, seed=3)
        (logprobs,) = plain_logprobs(model, plain_conversation(processor, row))
        for hook in hooks:
            hook.remove()
        weight = len(logprobs) ** -0.5
        above, below = above - weight * logprobs.sum(), below + weight * len(logprobs)
    loss = above / below
    loss.backward()
    assert recorded.losses[1] == pytest.approx(loss.item(), rel=1e-6)
    assert gradient_error(recorded.gradients[1], gradients(model)) < 1e-5


def test_evaluation_drops_nothing(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    rows = conversations(images, 3)
    losses = [
        make_trainer(
            *("sft", tiny_model, tmp_path / str(rate), rows, Recorded()), vit_drop_path=rate
        ).evaluate()["eval_loss"]
        for rate in (0.0, 0.9)
    ]
    assert losses[0] == losses[1]


def test_a_resumed_run_draws_what_the_uninterrupted_one_did(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """Augmentation is drawn anew in its second epoch, and goes on with it, too."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    options |= {"per_device_train_batch_size": 2, "vit_drop_path": RATE, "optim": "adamw_torch"}
    options |= {"jpeg_quality": [10, 90]}
    rows = conversations(images, 4)
    make_trainer("sft", tiny_model, tmp_path, rows, Recorded(), **options).run()
    weights = (tmp_path / "model.safetensors").read_bytes()
    for step in (4, 5, 6):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "complete.json").rename(folder / "incomplete")
    (tmp_path / "model.safetensors").unlink()
    make_trainer("sft", tiny_model, tmp_path, rows, Recorded(), **options).run()
    assert (tmp_path / "model.safetensors").read_bytes() == weights
