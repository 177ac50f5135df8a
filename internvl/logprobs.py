"""Log-probabilities of given tokens without ever holding [tokens, vocabulary] for a whole batch.

The output head and the log-softmax run over a few rows of hidden states at a time; in training
each chunk is recomputed in backward, so that one chunk of logits is all that is ever alive. A
chunk's logits are the only tensor of that size: backward writes their gradient into them.

Where `use_liger_kernel` is asked for, Liger's LigerFusedLinearScaledCrossEntropyFunction (0.8.5,
ops/fused_linear_scaled_cross_entropy.py) stands in: it has a temperature, an entropy, and a
backward for any gradient of each token's. It takes no forbidden ids, and the head's weight instead
of the head, so chunks of our own remain for RL and for heads that are more than a weight.

The chunks lie inside one call of the head (`ScoringHead`). FSDP2 and ZeRO-3 gather weights and
scatter gradients in hooks of a module's call: ranks that called it once a chunk would do that
another number of times each, and wait for each other for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # numbers of one chunk: 128 MiB in float32
# of one chunk on a GPU: with a vocabulary of 152,000, 2^25 would be 220 rows, and a product of so
# few rows waits for the head's weights to be read
MAX_LOGITS_GPU = 2**26
_BLOCK = 2**18  # numbers that a CPU works on at once: they stay in its cache
WithEntropy = bool | Literal["grad"]  # "grad": the entropy carries a gradient


@dataclass
class TokenScores:
    """What the head says of the scored tokens.

    logprobs: [N] float32, log p(token). entropy: [N] float32 of the distribution each token was
    drawn from, or None where it was not asked for; it has a gradient where asked for by "grad".
    """

    logprobs: Tensor
    entropy: Tensor | None


Project = Callable[[Tensor], Tensor]  # hidden states [n, D] -> logits [n, V]
Scores = tuple[Tensor, Tensor]  # log-probabilities [N], entropies [N] or [0]


class ScoringHead(nn.Linear):
    """A head that can score tokens inside the one call that its hooks see.

    score: what is to be made of the hidden states, given the head as a plain function; without it
    they are projected, as by any linear layer.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, score: Callable[[Project, Tensor], Scores] | None = None
    ) -> Tensor | Scores:
        """Logits [N, V] of hidden states [N, D], or what `score` makes of the two."""
        return super().forward(hidden) if score is None else score(super().forward, hidden)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows to work on at once: all on a GPU, few on a CPU."""
    rows = len(logits)
    size = max(1, _BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, size):
        yield slice(start, start + size)


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] and the entropy: [n, V] -> [n], [n] (or [0]).

    Saves the logits and no second tensor of their size; backward turns them into their gradient in
    place, so it can run once (a second time is autograd's error):

        d logp / d z_j = (1[j = target] - p_j) / T        d H / d z_j = -p_j (log p_j + H) / T
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        forbidden: Tensor | None,
        with_entropy: WithEntropy,
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.float()
        if temperature != 1.0:
            scaled = scaled / temperature
        if forbidden is not None:
            scaled = scaled.index_fill(1, forbidden, float("-inf"))
        normaliser = scaled.new_empty(len(scaled))
        entropy = scaled.new_empty(len(scaled) if with_entropy else 0)
        for rows in _blocks(scaled):
            normaliser[rows] = scaled[rows].logsumexp(1)
            if with_entropy:
                every = scaled[rows] - normaliser[rows, None]
                entropy[rows] = -(every.exp() * _finite(every, forbidden)).sum(1)
        logprobs = scaled.gather(1, targets[:, None])[:, 0] - normaliser
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scaled, targets, normaliser, entropy, forbidden)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        if with_entropy != "grad":
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scaled, targets, normaliser, entropy, forbidden = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normaliser)
        weight = grad_logprobs / ctx.temperature
        for rows in _blocks(scaled):
            every = scaled[rows].sub_(normaliser[rows, None])
            outer = -weight[rows, None]
            if grad_entropy is not None:
                surprise = _finite(every, forbidden) + entropy[rows, None]
                outer = outer - grad_entropy[rows, None] / ctx.temperature * surprise
            every.exp_().mul_(outer).scatter_add_(1, targets[rows, None], weight[rows, None])
        return scaled.to(ctx.dtype), None, None, None, None


def _finite(logprobs: Tensor, forbidden: Tensor | None) -> Tensor:
    """Log-probabilities with 0 for a forbidden token: p log p -> 0, where it would be 0 * -inf."""
    return logprobs if forbidden is None else logprobs.masked_fill(logprobs.isneginf(), 0.0)


def _score_chunk(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    temperature: float,
    forbidden: Tensor | None,
    with_entropy: WithEntropy,
) -> Scores:
    logits = project(hidden)
    scores = _TokenLogprobs.apply(logits, targets, temperature, forbidden, with_entropy)
    assert isinstance(scores, tuple)
    return scores


def _is_bare(lm_head: nn.Module) -> bool:
    """Whether the head is its weight and nothing else: no bias, adapter, shard or hook."""
    if type(lm_head) not in (nn.Linear, ScoringHead) or lm_head.bias is not None:
        return False
    hooks = (lm_head._forward_hooks, lm_head._forward_pre_hooks)
    whole = type(lm_head.weight) is nn.Parameter and lm_head.weight.numel() > 0  # ZeRO-3: empty
    return whole and not any(hooks)


def _score_by_liger(
    hidden: Tensor, targets: Tensor, weight: Tensor, temperature: float, with_entropy: WithEntropy
) -> TokenScores:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # the function is not one that autocast knows
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    out = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, temperature=temperature, return_entropy=bool(with_entropy)
    )
    if not with_entropy:
        return TokenScores(-out, None)
    nll, entropy = out
    return TokenScores(
        -nll, entropy.float() if with_entropy == "grad" else entropy.detach().float()
    )


def score_tokens(
    hidden: Tensor,
    targets: Tensor,
    lm_head: nn.Module,
    *,
    temperature: float = 1.0,
    forbidden: Sequence[int] = (),
    with_entropy: WithEntropy = False,
    vocab_size: int,
    max_logits: int | None = None,
    liger: bool = False,
) -> TokenScores:
    """Log-probabilities (and entropies) of `targets` under the head.

    hidden: [N, D]; targets: [N]. temperature divides the logits and `forbidden` ids have no
    probability, as in the sampler that drew the tokens. At most `max_logits` logits live at once
    (by default MAX_LOGITS, on a GPU MAX_LOGITS_GPU). liger: use Liger's function where it can do
    the same, see the module's docstring.
    """
    if liger and not forbidden and len(targets) and _is_bare(lm_head):
        weight = lm_head.weight
        assert isinstance(weight, Tensor)
        return _score_by_liger(hidden, targets, weight, temperature, with_entropy)
    if max_logits is None:
        max_logits = MAX_LOGITS if hidden.device.type == "cpu" else MAX_LOGITS_GPU
    rows = max(1, max_logits // vocab_size)
    mask = torch.tensor(list(forbidden), device=hidden.device) if forbidden else None

    def score(project: Project, hidden: Tensor) -> Scores:
        logprobs, entropies = [], []
        for start in range(0, max(1, len(targets)), rows):
            chunk = (
                hidden[start : start + rows],
                targets[start : start + rows],
                project,
                temperature,
                mask,
                with_entropy,
            )
            # a single chunk is within the bound by itself: recomputing it would buy nothing
            if torch.is_grad_enabled() and len(targets) > rows:
                scores, entropy = checkpoint(_score_chunk, *chunk, use_reentrant=False)
            else:
                scores, entropy = _score_chunk(*chunk)
            logprobs.append(scores)
            entropies.append(entropy)
        return torch.cat(logprobs), torch.cat(entropies)

    once = isinstance(lm_head, ScoringHead)  # an adapter on the head, say, is called for each chunk
    logprobs, entropy = lm_head(hidden, score) if once else score(lm_head, hidden)
    return TokenScores(logprobs, entropy if with_entropy else None)
