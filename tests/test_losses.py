"""SFT's loss as a function: worked by hand, in float64, alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sft.losses import EXPONENTS, sft_loss, total_weight

LOGP = st.floats(-50.0, -0.01)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        # x = 1, 4, 9 response tokens, every token of a sample at -log p = 2, 3, 5
        ("token", (1 * 2 + 4 * 3 + 9 * 5) / 14),
        ("sample", (2 + 3 + 5) / 3),
        ("square", (1 * 2 + 2 * 3 + 3 * 5) / 6),  # x / sqrt(x) = sqrt(x) = 1, 2, 3
    ],
)
def test_sft_averages_by_hand(average: str, expected: float) -> None:
    lengths = [1, 4, 9]
    of = torch.tensor([0] + [1] * 4 + [2] * 9)
    logprobs = -double(2.0, 3.0, 5.0)[of]
    loss = sft_loss(logprobs, of, torch.tensor(lengths), average, total_weight(lengths, average))
    assert loss.item() == pytest.approx(expected, rel=1e-14)


def test_sft_by_token_is_cross_entropy() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(7)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    logprobs = logits.log_softmax(1)[torch.arange(7), targets]
    of, lengths = torch.tensor([0, 0, 1, 1, 1, 1, 1]), torch.tensor([2, 5])
    loss = sft_loss(logprobs, of, lengths, "token", total_weight([2, 5], "token"))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize("average", list(EXPONENTS))
def test_sft_gradient_is_the_token_weight(average: str) -> None:
    lengths = [1, 4]
    of = torch.tensor([0, 1, 1, 1, 1])
    logprobs = double(-1, -2, -3, -4, -5).requires_grad_()
    weight = total_weight(lengths, average)
    sft_loss(logprobs, of, torch.tensor(lengths), average, weight).backward()
    w = {"token": [1, 1], "sample": [1, 1 / 4], "square": [1, 1 / 2]}[average]
    expected = [-w[i] / weight for i in of.tolist()]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-14)
    assert logprobs.grad.sum().item() == pytest.approx(-1.0)  # the weights are normalised


def test_sft_sample_without_response_adds_nothing() -> None:
    of, lengths = torch.tensor([1, 1]), torch.tensor([0, 2])
    for average in EXPONENTS:
        weight = total_weight([0, 2], average)
        loss = sft_loss(double(-1, -3), of, lengths, average, weight)
        assert loss.item() == pytest.approx(2.0, rel=1e-14)


@given(st.lists(st.lists(LOGP, min_size=1, max_size=9), min_size=1), st.data())
def test_sft_parts_sum_to_the_whole(samples: list[list[float]], data: st.DataObject) -> None:
    average = data.draw(st.sampled_from(list(EXPONENTS)))
    weight = total_weight([len(sample) for sample in samples], average)

    def part(rows: list[list[float]]) -> float:
        of = [index for index, row in enumerate(rows) for _ in row]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        logprobs = double(*(value for row in rows for value in row))
        indices = torch.tensor(of, dtype=torch.long)
        return sft_loss(logprobs, indices, lengths, average, weight).item()

    cut = data.draw(st.integers(0, len(samples)))
    assert part(samples[:cut]) + part(samples[cut:]) == pytest.approx(part(samples), rel=1e-12)
