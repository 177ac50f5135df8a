"""The policy's losses and advantages against TRL 1.16's own GRPOTrainer.

Its `_compute_loss` runs as it is (trl_private.py), on padded log-probabilities; ours gets the same
numbers packed. Named in each case: importance_sampling_level, loss_type, beta, the correction for
the sampler's gap, and the mask of cut completions.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_private import grpo_loss

from rl.losses import Counts, Objective, PolicyTokens, correction_weights, policy_loss

# TRL's GRPO imports vLLM: in the process that has it anyway
pytestmark = pytest.mark.xdist_group("vllm")
LENGTHS = [3, 1, 4, 2, 5, 3]
CUT = 4  # this completion was cut by its length
TOKENS = max(LENGTHS)
STEPS = 2  # optimizer steps of the rollout batch
ROLLOUT_TOKENS = 31.0
ADVANTAGES = torch.tensor([1.2, 0.4, -0.9, -0.7, 0.8, -0.8], dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def completion_mask(masked: bool) -> Tensor:
    """TRL's mask: with mask_truncated_completions a cut completion has none left."""
    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    if masked:
        mask[CUT] = 0
    return mask


def case(level: str, kind: str, **options: Any) -> Any:
    words = [level, kind, *(f"{name}={value}" for name, value in options.items())]
    return pytest.param(level, kind, options, id="-".join(words))


@pytest.mark.parametrize(
    ("level", "kind", "options"),
    [
        case("sequence", "grpo"),  # GSPO as published
        case("sequence", "grpo", masked=True),
        case("sequence", "grpo", beta=0.04),
        case("sequence", "luspo"),
        case("sequence", "dapo", masked=True),
        case("token", "grpo"),
        case("token", "bnpo", masked=True),
        case("token", "dr_grpo", beta=0.04, biased=True),
        case("token", "dapo", beta=0.04, entropy_coef=0.01),
        case("token", "grpo", entropy_coef=0.01, masked=True),
        case("sequence", "grpo", mode="sequence_mask", beta=0.04),
        case("sequence", "grpo", mode="token_truncate"),
        case("token", "dapo", mode="sequence_truncate"),
        case("token", "dapo", mode="token_mask"),
    ],
)
def test_loss_gradient_and_clips_are_trls(level: str, kind: str, options: dict[str, Any]) -> None:
    mask = completion_mask(options.get("masked", False))
    low, high = (3e-4, 4e-4) if level == "sequence" else (3e-4, 5e-4)
    old = -3 * random(6, TOKENS, seed=4)
    # drifts of the size of the clips, so that all four cases of the clip occur
    logprobs = (old + 3e-3 * (random(6, TOKENS, seed=5) - 0.5)).requires_grad_()
    ref = old + 0.3 * (random(6, TOKENS, seed=6) - 0.5)
    entropy = (2 * random(6, TOKENS, seed=7)).requires_grad_()
    drawn = old + 0.2 * (random(6, TOKENS, seed=8) - 0.5)
    beta, coefficient = options.get("beta", 0.0), options.get("entropy_coef", 0.0)
    bounds = {"clip_min": 0.97, "clip_max": 1.05}

    kept = mask.bool()
    of = torch.arange(6)[:, None].expand_as(mask)[kept]
    ours = PolicyTokens(
        *(logprobs[kept], old[kept], of, mask.sum(1), ADVANTAGES, ref[kept], entropy[kept])
    )
    theirs: dict[str, Any] = {}
    if mode := options.get("mode"):
        weights = correction_weights(old[kept], drawn[kept], of, mask.sum(1), mode=mode, **bounds)
        # TRL computes these weights where it scores, inline: its formula, on its padded tensors
        difference = (old - drawn) * mask
        sequence = mode.startswith("sequence")
        rho = (difference.sum(-1, keepdim=True) if sequence else difference).exp()
        if mode.endswith("truncate"):
            rho = rho.clamp(bounds["clip_min"], bounds["clip_max"])
        else:
            rho = rho.masked_fill((rho < bounds["clip_min"]) | (rho > bounds["clip_max"]), 0.0)
        assert int((rho != (old - drawn).exp()).sum()) > 0
        theirs["importance_sampling_ratio"] = rho
        if sequence:
            ours.completion_weights = weights
        else:
            ours.token_weights = weights
    their_loss, metrics = grpo_loss(
        *(logprobs, old, mask, ADVANTAGES),
        entropies=entropy,
        inputs={
            **theirs,
            "ref_per_token_logps": ref,
            "num_items_in_batch": torch.tensor(ROLLOUT_TOKENS),
        },
        importance_sampling_level=level,
        loss_type=kind,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        max_completion_length=64,
        use_vllm=bool(mode),
        vllm_importance_sampling_correction=bool(mode),
        entropy_coef=coefficient,
        _entropy_bonus_enabled=coefficient != 0,
        use_adaptive_entropy=False,
        args=SimpleNamespace(
            delta=None,
            steps_per_generation=STEPS,
            use_bias_correction_kl=not options.get("biased", False),
        ),
    )
    objective = Objective(
        *(level, kind, low, high, beta, not options.get("biased", False), coefficient, 64)
    )
    counts = Counts(6.0, float(mask.sum()), ROLLOUT_TOKENS / STEPS)
    result = policy_loss(ours, objective, counts)
    assert result.loss.item() == pytest.approx(their_loss.item(), rel=1e-12)
    inputs = [logprobs, entropy] if coefficient else [logprobs]
    grads_theirs = torch.autograd.grad(their_loss, inputs)
    grads_ours = torch.autograd.grad(result.loss, inputs)
    for grad_ours, grad_theirs in zip(grads_ours, grads_theirs, strict=True):
        assert torch.allclose(grad_ours, grad_theirs, rtol=1e-10, atol=1e-16)
        assert grad_ours.abs().sum() > 0
    for name, clipped in (("low", result.clipped_low), ("high", result.clipped_high)):
        share = clipped.double().mean().item()
        assert metrics[f"clip_ratio/{name}_mean"] == [pytest.approx(share)]
        assert 0 < share < 1
    if result.kl is not None:
        assert metrics["kl"] == [pytest.approx(result.kl.mean().item())]
