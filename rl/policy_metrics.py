"""What a micro-batch's loss tells the log, by TRL's names; and its weights, from the options."""

from __future__ import annotations

from torch import Tensor

from rl.loss_options import LossOptions
from rl.losses import PolicyLoss, PolicyTokens, correction_weights
from training.metrics import Metrics


def weigh(tokens: PolicyTokens, drawn: Tensor, options: LossOptions, metrics: Metrics) -> None:
    """Weigh the tokens by how far the sampler's log-probabilities, `drawn`, were off; in place."""
    weights = correction_weights(
        *(tokens.old_logprobs, drawn, tokens.completion_of_token, tokens.lengths),
        mode=options.vllm_importance_sampling_mode,
        clip_min=options.vllm_importance_sampling_clip_min,
        clip_max=options.vllm_importance_sampling_clip_max,
    )
    if options.vllm_importance_sampling_mode.startswith("sequence"):
        tokens.completion_weights = weights
    else:
        tokens.token_weights = weights
    metrics.mean("sampling/importance_sampling_ratio/mean", weights)
    metrics.maximum("sampling/importance_sampling_ratio/max", weights)


def add_loss_metrics(metrics: Metrics, result: PolicyLoss, entropy: Tensor) -> None:
    """Add the shares of what was clipped, the KL term and the entropy."""
    metrics.mean("clip_ratio/low_mean", result.clipped_low.float())
    metrics.mean("clip_ratio/high_mean", result.clipped_high.float())
    metrics.mean("clip_ratio/region_mean", (result.clipped_low | result.clipped_high).float())
    if result.kl is not None:
        metrics.mean("kl", result.kl)
    metrics.mean("entropy", entropy)
