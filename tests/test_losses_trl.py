"""Our losses against TRL 1.16's own methods, where the two do the same thing.

`DPOTrainer._compute_loss` and `GRPOTrainer._compute_loss` are called as they are on a stand-in for
the trainer that holds only what they read; the "model" hands out log-probabilities, so value and
gradient can be compared on the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo.losses import LossWeights, mpo_loss, pair_terms
from rl.losses import gspo_loss, gspo_terms, sequence_ratios

trl = pytest.importorskip("trl")

LENGTHS = [3, 1, 4, 2, 5, 3]  # completions of three pairs: chosen, then rejected, as TRL stacks
TOKENS = max(LENGTHS)


def one_process() -> SimpleNamespace:
    """Accelerator of a single process."""
    same = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x, sync_gradients=True
    )
    same.gather_for_metrics = same.gather
    same.reduce = lambda x, reduction: x
    return same


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def completion_mask(lengths: list[int]) -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()


def dpo_by_trl(logprobs: Tensor, mask: Tensor, ref: Tensor, losses: dict[str, float]) -> Tensor:
    """TRL's loss of pairs; logprobs [2P, T] (0 outside the mask), ref [2P]."""
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=one_process(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        label_smoothing=0.0,
        beta=0.1,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.zeros(len(mask), TOKENS + 1, dtype=torch.long)
    outputs = SimpleNamespace(
        log_probs=logprobs * mask,
        entropy=torch.zeros_like(logprobs),
        mean_logits=torch.zeros_like(logprobs),
        is_top1=torch.zeros_like(mask, dtype=torch.bool),
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        # one prompt token before the completion
        "completion_mask": torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], 1),
        "ref_chosen_logps": ref[: len(ref) // 2],
        "ref_rejected_logps": ref[len(ref) // 2 :],
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


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
    theirs, ours = dpo_by_trl(logprobs, mask, ref, losses), mpo_by_us(logprobs, mask, ref, weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-13, atol=0)


def test_all_three_losses_of_one_pair_are_trls() -> None:
    """For one pair TRL's token mean is ours per sequence; of several pairs it is not (eq. 8)."""
    mask = completion_mask([4, 2])
    logprobs = (-9 * random(2, TOKENS, seed=2)).requires_grad_()
    ref = -20 * random(2, seed=3)
    theirs = dpo_by_trl(logprobs, mask, ref, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    ours = mpo_by_us(logprobs, mask, ref, LossWeights())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-13, atol=0)


def gspo_by_trl(logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor) -> Any:
    """TRL's sequence-level loss and its clip metrics; logprobs, old [G, T]."""
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=one_process(),
        args=SimpleNamespace(delta=None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence",
        beta=0.0,
        loss_type="grpo",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            *(logprobs, torch.zeros_like(logprobs), None),
        ),
    )
    ids = torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
    }
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


@pytest.mark.xdist_group("vllm")  # TRL's GRPO imports vLLM: in the process that has it anyway
def test_gspo_is_trls_sequence_level_loss() -> None:
    mask = completion_mask(LENGTHS)
    old = -3 * random(6, TOKENS, seed=4)
    # drifts of the size of the clips, so that all four cases of the clip occur
    logprobs = (old + 3e-3 * (random(6, TOKENS, seed=5) - 0.5)).requires_grad_()
    advantages = torch.tensor([1.2, 0.4, -0.9, -0.7, 0.8, -0.8], dtype=torch.float64)
    theirs, metrics = gspo_by_trl(logprobs, old, mask, advantages)

    kept = mask.bool()
    of = torch.arange(6)[:, None].expand_as(mask)[kept]
    ratios = sequence_ratios(logprobs[kept], old[kept], of, mask.sum(1))
    terms = gspo_terms(ratios, advantages, epsilon_low=3e-4, epsilon_high=4e-4)
    ours = gspo_loss(terms, 6.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (grad_theirs,) = torch.autograd.grad(theirs, logprobs)
    (grad_ours,) = torch.autograd.grad(ours, logprobs)
    assert torch.allclose(grad_ours, grad_theirs, rtol=1e-12, atol=0)
    assert 0 < int((grad_ours.abs().sum(1) == 0).sum()) < 6  # some are clipped, some not
    low, high = terms.clipped_low.double().mean(), terms.clipped_high.double().mean()
    assert metrics["clip_ratio/low_mean"] == [pytest.approx(low.item())]
    assert metrics["clip_ratio/high_mean"] == [pytest.approx(high.item())]
    assert low > 0 and high > 0
