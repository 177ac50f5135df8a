"""The policy's losses and advantages as functions: worked by hand, in float64, alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rl.advantages import group_advantages, has_spread, standard_deviation
from rl.losses import (
    LEVELS,
    LOSS_TYPES,
    Counts,
    Objective,
    PolicyTokens,
    clipped_objective,
    correction_weights,
    policy_loss,
    sequence_ratios,
)

LOW, HIGH = 3e-4, 4e-4


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ratio_is_a_geometric_mean_by_hand() -> None:
    # completion 0: log ratios 0.3, -0.1 over 2 tokens: s = e^0.1; completion 1: -0.6 over 3: e^-0.2
    new = double(-0.7, -1.1, -1.2, -1.0, -2.0)
    old = double(-1.0, -1.0, -1.0, -1.0, -1.6)
    of, lengths = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3])
    ratios = sequence_ratios(new, old, of, lengths)
    assert ratios.tolist() == pytest.approx([math.exp(0.1), math.exp(-0.2)], rel=1e-14)


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
def test_clip(ratio: float, advantage: float, loss: float, slope: float, clipped: str) -> None:
    s = double(ratio).requires_grad_()
    value = clipped_objective(s, double(advantage), epsilon_low=LOW, epsilon_high=HIGH)
    assert value.item() == pytest.approx(loss, rel=1e-12)
    assert torch.autograd.grad(value, s)[0].item() == slope
    new = torch.log(double(ratio))
    tokens = PolicyTokens(new, double(0), torch.tensor([0]), torch.tensor([1]), double(advantage))
    for level in LEVELS:
        result = policy_loss(tokens, Objective(level), Counts(1, 1, 1))
        assert result.loss.item() == pytest.approx(loss, rel=1e-12)
        assert bool(result.clipped_low) == (clipped == "low")
        assert bool(result.clipped_high) == (clipped == "high")


# ---------------------------------------------------------------- three completions, by hand

LENGTHS = [2, 1, 3]
OF = torch.tensor([0, 0, 1, 2, 2, 2])
ADVANTAGES = double(0.7, -0.7, 0.4)
COUNTS = Counts(sequences=5, tokens=11, rollout_tokens=13)  # there are others elsewhere


def tokens(drift: float = 0.3, seed: int = 0, **values: Any) -> PolicyTokens:
    draw = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(6, generator=draw, dtype=torch.float64)
    new = old + drift * (torch.rand(6, generator=draw, dtype=torch.float64) - 0.5)
    return PolicyTokens(new.requires_grad_(), old, OF, torch.tensor(LENGTHS), ADVANTAGES, **values)


DIVIDED = {
    "grpo": [1 / 5 / length for length in LENGTHS],
    "bnpo": [1 / 11] * 3,
    "dapo": [1 / 13] * 3,
    "dr_grpo": [1 / (5 * 64)] * 3,
    "luspo": [1 / 5] * 3,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_level_and_sum_by_loops(level: str, kind: str) -> None:
    """Value and gradient, from the formulas in plain Python; at sequence_token sg[] counts."""
    given = tokens(seed=1)
    objective = Objective(level, kind, 0.01, 0.02, max_completion_length=64)
    loss = policy_loss(given, objective, COUNTS).loss
    loss.backward()
    total, slopes = 0.0, []
    place = 0
    for length, advantage, share in zip(LENGTHS, ADVANTAGES.tolist(), DIVIDED[kind], strict=True):
        logs = (given.logprobs - given.old_logprobs).tolist()[place : place + length]
        place += length
        s = math.exp(sum(logs) / length)
        per_token = []
        for log in logs:
            ratio = math.exp(log) if level == "token" else s
            bounded = min(max(ratio, 0.99), 1.02)
            flat = (bounded - ratio) * advantage < 0
            total += -min(ratio * advantage, bounded * advantage) * share
            per_token.append(0.0 if flat else -ratio * advantage * share)
        # one ratio of all tokens: each gets 1/|y| of what the whole completion gets
        slopes += [sum(per_token) / length] * length if level == "sequence" else per_token
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert given.logprobs.grad is not None
    assert given.logprobs.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert 0 < sum(slope == 0 for slope in slopes) < 6  # some are clipped, some are not


def test_gspo_token_is_gspo_where_a_completion_has_one_advantage() -> None:
    """Section 4.3 of the paper: the same objective, clip and gradient."""
    for seed in range(5):
        grads, losses = [], []
        for level in ("sequence", "sequence_token"):
            given = tokens(seed=seed)
            loss = policy_loss(given, Objective(level, "grpo", 0.05, 0.08), COUNTS).loss
            losses.append(loss.item())
            grads.append(torch.autograd.grad(loss, given.logprobs)[0])
        assert losses[0] == pytest.approx(losses[1], rel=1e-14)
        assert torch.allclose(*grads, rtol=1e-12, atol=0)


def test_gradient_while_policy_is_old() -> None:
    """At s = 1 each of a completion's |y| tokens gets -A / (n |y|), n over all sequences."""
    logprobs = double(-1, -2, -3).requires_grad_()
    of, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    given = PolicyTokens(logprobs, logprobs.detach(), of, lengths, double(0.7, -0.7))
    # two more sequences lie in a group without spread
    loss = policy_loss(given, Objective(), Counts(4, 9, 9)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None
    expected = [-0.7 / (4 * 2), -0.7 / (4 * 2), 0.7 / 4]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-14)


