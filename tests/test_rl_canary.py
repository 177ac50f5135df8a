"""The canary alone: what it makes of what engines answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from trainer_cases import questions, write_images

from internvl.errors import UserError
from internvl.sampler import SamplingConfig, Score
from rl.syncing import Canary

MINE = [-1.0, -2.0, -3.0]


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    write_images(tmp_path, 2)
    config = SamplingConfig(n=2, max_tokens=16)
    rows = questions(tmp_path, ["mixed", "other"])
    made = Canary(rows, lambda text: [5, 6, 7], config, number=2)
    assert [request.started for request in made.requests] == [(5, 6, 7)] * 2
    for group in made.groups:
        group.old_logprobs = [list(MINE)]
    made.prompt_tokens = [10, 20]
    return made


def scores(*second: float | None, tokens: int = 20) -> list[Score]:
    return [Score(10, tuple(MINE)), Score(tokens, second)]


def test_the_largest_gap_of_any_engine_and_token(canary: Canary) -> None:
    engines = {"a": scores(*MINE), "b": scores(-1.0, -2.25, -3.0)}
    assert canary.gap(engines) == (0.25, "b")


def test_a_token_that_an_engine_does_not_tell_is_left_out(canary: Canary) -> None:
    assert canary.gap({"a": scores(-1.0, None, -3.0)}) == (0.0, "")


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_what_is_no_number_is_no_agreement(canary: Canary, broken: float) -> None:
    assert canary.gap({"a": scores(-1.0, broken, -3.0)}) == (math.inf, "a")


def test_a_prompt_of_another_length_stops(canary: Canary) -> None:
    with pytest.raises(UserError, match=r"^a reads .* as 19 tokens, the trainer as 20"):
        canary.gap({"a": scores(*MINE, tokens=19)})
