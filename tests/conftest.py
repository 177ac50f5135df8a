"""Shared by all tests: the tiny model, a very small world, and one start of vLLM.

Tests that need an accelerator are skipped where there is none.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from internvl.sampler import Sampler

# a busy machine is no fault of the code: no example is timed
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # tests of the shared engine come last: closing another engine ends the process's groups of both
    items.sort(key=lambda item: "vllm_sampler" in getattr(item, "fixturenames", ()))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch  # only here: most runs need no torch to collect

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with the tiny InternVL, random weights; not to be written to."""
    from cascade.tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder, seed=0)
    return folder


@pytest.fixture
def stepped_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be used with delta = 1/4."""
    folder = tmp_path / "stepped"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "position_step": 0.25}))
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world of a few charts a split; not to be written to."""
    from cascade.world import WorldSizes, make_world

    folder = tmp_path_factory.mktemp("tiny-world")
    sizes = WorldSizes(sft=32, mixed=32, probe=8, preference=8, rl=16, heldout=8)
    make_world(folder, seed=0, sizes=sizes)
    return folder


@pytest.fixture(scope="session")
def vllm_sampler(tiny_model: Path) -> Iterator[Sampler]:
    """The tiny model in vLLM; who changes its weights puts them back.

    Mark tests that use it with `pytest.mark.xdist_group("vllm")`: a start takes seconds, and so
    one test process makes the only one.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from internvl.sampler import open_sampler

    sampler = open_sampler(tiny_model, backend="vllm", max_model_len=512)
    yield sampler
    sampler.close()
