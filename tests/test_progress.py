"""What a run shows while it trains: one bar, and a line for each evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from training.progress import StageProgress


def test_an_evaluation_is_a_line_above_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what the bar shows, by the names of the log; a training log is on the bar alone."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(max_steps=4, global_step=2, is_world_process_zero=True)
    shown = StageProgress(("loss", "rewards/margins"))
    shown.on_train_begin(args, state, TrainerControl())
    shown.on_log(args, state, TrainerControl(), {"loss": 1.0, "rewards/margins": 0.5})
    assert capsys.readouterr().out == ""
    found = {"eval_loss": 0.51234, "eval_rewards/margins": 0.25, "eval_runtime": 3.0}
    shown.on_log(args, state, TrainerControl(), found)
    assert capsys.readouterr().out == "step 2: eval_loss 0.5123, eval_rewards/margins 0.25\n"
    shown.on_train_end(args, state, TrainerControl())
    assert "loss=1, rewards/margins=0.5" in capsys.readouterr().err  # as it was
