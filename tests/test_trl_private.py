"""TRL's private names that our tests use: which of them this TRL has changed, by name."""

from __future__ import annotations

import ast

import pytest
from trl_private import USED, Private, changes, find, trl


@pytest.mark.parametrize("name", USED)
def test_trl_has_not_changed(name: str) -> None:
    found = changes(name, find(name), USED[name])
    assert not found, "\n".join(found)


def test_a_change_is_told_by_its_name() -> None:
    source = """
def m(self, model, extra):
    return self.beta, self.brand_new, inputs["ids"], inputs.get("tiles")
"""
    (method,) = ast.parse(source).body
    assert isinstance(method, ast.FunctionDef)
    reads = frozenset({"self.beta", "self.old", "inputs[ids]", "inputs[tiles]"})
    here = f"TRL {trl.__version__} (these tests are written for 1.16): T.m"
    assert changes("T.m", method, Private(("self", "model"), reads)) == [
        f"{here} takes ('self', 'model', 'extra'), not ('self', 'model')",
        f"{here} reads self.brand_new now",
        f"{here} reads self.old no more",
    ]
    assert changes("T.m", None, Private((), reads)) == [f"{here} is gone"]
    for gone in ("DPOTrainer._no_method", "NoTrainer._compute_loss"):
        assert find(gone) is None
