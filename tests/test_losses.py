"""The losses of SFT, MPO and GSPO as functions: worked by hand, in float64, alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpo.losses import (
    LossWeights,
    PairTerms,
    RewardShift,
    bco_loss,
    dpo_loss,
    generation_loss,
    implicit_rewards,
    mpo_loss,
    pair_terms,
)
from rl.advantages import group_advantages, has_spread
from rl.losses import gspo_loss, gspo_terms, sequence_ratios
from sft.losses import EXPONENTS, sft_loss, total_weight

LN2 = math.log(2.0)
LOGP = st.floats(-50.0, -0.01)
REWARDS = st.floats(-5.0, 5.0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    """-log sigma(-x) = log(1 + e^x)."""
    return math.log1p(math.exp(x))


# ---------------------------------------------------------------- MPO


def test_pair_by_hand() -> None:
    # beta 0.1; log pi(y_c) = -3, log pi_0(y_c) = -5: r_c = 0.1 * 2 = 0.2
    #           log pi(y_r) = -7, log pi_0(y_r) = -4: r_r = 0.1 * -3 = -0.3
    # L_p = log(1 + e^-(0.2 + 0.3))                                     = 0.474077
    # L_q = log(1 + e^-(0.2 - 0.1)) + log(1 + e^(-0.3 - 0.1)), delta .1 = 0.644397 + 0.513015
    # L_g = 3 / 4 tokens                                                = 0.75
    # L   = 0.8 * 0.474077 + 0.2 * 1.157412 + 0.75                      = 1.360744
    terms = pair_terms(
        double(-3), double(-7), double(-5), double(-4), torch.tensor([4]), beta=0.1, delta=0.1
    )
    assert terms.chosen_rewards.item() == pytest.approx(0.2, abs=1e-15)
    assert terms.rejected_rewards.item() == pytest.approx(-0.3, abs=1e-15)
    assert terms.preference.item() == pytest.approx(0.474077, abs=1e-6)
    assert terms.quality.item() == pytest.approx(0.644397 + 0.513015, abs=1e-6)
    assert terms.generation.item() == 0.75
    assert mpo_loss(terms, LossWeights(), 1.0).item() == pytest.approx(1.360744, abs=1e-6)


def test_policy_equal_to_reference() -> None:
    logps, other = double(-3.0, -40.0), double(-5.0, -0.5)
    lengths = torch.tensor([3, 10])
    terms = pair_terms(logps, other, logps, other, lengths, beta=0.1, delta=0.0)
    assert terms.preference.tolist() == pytest.approx([LN2] * 2, abs=1e-15)
    assert terms.quality.tolist() == pytest.approx([2 * LN2] * 2, abs=1e-15)
    assert terms.generation.tolist() == [1.0, 4.0]
    nll = 2.5  # (1 + 4) / 2
    first = mpo_loss(terms, LossWeights(), 2.0).item()
    assert first == pytest.approx(1.2 * LN2 + nll, abs=1e-14)
    assert first == pytest.approx(LossWeights().first_loss(nll), abs=1e-14)
    assert LossWeights(0, 0, 1).first_loss(nll) == nll  # the control


@given(REWARDS, REWARDS, REWARDS)
def test_bco_looks_only_at_rewards_less_delta(chosen: float, rejected: float, delta: float) -> None:
    loss = bco_loss(double(chosen), double(rejected), delta).item()
    expected = softplus(-(chosen - delta)) + softplus(rejected - delta)
    assert loss == pytest.approx(expected, rel=1e-12)
    shifted = bco_loss(double(chosen - delta), double(rejected - delta), 0.0).item()
    assert loss == pytest.approx(shifted, rel=1e-12)


@given(REWARDS, REWARDS, st.floats(-1, 1))
def test_gradients_of_a_pair(chosen: float, rejected: float, delta: float) -> None:
    """The chosen completion is pushed up, the rejected one down, by the closed forms."""
    r_c, r_r = double(chosen).requires_grad_(), double(rejected).requires_grad_()
    up, down = torch.autograd.grad(dpo_loss(r_c, r_r), (r_c, r_r))
    sigma = 1 / (1 + math.exp(chosen - rejected))
    assert (up.item(), down.item()) == pytest.approx((-sigma, sigma), rel=1e-12)
    up, down = torch.autograd.grad(bco_loss(r_c, r_r, delta), (r_c, r_r))
    assert up.item() == pytest.approx(-1 / (1 + math.exp(chosen - delta)), rel=1e-12)
    assert down.item() == pytest.approx(1 / (1 + math.exp(-(rejected - delta))), rel=1e-12)


def test_gradients_in_log_probabilities() -> None:
    chosen, rejected = double(-3).requires_grad_(), double(-7).requires_grad_()
    ref = double(-4).requires_grad_()
    beta = 0.1
    assert implicit_rewards(chosen, ref, beta).item() == pytest.approx(0.1)
    (slope,) = torch.autograd.grad(implicit_rewards(chosen, ref, beta), chosen)
    assert slope.item() == beta
    (slope,) = torch.autograd.grad(generation_loss(chosen, torch.tensor([4])), chosen)
    assert slope.item() == -0.25
    terms = pair_terms(chosen, rejected, ref, ref, torch.tensor([4]), beta=beta, delta=0.0)
    assert not terms.chosen_rewards.requires_grad and not terms.rejected_rewards.requires_grad
    up, down = torch.autograd.grad(mpo_loss(terms, LossWeights(), 1.0), (chosen, rejected))
    assert up.item() < -0.25 < 0 < down.item()


@given(st.lists(st.tuples(LOGP, LOGP, LOGP, LOGP, st.integers(1, 40)), min_size=1), st.data())
def test_mpo_parts_sum_to_the_whole(
    pairs: list[tuple[float, float, float, float, int]], data: st.DataObject
) -> None:
    """Any cut of the pairs into micro-batches gives the same loss."""

    def part(rows: list[tuple[float, float, float, float, int]]) -> float:
        columns = [double(*(float(row[i]) for row in rows)) for i in range(4)]
        lengths = torch.tensor([row[4] for row in rows], dtype=torch.long)
        terms: PairTerms = pair_terms(*columns, lengths, beta=0.1, delta=0.3)
        return mpo_loss(terms, LossWeights(), float(len(pairs))).item()

    cut = data.draw(st.integers(0, len(pairs)))
    assert part(pairs[:cut]) + part(pairs[cut:]) == pytest.approx(part(pairs), rel=1e-12)


def test_delta_by_hand() -> None:
    shift = RewardShift()
    assert shift.delta == 0.0  # the first step has none behind it
    shift.update(total=1.0 - 0.5 + 0.25 + 0.25, count=4)  # two pairs
    assert shift.delta == 0.25
    shift.update(total=-3.0 - 1.0, count=2)  # one pair: all six rewards weigh alike
    assert shift.delta == (1.0 - 4.0) / 6
    shift.update(total=0.0, count=0)  # a step of no pair
    assert shift.delta == -0.5


STEPS = st.lists(st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=6), max_size=5)


@given(STEPS)
def test_delta_is_the_mean_of_all_rewards_before(steps: list[list[tuple[float, float]]]) -> None:
    shift = RewardShift()
    before: list[float] = []
    for pairs in steps:
        expected = math.fsum(before) / len(before) if before else 0.0
        assert shift.delta == pytest.approx(expected, abs=1e-12)
        rewards = [reward for pair in pairs for reward in pair]
        shift.update(total=math.fsum(rewards), count=len(rewards))
        before += rewards


# ---------------------------------------------------------------- SFT


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


# ---------------------------------------------------------------- GSPO


def test_ratio_is_a_geometric_mean_by_hand() -> None:
    # completion 0: log ratios 0.3, -0.1 over 2 tokens: s = e^0.1; completion 1: -0.6 over 3: e^-0.2
    new = double(-0.7, -1.1, -1.2, -1.0, -2.0)
    old = double(-1.0, -1.0, -1.0, -1.0, -1.6)
    of, lengths = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3])
    ratios = sequence_ratios(new, old, of, lengths)
    assert ratios.tolist() == pytest.approx([math.exp(0.1), math.exp(-0.2)], rel=1e-14)


LOW, HIGH = 3e-4, 4e-4


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        # good and already likelier than the upper clip: flat, at the clip
        (1.001, 2.0, -2.0 * (1 + HIGH), 0.0, "high"),
        # good and less likely: pulled up, however far below
        (0.9, 2.0, -1.8, -2.0, ""),
        # bad and already less likely than the lower clip: flat, at the clip
        (0.999, -2.0, 2.0 * (1 - LOW), 0.0, "low"),
        # bad and likelier: pushed down, however far above
        (1.1, -2.0, 2.2, 2.0, ""),
        # inside the clips, whose two sides differ: 1.00035 is between 3e-4 and 4e-4
        (1.00035, 1.0, -1.00035, -1.0, ""),
        (1 - 0.00035, -1.0, 1 - LOW, 0.0, "low"),
        (1.0, 1.0, -1.0, -1.0, ""),
        (1.1, 0.0, 0.0, 0.0, ""),  # no advantage, no push
    ],
)
def test_gspo_clip(ratio: float, advantage: float, loss: float, slope: float, clipped: str) -> None:
    s = double(ratio).requires_grad_()
    terms = gspo_terms(s, double(advantage), epsilon_low=LOW, epsilon_high=HIGH)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-12)
    assert torch.autograd.grad(terms.loss, s)[0].item() == slope
    assert (terms.clipped_low.item(), terms.clipped_high.item()) == (
        clipped == "low",
        clipped == "high",
    )


def test_gspo_gradient_while_policy_is_old() -> None:
    """At s = 1 each of a completion's |y| tokens gets -A / (n |y|), n over all sequences."""
    logprobs = double(-1, -2, -3).requires_grad_()
    of, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    ratios = sequence_ratios(logprobs, logprobs.detach(), of, lengths)
    assert ratios.tolist() == [1.0, 1.0]
    terms = gspo_terms(ratios, double(0.7, -0.7), epsilon_low=LOW, epsilon_high=HIGH)
    loss = gspo_loss(terms, 4.0)  # two more sequences lie in a group without spread
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None
    expected = [-0.7 / (4 * 2), -0.7 / (4 * 2), 0.7 / 4]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-14)


