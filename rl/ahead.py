"""One rollout batch ahead: the next one is sampled by servers while this one is trained on.

    batch b is taken  ->  weights of this moment to the servers  ->  batch b + 1 begins to be made
                          ... optimizer steps on batch b ...     ->  batch b + 1 is waited for

So a batch comes from the weights with which the training on the one before began (`max_staleness`
1), whatever the two speeds are, and a run is a function of its seed. Servers are never given
weights while they sample. A checkpoint waits for the batch in flight and holds it, so that a run
that goes on from there ends as one that was not interrupted.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from internvl.errors import UserError
from rl.rollouts import Broken, Group, RolloutMaker


@dataclass
class Made:
    """A rollout batch as it was made: which it is, from which weights, and what came of it.

    start: its first place in the stream of questions.
    """

    batch: int
    start: int
    weight_version: int
    groups: Sequence[Group | Broken]

    def to_json(self) -> dict[str, Any]:
        """All of it; see `from_json`."""
        return {**vars(self), "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Made:
        """What `to_json` gave."""
        groups = [Broken(**g) if "reason" in g else Group(**g) for g in state["groups"]]
        return cls(**{**state, "groups": groups})


class Ahead:
    """Makes one rollout batch in a thread; there is at most one."""

    def __init__(self, maker: RolloutMaker):
        self.maker = maker
        self._made: Made | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self, batch: int, start: int, weight_version: int, trainer_state: Any) -> None:
        """Begin to make a batch from the weights that the sampler has."""
        assert self._thread is None and self._made is None
        # the trainer's state as it is now: a reward function must not see it move
        state = copy.copy(trainer_state)
        words = (batch, start, weight_version, state)
        self._thread = threading.Thread(target=self._work, args=words, daemon=True)
        self._thread.start()

    def _work(self, batch: int, start: int, weight_version: int, state: Any) -> None:
        try:
            groups = self.maker.make(batch, weight_version, state, start=start)
            self._made = Made(batch, start, weight_version, groups)
        except BaseException as error:  # `wait` raises it
            self._error = error

    def wait(self) -> Made | None:
        """The batch, when it is made; None where none was begun. It stays until it is taken."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._made

    def settle(self) -> Made | None:
        """The same, or None where making it has failed: the next `wait` raises why."""
        try:
            return self.wait()
        except UserError as error:
            self._error = error
            return None

    def take(self) -> Made | None:
        """What `wait` gives, which is then no longer here."""
        made, self._made = self.wait(), None
        return made

    def put(self, made: Made | None) -> None:
        """Take back a batch out of a checkpoint."""
        self._made = made