FULL = {"beta": 0.2, "entropy_coef": 0.3}


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_of_no_completion_is_zero(kind: str) -> None:
    none, index = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    given = PolicyTokens(none, none, index, index, none, none, none, none)
    for level in LEVELS:
        for counts in (Counts(8, 0, 0), Counts(8, 5, 5)):
            objective = Objective(level, kind, **FULL)
            assert policy_loss(given, objective, counts).loss.item() == 0.0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_parts_sum_to_the_whole(level: str, kind: str) -> None:
    """Any cut into micro-batches, with the KL term, the bonus and weights, is the same loss."""
    draw = torch.Generator().manual_seed(1)
    extra = [torch.rand(6, generator=draw, dtype=torch.float64) for _ in range(3)]
    whole = tokens(ref_logprobs=-extra[0], entropy=extra[1], token_weights=extra[2])
    objective = Objective(level, kind, 0.05, 0.08, **FULL)
    expected = policy_loss(whole, objective, COUNTS).loss.item()
    total = 0.0
    for cut, completions in (((0, 3), (0, 2)), ((3, 6), (2, 3))):
        part, kept = slice(*cut), slice(*completions)
        split = PolicyTokens(
            *(whole.logprobs[part], whole.old_logprobs[part], OF[part] - completions[0]),
            *(whole.lengths[kept], whole.advantages[kept], -extra[0][part], extra[1][part]),
            extra[2][part],
        )
        total += policy_loss(split, objective, COUNTS).loss.item()
    assert total == pytest.approx(expected, rel=1e-12)


def test_a_weight_of_a_completion_is_that_of_each_of_its_tokens() -> None:
    weights = double(0.5, 2.0, 0.0)
    for level in LEVELS:
        for kind in LOSS_TYPES:
            objective = Objective(level, kind)
            by_completion = policy_loss(tokens(completion_weights=weights), objective, COUNTS)
            by_token = policy_loss(tokens(token_weights=weights[OF]), objective, COUNTS)
            assert by_completion.loss.item() == pytest.approx(by_token.loss.item(), rel=1e-12)
            # and they come on top of the ratio: a weight of 1 changes nothing
            ones = policy_loss(tokens(token_weights=torch.ones(6)), objective, COUNTS)
            plain = policy_loss(tokens(), objective, COUNTS)
            assert ones.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # rho of the tokens: 1, e, 1/e, e^2; of the completions: e, e
        ("token_truncate", [1.0, 2.0, 0.5, 2.0]),
        ("token_mask", [1.0, 0.0, 0.0, 0.0]),
        ("sequence_truncate", [2.0, 2.0]),
        ("sequence_mask", [0.0, 0.0]),
    ],
)
def test_correction_by_hand(mode: str, expected: list[float]) -> None:
    old, drawn = double(-1, -1, -3, -1), double(-1, -2, -2, -3)
    of, lengths = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2])
    bounds = {"clip_min": 0.5, "clip_max": 2.0}
    assert correction_weights(old, drawn, of, lengths, mode=mode, **bounds).tolist() == expected
    free = correction_weights(old, drawn, of, lengths, mode=mode, clip_min=None, clip_max=None)
    by_token = [1.0, math.e, 1 / math.e, math.e**2]
    unbounded = by_token if mode.startswith("token") else [math.e, math.e]
    assert free.tolist() == pytest.approx(unbounded, rel=1e-14)


