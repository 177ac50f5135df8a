"""A step of MPOTrainer against the plain way: two padded sequences a pair, full logits, by hand.

Invariant 1 of the design with every loss, 0 to 3 pictures a pair and 1 to 6 tiles: packing and any
micro-batch budget change neither loss nor gradients. test_ranks.py has the same for two processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpo_cases import (
    MAX_TILES,
    PAIRS,
    add_noise,
    make_rows,
    moved_trainer,
    one_step,
)
from plain import Plain, call_processor, gradient_error, gradients, load_plain
from tiny_llms import make_family
from torch import Tensor
from torch.nn.functional import softplus
from trainer_cases import LARGE, SMALL

from internvl.data import Row

BETA, SMOOTHING, DELTA = 0.3, 0.1, 0.15


def plain_pairs(processor: Any, rows: list[Row]) -> list[Plain]:
    out = []
    for row in rows:
        message = {"role": "user", "content": row.data["question"]}
        ids, pixels = call_processor(processor, [message], row.load_images(), MAX_TILES)
        texts = (row.data["chosen"], row.data["rejected"])
        end = processor.tokenizer.eos_token_id
        answers = [[*processor.tokenizer(text)["input_ids"], end] for text in texts]
        out.append(Plain(ids, pixels, answers, []))
    return out


def padded_logps(model: Any, pairs: list[Plain]) -> tuple[Tensor, Tensor]:
    """Sums of log-probabilities and lengths, [pairs, 2] each, by one forward of padded rows."""
    rows = [(pair, answer) for pair in pairs for answer in pair.completions]
    length = max(len(pair.ids) + len(answer) for pair, answer in rows)
    ids, mask, answered = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for number, (pair, answer) in enumerate(rows):
        whole = len(pair.ids) + len(answer)
        ids[number, :whole] = torch.tensor(pair.ids + answer)
        mask[number, :whole] = 1
        answered[number, len(pair.ids) : whole] = 1
    pixels = torch.cat([pair.pixels for pair, _ in rows if pair.pixels is not None])
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
    every = logits[:, :-1].log_softmax(-1)
    tokens = every.gather(-1, ids[:, 1:, None])[..., 0] * answered[:, 1:]
    return tokens.sum(1).view(-1, 2), answered.sum(1).view(-1, 2)


# each loss of one pair as its paper writes it, with no function of ours; y: sums of chosen and
# rejected, r: the reference's, n: lengths; -log sigma(x) = softplus(-x)
BY_HAND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda y, r, n: (
        (1 - SMOOTHING) * softplus(-BETA * ((y[0] - r[0]) - (y[1] - r[1])))
        + SMOOTHING * softplus(BETA * ((y[0] - r[0]) - (y[1] - r[1])))
    ),
    "bco_pair": lambda y, r, n: (
        softplus(-(BETA * (y[0] - r[0]) - DELTA)) + softplus(BETA * (y[1] - r[1]) - DELTA)
    ),
    "sft": lambda y, r, n: -y[0] / n[0],
    "robust": lambda y, r, n: (
        (
            (1 - SMOOTHING) * softplus(-BETA * ((y[0] - r[0]) - (y[1] - r[1])))
            - SMOOTHING * softplus(BETA * ((y[0] - r[0]) - (y[1] - r[1])))
        )
        / (1 - 2 * SMOOTHING)
    ),
    "ipo": lambda y, r, n: ((y[0] - r[0]) / n[0] - (y[1] - r[1]) / n[1] - 1 / (2 * BETA)).square(),
    "hinge": lambda y, r, n: torch.relu(1 - BETA * ((y[0] - r[0]) - (y[1] - r[1]))),
    "orpo": lambda y, r, n: softplus(
        -(odds(y[0] / n[0]).log() - odds(y[1] / n[1]).log()),
    ),
}


def odds(mean_logp: Tensor) -> Tensor:
    return mean_logp.exp() / (1 - mean_logp.exp())


SETS = {
    "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
    "every": {name: 0.5 + place for place, name in enumerate(BY_HAND)},
}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("losses", SETS)
def test_any_packing_is_padded_full_logits(checkpoint: Path, tmp_path: Path, losses: str) -> None:
    weights = SETS[losses]
    rows = make_rows(tmp_path, PAIRS)
    model, processor = load_plain(checkpoint)
    pairs = plain_pairs(processor, rows)
    with torch.no_grad():
        reference, _ = padded_logps(model, pairs)
    add_noise(model)
    logps, lengths = padded_logps(model, pairs)
    terms = {
        name: torch.stack(
            [BY_HAND[name](*pair) for pair in zip(logps, reference, lengths, strict=True)]
        ).mean()
        for name in weights
    }
    loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros(()))
    loss.backward()
    expected = gradients(model, all_reached=False)
    for budget, parts in ((LARGE, 1), (SMALL, 4), (1, len(rows))):
        trainer = moved_trainer(
            *(checkpoint, tmp_path / str(budget), rows),
            loss_type=list(weights),
            loss_weights=list(weights.values()),
            beta=BETA,
            label_smoothing=SMOOTHING,
            max_tokens_per_microbatch=budget,
        )
        trainer.shift.update(total=2 * DELTA, count=2)
        found, metrics, microbatches = one_step(trainer)
        assert microbatches >= parts
        assert found == pytest.approx(loss.item(), rel=1e-6)
        error = gradient_error(gradients(trainer.model), expected)
        print(f"budget {budget}: losses {found:.7f} {loss:.7f}, gradients differ by {error:.1e}")
        assert error < 1e-5
        for name, term in terms.items():
            assert metrics[f"loss/{name}"] == pytest.approx(term.item(), rel=1e-5)
    rewards = BETA * (logps - reference).detach().mean(0)
    means = [metrics["rewards/chosen"], metrics["rewards/rejected"]]
    assert means == pytest.approx(rewards.tolist(), rel=1e-4)
    # delta: the mean of these ten rewards and the two before
    expected_delta = (2 * DELTA + len(rows) * float(rewards.sum())) / (2 + 2 * len(rows))
    assert trainer.shift.delta == pytest.approx(expected_delta, rel=1e-4)
    assert not math.isclose(expected_delta, DELTA, rel_tol=1e-3)
