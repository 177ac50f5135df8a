"""The losses of preference pairs as functions: worked by hand, in float64, alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpo.loss_set import LOSSES, MPO_WEIGHTS, LossSet, Pairs
from mpo.losses import (
    RewardShift,
    bco_loss,
    dpo_loss,
    generation_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    log_odds,
    odds_ratio_loss,
    robust_dpo_loss,
)

LN2 = math.log(2.0)
LOGP = st.floats(-50.0, -0.01)
REWARDS = st.floats(-5.0, 5.0)
SMOOTHING = st.floats(0.0, 0.45)
MPO = LossSet(MPO_WEIGHTS)
EVERY = LossSet(dict.fromkeys(LOSSES, 1.0), label_smoothing=0.1)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    """-log sigma(-x) = log(1 + e^x)."""
    return math.log1p(math.exp(x))


def one_pair(chosen: float, rejected: float, *refs: float, lengths: tuple[int, int]) -> Pairs:
    counts = (torch.tensor([length]) for length in lengths)
    return Pairs(double(chosen), double(rejected), *counts, *(double(ref) for ref in refs))


# ---------------------------------------------------------------- by hand


def test_pair_by_hand() -> None:
    # beta 0.1; log pi(y_c) = -3, log pi_0(y_c) = -5: r_c = 0.1 * 2 = 0.2
    #           log pi(y_r) = -7, log pi_0(y_r) = -4: r_r = 0.1 * -3 = -0.3
    # L_p = log(1 + e^-(0.2 + 0.3))                                     = 0.474077
    # L_q = log(1 + e^-(0.2 - 0.1)) + log(1 + e^(-0.3 - 0.1)), delta .1 = 0.644397 + 0.513015
    # L_g = 3 / 4 tokens                                                = 0.75
    # L   = 0.8 * 0.474077 + 0.2 * 1.157412 + 0.75                      = 1.360744
    pairs = one_pair(-3, -7, -5, -4, lengths=(4, 2))
    chosen, rejected = pairs.rewards(0.1)
    assert chosen.item() == pytest.approx(0.2, abs=1e-15)
    assert rejected.item() == pytest.approx(-0.3, abs=1e-15)
    terms = MPO.terms(pairs, delta=0.1)
    assert list(terms) == ["sigmoid", "bco_pair", "sft"]
    assert terms["sigmoid"].item() == pytest.approx(0.474077, abs=1e-6)
    assert terms["bco_pair"].item() == pytest.approx(0.644397 + 0.513015, abs=1e-6)
    assert terms["sft"].item() == 0.75
    assert MPO.total(terms, 1.0).item() == pytest.approx(1.360744, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # the pair above: margin 0.5, -log sigma(0.5) = 0.474077, -log sigma(-0.5) = 0.974077
        ("sigmoid", {"label_smoothing": 0.1}, 0.9 * 0.474077 + 0.1 * 0.974077),
        ("robust", {"label_smoothing": 0.1}, (0.9 * 0.474077 - 0.1 * 0.974077) / 0.8),
        ("robust", {}, 0.474077),
        ("hinge", {}, 0.5),
        # h_c = 2 / 4 tokens, h_r = -3 / 2 tokens: (0.5 + 1.5 - 1 / 0.2)^2
        ("ipo", {}, 9.0),
        ("ipo", {"beta": 0.25}, 0.0),
        # mean log p: -3/4 and -7/2; odds e^-0.75 / (1 - e^-0.75) = 0.895255, 0.0311377
        ("orpo", {}, math.log(1 + 0.0311377 / 0.895255)),
    ],
)
def test_other_losses_by_hand(name: str, options: dict[str, float], expected: float) -> None:
    pairs = one_pair(-3, -7, -5, -4, lengths=(4, 2))
    (loss,) = LossSet({name: 1.0}, **options).terms(pairs).values()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_policy_equal_to_reference() -> None:
    """Each loss has the value that the first loss is compared with."""
    logps, other = double(-3.0, -40.0), double(-5.0, -0.5)
    lengths = torch.tensor([3, 10])
    pairs = Pairs(logps, other, lengths, lengths, logps, other)
    terms = EVERY.terms(pairs)
    expected = {
        "sigmoid": LN2,
        "bco_pair": 2 * LN2,
        "robust": LN2,
        "ipo": 25.0,  # (1 / (2 * 0.1))^2
        "hinge": 1.0,
    }
    for name, value in expected.items():
        assert terms[name].tolist() == pytest.approx([value] * 2, abs=1e-14)
    assert terms["sft"].tolist() == [1.0, 4.0]
    nll = 2.5  # (1 + 4) / 2
    first = MPO.total(MPO.terms(pairs), 2.0).item()
    assert first == pytest.approx(1.2 * LN2 + nll, abs=1e-14)
    assert first == pytest.approx(MPO.first_loss({"sft": nll}) or 0.0, abs=1e-14)
    means = {name: float(term.mean()) for name, term in terms.items()}
    assert EVERY.first_loss(means) == pytest.approx(EVERY.total(terms, 2.0).item(), abs=1e-13)
    wrong = {name: means[name] + (name in expected) for name in means}
    assert EVERY.first_loss(wrong) == EVERY.first_loss(means)
    control = LossSet({"sigmoid": 0.0, "bco_pair": 0.0, "sft": 1.0})
    assert control.first_loss({"sft": nll}) == nll and control.needs_reference
    free = LossSet({"orpo": 0.1, "sft": 1.0})
    assert free.first_loss(means) is None and not free.needs_reference


def test_losses_without_a_reference_read_none() -> None:
    pairs = one_pair(-3, -7, lengths=(4, 2))
    for name, loss in LOSSES.items():
        if loss.needs_reference:
            with pytest.raises(ValueError, match="rewards need a reference"):
                LossSet({name: 1.0}).terms(pairs)
        else:
            assert LossSet({name: 1.0}).terms(pairs)[name].shape == (1,)


# ---------------------------------------------------------------- properties


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


@given(REWARDS, REWARDS, SMOOTHING)
def test_smoothed_losses(chosen: float, rejected: float, smoothing: float) -> None:
    """Without smoothing both are DPO; cDPO mixes the two orders, robust takes the mixture back."""
    r_c, r_r = double(chosen), double(rejected)
    plain, flipped = dpo_loss(r_c, r_r), dpo_loss(r_r, r_c)
    assert torch.equal(dpo_loss(r_c, r_r, 0.0), plain)
    assert torch.equal(robust_dpo_loss(r_c, r_r, 0.0), plain)
    mixed = (1 - smoothing) * plain + smoothing * flipped
    assert dpo_loss(r_c, r_r, smoothing).item() == pytest.approx(mixed.item(), rel=1e-12)
    # the mean of robust over flips with probability e is DPO: it is unbiased (its lemma 3.1)
    robust, other = (robust_dpo_loss(*r, smoothing) for r in ((r_c, r_r), (r_r, r_c)))
    unbiased = (1 - smoothing) * robust + smoothing * other
    assert unbiased.item() == pytest.approx(plain.item(), rel=1e-9, abs=1e-12)


@given(LOGP, LOGP)
def test_odds_ratio_is_of_odds(chosen: float, rejected: float) -> None:
    p_c, p_r = math.exp(chosen), math.exp(rejected)
    ratio = (p_c * (1 - p_r)) / (p_r * (1 - p_c))
    loss = odds_ratio_loss(double(chosen), double(rejected)).item()
    assert loss == pytest.approx(math.log1p(1 / ratio), rel=1e-9)
    other = odds_ratio_loss(double(rejected), double(chosen)).item()
    assert other - loss == pytest.approx(math.log(ratio), rel=1e-9, abs=1e-9)


@given(REWARDS, REWARDS, st.floats(-3, 3))
def test_a_preference_looks_only_at_the_margin(chosen: float, rejected: float, by: float) -> None:
    r_c, r_r = double(chosen), double(rejected)
    for loss in (
        dpo_loss,
        hinge_loss,
        lambda c, r: robust_dpo_loss(c, r, 0.2),
        lambda c, r: ipo_loss(c, r, 0.5),
    ):
        assert torch.allclose(loss(r_c, r_r), loss(r_c + by, r_r + by), rtol=1e-9, atol=1e-12)


EXTREME = st.sampled_from([-1e4, -1e3, -30.0, -1e-3, -1e-7, 0.0])


@given(EXTREME, EXTREME, EXTREME, EXTREME, st.sampled_from([torch.float32, torch.float64]))
def test_extreme_log_probabilities_stay_finite(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, dtype: torch.dtype
) -> None:
    """Sums of 0 (probability 1) to -1e4: every loss and every gradient is a number."""
    values = [chosen, rejected, ref_chosen, ref_rejected]
    logps = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in values]
    lengths = torch.tensor([1])
    pairs = Pairs(logps[0], logps[1], lengths, lengths, logps[2], logps[3])
    for name, term in EVERY.terms(pairs, delta=100.0).items():
        assert term.isfinite().all(), name
        for grad in torch.autograd.grad(
            term.sum(), logps, retain_graph=True, materialize_grads=True
        ):
            assert grad.isfinite().all(), name


def test_log_odds_near_certainty() -> None:
    """log(1 - p) by expm1: p = 1 - 1e-6 has odds 1e6, which float32 would round by 5%."""
    odds = log_odds(torch.tensor([math.log1p(-1e-6)])).exp().item()
    assert odds == pytest.approx(1e6, rel=1e-3)
    assert log_odds(torch.tensor([0.0])).item() == pytest.approx(-math.log(2**-23), rel=1e-6)


def test_gradients_in_log_probabilities() -> None:
    chosen, rejected = double(-3).requires_grad_(), double(-7).requires_grad_()
    ref = double(-4).requires_grad_()
    assert implicit_rewards(chosen, ref, 0.1).item() == pytest.approx(0.1)
    (slope,) = torch.autograd.grad(implicit_rewards(chosen, ref, 0.1), chosen)
    assert slope.item() == 0.1
    (slope,) = torch.autograd.grad(generation_loss(chosen, torch.tensor([4])), chosen)
    assert slope.item() == -0.25
    pairs = Pairs(chosen, rejected, torch.tensor([4]), torch.tensor([2]), ref, ref)
    up, down = torch.autograd.grad(MPO.total(MPO.terms(pairs), 1.0), (chosen, rejected))
    assert up.item() < -0.25 < 0 < down.item()
    for name, term in EVERY.terms(pairs).items():
        grads = torch.autograd.grad(
            term.sum(), (chosen, rejected), retain_graph=True, materialize_grads=True
        )
        assert grads[0].item() < 0, name
        assert grads[1].item() > 0 or name == "sft", name


@given(
    st.lists(st.tuples(LOGP, LOGP, LOGP, LOGP, st.integers(1, 40), st.integers(1, 40)), min_size=1),
    st.data(),
)
def test_parts_sum_to_the_whole(pairs: list[tuple[Any, ...]], data: st.DataObject) -> None:
    """Any cut of the pairs into micro-batches gives the same loss, of all types."""

    def part(rows: list[tuple[Any, ...]]) -> float:
        logps, refs, lengths = (
            [value for row in rows for value in row[at : at + 2]] for at in (0, 2, 4)
        )
        counts = torch.tensor(lengths, dtype=torch.long)
        terms = EVERY.terms(Pairs.alternating(double(*logps), counts, double(*refs)), delta=0.3)
        return EVERY.total(terms, float(len(pairs))).item()

    cut = data.draw(st.integers(0, len(pairs)))
    assert part(pairs[:cut]) + part(pairs[cut:]) == pytest.approx(part(pairs), rel=1e-12)


# ---------------------------------------------------------------- delta


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
