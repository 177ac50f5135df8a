"""One bar a stage, with the numbers that matter on it (all are in trainer_state.json)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class StageProgress(ProgressCallback):
    """transformers' progress bar, with chosen metrics on it instead of whole log lines above it.

    shown: metric names, in the order of the bar. What an evaluation found of them is a line above
    the bar. Where there is no terminal the bar is text too.
    """

    def __init__(self, shown: Sequence[str]):
        super().__init__()
        self.shown = shown
        self._latest: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the latest values of the shown metrics on the bar; an evaluation's on a line."""
        if self.training_bar is None or logs is None:
            return
        held_out = [name for name in (f"eval_{shown}" for shown in self.shown) if name in logs]
        if held_out:
            found = ", ".join(f"{name} {logs[name]:.4g}" for name in held_out)
            self.training_bar.write(f"step {state.global_step}: {found}")
        for name in self.shown:
            if name in logs:
                self._latest[name] = f"{logs[name]:.4g}"
        self.training_bar.set_postfix(self._latest, refresh=False)
