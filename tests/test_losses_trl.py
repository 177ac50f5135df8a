"""The losses of pairs against TRL 1.16's own, on the same numbers (see trl_private.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl_private import dpo_loss, orpo_loss

from mpo.loss_set import MPO_WEIGHTS, LossSet, Pairs

# TRL's trainers take seconds to import: in one process, that which imports vLLM anyway
pytestmark = pytest.mark.xdist_group("vllm")
LENGTHS = [3, 1, 4, 2, 5, 3]  # completions of three pairs: chosen, then rejected, as TRL stacks


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probabilities [2P, T], mask [2P, T], and sums under the reference [2P]."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    logprobs = (-9 * random(*mask.shape, seed=seed)).requires_grad_()
    return logprobs, mask, -20 * random(len(lengths), seed=seed + 1)


def by_us(losses: LossSet, logprobs: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
    logps, lengths = (logprobs * mask).sum(1), mask.sum(1)
    pairs = Pairs(*logps.chunk(2), *lengths.chunk(2), *ref.chunk(2))
    return losses.total(losses.terms(pairs), float(len(logps) // 2))


def check_equal(ours: Tensor, theirs: Tensor, logprobs: Tensor) -> None:
    """Value and gradient to 1e-12."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert grad_theirs.abs().max() > 1e-3
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ({"sigmoid": 1.0}, {}),
        ({"bco_pair": 1.0}, {}),
        ({"sigmoid": 0.8, "bco_pair": 0.2}, {}),
        ({"ipo": 1.0}, {}),
        ({"ipo": 1.0}, {"beta": 0.4}),
        ({"hinge": 1.0}, {"beta": 0.03}),
        ({"hinge": 0.5, "bco_pair": 2.0}, {"beta": 0.3}),
        ({"robust": 1.0}, {"label_smoothing": 0.1}),
        ({"robust": 1.0, "ipo": 0.5, "sigmoid": 0.25}, {"beta": 0.2}),
    ],
)
def test_a_set_of_losses_is_trls(weights: dict[str, float], options: dict[str, Any]) -> None:
    logprobs, mask, ref = numbers(LENGTHS)
    theirs, _ = dpo_loss(logprobs, mask, ref, weights, **options)
    check_equal(by_us(LossSet(weights, **options), logprobs, mask, ref), theirs, logprobs)


def test_cdpo_is_trls_sigmoid_of_both_orders() -> None:
    """TRL 1.16 has no cDPO: its `sigmoid` reads no label_smoothing."""
    logprobs, mask, ref = numbers(LENGTHS)

    def turned(values: Tensor) -> Tensor:
        return torch.cat(values.chunk(2)[::-1])

    kept, _ = dpo_loss(logprobs, mask, ref, {"sigmoid": 1.0}, label_smoothing=0.1)
    plain, _ = dpo_loss(logprobs, mask, ref, {"sigmoid": 1.0})
    assert torch.equal(kept, plain)
    flipped, _ = dpo_loss(turned(logprobs), turned(mask), turned(ref), {"sigmoid": 1.0})
    ours = by_us(LossSet({"sigmoid": 1.0}, label_smoothing=0.1), logprobs, mask, ref)
    check_equal(ours, 0.9 * plain + 0.1 * flipped, logprobs)


@pytest.mark.parametrize("lengths", [[4, 2], [4, 4, 4, 2, 5, 3]])
def test_mpo_of_equal_chosen_lengths_is_trls(lengths: list[int]) -> None:
    """TRL's sft is a mean over the batch's tokens: ours, per sequence (eq. 8), at equal lengths."""
    logprobs, mask, ref = numbers(lengths, seed=2)
    theirs, metrics = dpo_loss(logprobs, mask, ref, MPO_WEIGHTS)
    check_equal(by_us(LossSet(MPO_WEIGHTS), logprobs, mask, ref), theirs, logprobs)
    chosen, rejected = Pairs(
        *(logprobs * mask).sum(1).chunk(2), *mask.sum(1).chunk(2), *ref.chunk(2)
    ).rewards(0.1)
    assert metrics["rewards/chosen"] == [pytest.approx(chosen.mean().item(), rel=1e-12)]
    margins = (chosen - rejected).mean().item()
    assert metrics["rewards/margins"] == [pytest.approx(margins, rel=1e-12)]


def test_odds_ratio_is_orpo_trainers() -> None:
    logprobs, mask, ref = numbers(LENGTHS)
    means = ((logprobs * mask).sum(1) / mask.sum(1)).float()
    theirs = orpo_loss(*means.chunk(2), weight=0.1)
    ours = by_us(LossSet({"orpo": 0.1}), logprobs.float(), mask, ref)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs, retain_graph=True)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-4, atol=1e-7)
