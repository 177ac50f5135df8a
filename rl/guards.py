"""The stop on collapse: a run that has lost its entropy, its length or its reward signal.

A sum over all ranks of each optimizer step is held against the bounds; a bound that is passed in
`collapse_steps` steps one after the other stops the run, after a checkpoint, with exit code 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from internvl.errors import UserError
from rl.guard_options import GuardOptions
from rl.rollouts import Group


class CollapseError(UserError):
    """The policy has collapsed; the message says by which bound, and what to do."""

    exit_code = 3


@dataclass
class StepTotals:
    """Sums over a step.

    Of entropies and their tokens, of completions' lengths and their number, of groups with spread
    and all groups.
    """

    entropy: float = 0.0
    tokens: float = 0.0
    length: float = 0.0
    completions: float = 0.0
    with_spread: float = 0.0
    groups: float = 0.0

    @classmethod
    def of(cls, groups: Sequence[Group]) -> StepTotals:
        """Of a step's groups; what was scored is added as it is."""
        lengths = [len(ids) for group in groups for ids in group.completions]
        return cls(
            length=float(sum(lengths)),
            completions=float(len(lengths)),
            with_spread=float(sum(group.spread for group in groups)),
            groups=float(len(groups)),
        )


@dataclass
class CollapseGuard:
    """Counts, for each bound, the steps in a row that passed it.

    streaks: {bound's option: steps}, kept in checkpoints.
    """

    options: GuardOptions
    streaks: dict[str, int] = field(default_factory=dict)

    def look(self, step: StepTotals) -> str | None:
        """Take in a step; what to say when it is the last that a bound allows, otherwise None.

        A step in which no token was scored says nothing of the entropy.
        """
        o, told = self.options, None
        means: list[tuple[str, float, float | None, bool]] = []
        if step.tokens:
            entropy = step.entropy / step.tokens
            means.append(("collapse_min_entropy", entropy, o.collapse_min_entropy, True))
        if step.completions:
            length = step.length / step.completions
            means.append(("collapse_min_length", length, o.collapse_min_length, True))
            means.append(("collapse_max_length", length, o.collapse_max_length, False))
        if o.collapse_no_spread and step.groups:
            means.append(("collapse_no_spread", step.with_spread, 1.0, True))
        for name, value, bound, below in means:
            if bound is None:
                continue
            passed = value < bound if below else value > bound
            self.streaks[name] = self.streaks.get(name, 0) + 1 if passed else 0
            if self.streaks[name] >= o.collapse_steps:
                told = _message(name, value, self.streaks[name])
        return told


def _message(name: str, value: float, steps: int) -> str:
    what = {
        "collapse_min_entropy": f"the mean entropy is {value:.3g}",
        "collapse_min_length": f"completions have {value:.1f} tokens on average",
        "collapse_max_length": f"completions have {value:.1f} tokens on average",
        "collapse_no_spread": "no group's rewards differ",
    }[name]
    return (
        f"collapse: {what}, past {name} for {steps} steps in a row. A checkpoint was saved; look "
        "at the rollouts, then go on from an earlier checkpoint with another learning rate, beta, "
        "entropy_coef or bound"
    )
