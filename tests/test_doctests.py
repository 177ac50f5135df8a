"""The worked examples in our docstrings are run: an example nobody runs soon tells a lie."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cascade", "internvl", "mmpr", "mpo", "rewards", "rl", "sft", "training")


def modules_with_examples() -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if ">>> " in path.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples(name):
    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs={"torch": torch},  # every reader knows where it comes from
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.attempted > 0, "the file shows '>>> ' but no docstring holds an example"
    assert result.failed == 0, "see the captured output"
