"""What transformers' Trainer iterates over in place of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from training.batches import STEP_BATCH, StepBatch


class RolloutLoader:
    """The next step's batch, made when it is asked for; without an end."""

    def __init__(self, next_step: Callable[[], StepBatch]):
        self._next_step = next_step

    def __iter__(self) -> Iterator[dict[str, StepBatch]]:
        while True:
            yield {STEP_BATCH: self._next_step()}
