"""Log-probabilities of given tokens without ever holding [tokens, vocabulary] for a whole batch.

The output head and the log-softmax run over a few rows of hidden states at a time; in training
each chunk is recomputed in backward, so that one chunk of logits is all that is ever alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24  # numbers of one chunk: 64 MiB in float32


@dataclass
class TokenScores:
    """What the head says of the scored tokens.

    logprobs: [N] float32, log p(token). entropy: [N] float32 of the distribution each token was
    drawn from, detached, or None where it was not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None


def _score_chunk(
    hidden: Tensor,
    targets: Tensor,
    lm_head: nn.Module,
    temperature: float,
    forbidden: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    logits = lm_head(hidden).float() / temperature
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, float("-inf"))
    normaliser = logits.logsumexp(1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - normaliser
    if not with_entropy:
        return logprobs, logprobs.new_zeros(0)
    with torch.no_grad():
        every = logits.detach() - normaliser.detach()[:, None]
        # p log p -> 0 for a forbidden token, where it would be 0 * -inf
        entropy = -(every.exp() * every.masked_fill(every.isneginf(), 0.0)).sum(1)
    return logprobs, entropy


def score_tokens(
    hidden: Tensor,
    targets: Tensor,
    lm_head: nn.Module,
    *,
    temperature: float = 1.0,
    forbidden: Sequence[int] = (),
    with_entropy: bool = False,
    vocab_size: int,
    max_logits: int = MAX_LOGITS,
) -> TokenScores:
    """Log-probabilities (and entropies) of `targets` under the head.

    hidden: [N, D]; targets: [N]. temperature divides the logits and `forbidden` ids have no
    probability, as in the sampler that drew the tokens. At most `max_logits` logits live at once.
    """
    rows = max(1, max_logits // vocab_size)
    mask = torch.tensor(list(forbidden), device=hidden.device) if forbidden else None
    logprobs, entropies = [], []
    for start in range(0, max(1, len(targets)), rows):
        chunk = (
            hidden[start : start + rows],
            targets[start : start + rows],
            lm_head,
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
    return TokenScores(torch.cat(logprobs), torch.cat(entropies) if with_entropy else None)