def test_gspo_of_no_completion_is_zero() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    index = torch.zeros(0, dtype=torch.long)
    terms = gspo_terms(
        sequence_ratios(none, none, index, index), none, epsilon_low=LOW, epsilon_high=HIGH
    )
    assert gspo_loss(terms, 8.0).item() == 0.0


def test_advantages_by_hand() -> None:
    # rewards 1, 1, 0, 0: mean 1/2, unbiased variance (4 * 1/4) / 3 = 1/3
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert group_advantages([1.0, 1.0, 0.0, 0.0]) == pytest.approx(
        [expected, expected, -expected, -expected], rel=1e-14
    )
    assert group_advantages([1.0, 1.0, 0.0, 0.0], scale=False) == [0.5, 0.5, -0.5, -0.5]


def test_unjudged_rewards_take_no_part() -> None:
    judged = group_advantages([1.0, 0.0, 0.0])
    assert group_advantages([1.0, None, 0.0, None, 0.0]) == [
        *(judged[0], 0.0, judged[1], 0.0, judged[2])
    ]
    for rewards in ([None, None], [1.0, None], [None], []):
        advantages = group_advantages(rewards)
        assert advantages == [0.0] * len(rewards)
        assert not has_spread(advantages)


@given(st.floats(-2, 2), st.integers(2, 20), st.booleans())
def test_group_without_spread_is_exactly_zero(reward: float, size: int, scale: bool) -> None:
    """Also where the mean of equal rewards rounds away from them (0.1 three times does)."""
    advantages = group_advantages([reward] * size, scale=scale)
    assert advantages == [0.0] * size
    assert not has_spread(advantages)


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=2, max_size=16))
def test_advantages_have_mean_zero_and_the_rewards_order(rewards: list[float]) -> None:
    advantages = group_advantages(rewards)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    by_reward = sorted(zip(rewards, advantages, strict=True))
    assert [a for _, a in by_reward] == sorted(advantages)
    assert has_spread(advantages) == (len(set(rewards)) > 1)
