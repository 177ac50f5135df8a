"""A rollout batch that is made ahead, where making it fails: the checkpoint in between is whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from internvl.errors import UserError
from rl.ahead import Ahead


def test_what_failed_is_told_when_it_is_waited_for() -> None:
    def make(*args: Any, **kwargs: Any) -> Any:
        raise UserError("no server answers")

    maker: Any = SimpleNamespace(make=make)
    ahead = Ahead(maker)
    ahead.begin(1, 8, 0, None)
    assert ahead.settle() is None and ahead.settle() is None  # a checkpoint, and one more
    with pytest.raises(UserError, match="no server answers"):
        ahead.wait()
    assert ahead.wait() is None


def test_what_is_made_stays_until_it_is_taken() -> None:
    maker: Any = SimpleNamespace(make=lambda *args, **kwargs: ["a group"])
    ahead = Ahead(maker)
    ahead.begin(1, 8, 3, None)
    made = ahead.settle()
    assert made is not None and (made.batch, made.start, made.weight_version) == (1, 8, 3)
    assert ahead.take() is made and ahead.wait() is None
