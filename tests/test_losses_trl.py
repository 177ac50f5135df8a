"""Our losses against TRL 1.16's own methods, where the two do the same thing.

TRL's methods run as they are on a stand-in for the trainer (trl_private.py): its "model" hands out
log-probabilities, so value and gradient can be compared on the same numbers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trl_private import dpo_loss

from mpo.losses import LossWeights, mpo_loss, pair_terms

LENGTHS = [3, 1, 4, 2, 5, 3]  # completions of three pairs: chosen, then rejected, as TRL stacks
TOKENS = max(LENGTHS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def completion_mask(lengths: list[int]) -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()


def mpo_by_us(logprobs: Tensor, mask: Tensor, ref: Tensor, weights: LossWeights) -> Tensor:
    logps, lengths = (logprobs * mask).sum(1), mask.sum(1)
    pairs = len(logps) // 2
    terms = pair_terms(
        *(logps[:pairs], logps[pairs:], ref[:pairs], ref[pairs:], lengths[:pairs]),
        beta=0.1,
        delta=0.0,
    )
    return mpo_loss(terms, weights, float(pairs))


@pytest.mark.parametrize(
    ("losses", "weights"),
    [
        ({"sigmoid": 1.0}, LossWeights(1.0, 0.0, 0.0)),
        ({"bco_pair": 1.0}, LossWeights(0.0, 1.0, 0.0)),
        ({"sigmoid": 0.8, "bco_pair": 0.2}, LossWeights(0.8, 0.2, 0.0)),
    ],
)
def test_dpo_and_bco_without_shift_are_trls(losses: dict[str, float], weights: LossWeights) -> None:
    mask = completion_mask(LENGTHS)
    logprobs = (-9 * random(6, TOKENS, seed=0)).requires_grad_()
    ref = -20 * random(6, seed=1)
    theirs, ours = dpo_loss(logprobs, mask, ref, losses)[0], mpo_by_us(logprobs, mask, ref, weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-13, atol=0)


def test_all_three_losses_of_one_pair_are_trls() -> None:
    """For one pair TRL's token mean is ours per sequence; of several pairs it is not (eq. 8)."""
    mask = completion_mask([4, 2])
    logprobs = (-9 * random(2, TOKENS, seed=2)).requires_grad_()
    ref = -20 * random(2, seed=3)
    theirs, _ = dpo_loss(logprobs, mask, ref, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    ours = mpo_by_us(logprobs, mask, ref, LossWeights())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-13, atol=0)
