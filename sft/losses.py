"""The SFT loss, averaged by token, by sample, or in between (InternVL 2.5, section 3.3).

A token of a sample with x response tokens weighs w = 1 / x^a; the loss is the weighted mean over
the GLOBAL batch:

    L = sum_ij w_i (-log p_ij) / sum_ij w_i        a = 0 token, 1 sample, 1/2 square averaging
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

EXPONENTS = {"token": 0.0, "sample": 1.0, "square": 0.5}


def total_weight(
    lengths: Sequence[int], average: str, samples: Sequence[float] | None = None
) -> float:
    """The denominator: sum over samples of x * w = x^(1 - a), x > 0 the response tokens.

    samples: x, where a length is that of a piece of a sample (by default the length itself).

    >>> total_weight([1, 4], "square")
    3.0
    >>> total_weight([1, 3, 1], "square", [1, 4, 4])  # the second sample in two pieces
    3.0
    """
    exponent = EXPONENTS[average]
    wholes = lengths if samples is None else samples
    return float(
        sum(
            length ** (1.0 - exponent) if length == whole else length * whole**-exponent
            for length, whole in zip(lengths, wholes, strict=True)
            if length
        )
    )


def sft_loss(
    logprobs: Tensor, completion_of_token: Tensor, lengths: Tensor, average: str, weight: float
) -> Tensor:
    """This micro-batch's part of the loss.

    logprobs: [N]; completion_of_token: [N]; lengths: [C], each completion's x (of a piece: the
    whole sample's); weight: `total_weight` of the global batch. Returns a scalar; the parts of all
    micro-batches and ranks sum to L.

    >>> logp = torch.tensor([-1.0, -2.0, -2.0, -2.0, -2.0])  # x = 1 and x = 4
    >>> of, lengths = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([1, 4])
    >>> float(sft_loss(logp, of, lengths, "square", 3.0))  # (1 + 4 * 2 / 2) / 3
    1.6666666269302368
    """
    x = lengths.to(logprobs.dtype).clamp_min(1)
    token_weight = (x ** -EXPONENTS[average]).index_select(0, completion_of_token)
    return -(token_weight * logprobs).sum() / weight
