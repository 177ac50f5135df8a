"""The SFT loss, averaged by token, by sample, or in between (InternVL 2.5, section 3.3).

A token of a sample with x response tokens weighs w = 1 / x^a; the loss is the weighted mean over
the GLOBAL batch:

    L = sum_ij w_i (-log p_ij) / sum_ij w_i        a = 0 token, 1 sample, 1/2 square averaging
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

EXPONENTS = {"token": 0.0, "sample": 1.0, "square": 0.5}


def total_weight(lengths: Iterable[int], average: str) -> float:
    """The denominator: sum over samples of x * w = x^(1 - a), x > 0 the response tokens.

    >>> total_weight([1, 4], "square")
    3.0
    """
    exponent = EXPONENTS[average]
    return float(sum(length ** (1.0 - exponent) for length in lengths if length))


def sft_loss(
    logprobs: Tensor, completion_of_token: Tensor, lengths: Tensor, average: str, weight: float
) -> Tensor:
    """This micro-batch's part of the loss.

    logprobs: [N]; completion_of_token: [N]; lengths: [C]; weight: `total_weight` of the global
    batch. Returns a scalar; the parts of all micro-batches and ranks sum to L.

    >>> logp = torch.tensor([-1.0, -2.0, -2.0, -2.0, -2.0])  # x = 1 and x = 4
    >>> of, lengths = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([1, 4])
    >>> float(sft_loss(logp, of, lengths, "square", 3.0))  # (1 + 4 * 2 / 2) / 3
    1.6666666269302368
    """
    x = lengths.to(logprobs.dtype).clamp_min(1)
    token_weight = (x ** -EXPONENTS[average]).index_select(0, completion_of_token)
    return -(token_weight * logprobs).sum() / weight
