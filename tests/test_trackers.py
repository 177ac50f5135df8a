"""What a tracker is told of a run: options, every training metric, every evaluation's metric."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer_cases import Recorded, conversations, make_trainer, pairs, questions, write_images
from transformers.integrations import TensorBoardCallback, integration_utils

RL = {"num_generations": 4, "max_completion_length": 64, "max_steps": 1, "eval_strategy": "no"}
WANTED = {
    "sft": {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"},
    "mpo": {
        *("train/loss", "train/loss/sigmoid", "train/rewards/margins", "train/bco/delta"),
        *("eval/loss", "eval/loss/sigmoid", "eval/rewards/margins"),
    },
    "rl": {"train/reward", "train/rewards/accuracy/mean", "train/sampling/logprob_gap_max"},
}


class Writer:
    """A SummaryWriter that writes nothing."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.texts: dict[str, str] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value

    def add_text(self, name: str, text: str, *step: int) -> None:
        self.texts[name] = text

    def add_hparams(self, *options: Any, **more: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("stage", WANTED)
def test_metrics_and_options_reach_a_tracker(
    stage: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' own callback, whether TensorBoard is installed or not
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    writer = Writer()
    write_images(tmp_path, 4)
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    if stage == "rl":
        rows, options = questions(tmp_path, ["mixed", "other"]), RL
    else:
        rows = (pairs if stage == "mpo" else conversations)(tmp_path, 4)
    trainer = make_trainer(stage, tiny_model, tmp_path / "out", rows, Recorded(), **options)
    trainer.add_callback(TensorBoardCallback(writer))
    trainer.train()
    assert WANTED[stage] <= set(writer.scalars)
    assert '"max_tokens_per_microbatch": 16384' in writer.texts["args"]
    assert "model_type" in writer.texts["model_config"]
    # and no metric of the log is kept from it
    logged = {name for log in trainer.state.log_history[:-1] for name in log}
    told = {name.split("/", 1)[1] for name in writer.scalars}
    assert {name.removeprefix("eval_") for name in logged} - {"step"} <= told
