"""docs/options.md is what scripts/make_options.py makes of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def make_options() -> ModuleType:
    file = ROOT / "scripts" / "make_options.py"
    spec = importlib.util.spec_from_file_location("make_options", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_of_this_code(make_options: ModuleType) -> None:
    """Made anew by: python scripts/make_options.py."""
    written = (ROOT / "docs/options.md").read_text(encoding="utf-8").splitlines()
    made = make_options.render().splitlines()
    gone, new = set(written) - set(made), set(made) - set(written)
    assert (sorted(gone), sorted(new)) == ([], [])
    assert written == made


def test_every_option_says_what_it_is_for(make_options: ModuleType) -> None:
    rows = [line for line in make_options.render().splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert [row for row in rows if row.endswith("|  |")] == []