def test_kl_and_entropy_by_hand() -> None:
    # one token: new -1, old -1, ref -2: k3 = e^-1 - (-1) - 1 = e^-1
    given = PolicyTokens(
        *(double(-1).requires_grad_(), double(-1), torch.tensor([0]), torch.tensor([1])),
        *(double(0), double(-2), double(1.5)),
    )
    plain = Objective(beta=0.1, entropy_coef=0.01, use_bias_correction_kl=False)
    result = policy_loss(given, plain, Counts(1, 1, 1))
    assert result.loss.item() == pytest.approx(0.1 / math.e - 0.01 * 1.5, rel=1e-14)
    (slope,) = torch.autograd.grad(result.loss, given.logprobs)
    assert slope.item() == pytest.approx(0.1 * (1 - 1 / math.e), rel=1e-14)  # k3' = 1 - pi_ref/pi
    corrected = policy_loss(given, replace(plain, use_bias_correction_kl=True), Counts(1, 1, 1))
    (slope,) = torch.autograd.grad(corrected.loss, given.logprobs)
    assert slope.item() == pytest.approx(0.1, rel=1e-14)  # r k3: reverse KL's own, log(pi/pi_ref)


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand() -> None:
    # rewards 1, 1, 0, 0: mean 1/2, unbiased variance (4 * 1/4) / 3 = 1/3
    rewards = [1.0, 1.0, 0.0, 0.0]
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert group_advantages(rewards) == pytest.approx(
        [expected, expected, -expected, -expected], rel=1e-14
    )
    assert group_advantages(rewards, scale="none") == [0.5, 0.5, -0.5, -0.5]
    # the others of a right one: 1, 0, 0; of a wrong one: 1, 1, 0
    rloo = group_advantages(rewards, scale="none", estimator="rloo")
    assert rloo == pytest.approx([2 / 3, 2 / 3, -2 / 3, -2 / 3], rel=1e-14)
    by_batch = group_advantages(rewards, scale="batch", batch_std=0.25)
    assert by_batch == pytest.approx([0.5 / 0.2501] * 2 + [-0.5 / 0.2501] * 2, rel=1e-14)
    assert standard_deviation([1.0, None, 1.0, 0.0, 0.0]) == pytest.approx(math.sqrt(1 / 3))
    assert standard_deviation([3.0, None]) == 0.0


def test_unjudged_rewards_take_no_part() -> None:
    judged = group_advantages([1.0, 0.0, 0.0])
    assert group_advantages([1.0, None, 0.0, None, 0.0]) == [
        *(judged[0], 0.0, judged[1], 0.0, judged[2])
    ]
    assert group_advantages([1.0, None, 0.0], scale="none", estimator="rloo") == [1.0, 0.0, -1.0]
    for rewards in ([None, None], [1.0, None], [None], []):
        advantages = group_advantages(rewards)
        assert advantages == [0.0] * len(rewards)
        assert not has_spread(advantages)


WAYS = [("group", "grpo"), ("none", "grpo"), ("none", "rloo"), ("batch", "rloo")]


@given(st.floats(-2, 2), st.integers(2, 20), st.sampled_from(WAYS))
def test_group_without_spread_is_exactly_zero(
    reward: float, size: int, way: tuple[str, str]
) -> None:
    """Also where the mean of equal rewards rounds away from them (0.1 three times does)."""
    scale, estimator = way
    options = {"scale": scale, "estimator": estimator}
    advantages = group_advantages([reward] * size, batch_std=0.7, **options)
    assert advantages == [0.0] * size
    assert not has_spread(advantages)


@given(
    st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=2, max_size=16), st.sampled_from(WAYS)
)
def test_advantages_have_mean_zero_and_the_rewards_order(
    rewards: list[float], way: tuple[str, str]
) -> None:
    scale, estimator = way
    advantages = group_advantages(rewards, scale=scale, estimator=estimator, batch_std=0.7)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    by_reward = sorted(zip(rewards, advantages, strict=True))
    assert [a for _, a in by_reward] == sorted(advantages)
    assert has_spread(advantages) == (len(set(rewards)) > 1)
