"""Every shipped example parses into the stage that its file name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo.config import MPOConfig
from rl.config import RLConfig
from sft.config import SFTConfig
from training.cli import ModelArguments, parse_config

EXAMPLES = Path(__file__).parent.parent / "examples"
STAGES = {"sft": SFTConfig, "mpo": MPOConfig, "rl": RLConfig}
FILES = sorted(EXAMPLES.glob("*/*.yaml"))


def test_there_are_examples() -> None:
    assert {file.stem for file in FILES} == {"mpo", "rl"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_example_parses(file: Path) -> None:
    config_type = STAGES[file.stem]
    # bf16 needs a GPU to be accepted by transformers; all else is checked as it stands
    argv = ["--config", str(file), "--bf16", "false"]
    config, model = parse_config([config_type, ModelArguments], file.stem, argv)
    assert config.output_dir.startswith("out/")
    # what is trained whole is held in float32: at these rates 16 bits would round updates away
    assert model.dtype == ("bfloat16" if model.use_peft else "float32")
