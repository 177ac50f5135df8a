"""What a rollout batch leaves behind: its metrics, by TRL's names, and its lines on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev

import torch

from internvl.data import Row, append_jsonl, dump_line
from rewards import Outcome
from rl.rollouts import Group
from training.metrics import Metrics


def add_group_metrics(metrics: Metrics, groups: Sequence[Group]) -> None:
    """Add the rewards, outcomes and lengths of a rollout batch's groups to `metrics`."""
    judged = [r for group in groups for r in group.rewards if r is not None]
    completions = [len(ids) for group in groups for ids in group.completions]
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    metrics.mean("reward", torch.tensor(judged))
    known = [[r for r in group.rewards if r is not None] for group in groups]
    spread = [stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in known]
    metrics.mean("reward_std", torch.tensor(spread))
    flat = [float(not group.spread) for group in groups]
    metrics.mean("frac_reward_zero_std", torch.tensor(flat))
    for name in groups[0].terms:
        # as in TRL, over the completions that the term applies to
        terms = [v for group in groups for v in group.terms[name] if v is not None]
        metrics.mean(f"rewards/{name}/mean", torch.tensor(terms))
        metrics.deviation(f"rewards/{name}/std", torch.tensor(terms))
    for kind in Outcome:
        share = [float(outcome == kind) for outcome in outcomes]
        metrics.mean(f"outcomes/{kind}", torch.tensor(share))
    metrics.mean("completions/mean_length", torch.tensor(completions, dtype=torch.float))
    clipped = [float(cut) for group in groups for cut in group.clipped]
    metrics.mean("completions/clipped_ratio", torch.tensor(clipped))
    metrics.ratio("rewards/not_judged", len(outcomes) - len(judged), len(outcomes))


class RolloutLog:
    """The rollouts of this rank as JSON lines, `rank<r>.jsonl` in a folder.

    A run begins the file anew; one that goes on cuts it back to where it was at the checkpoint, so
    a killed run ends with the file of an uninterrupted one.
    """

    def __init__(self, folder: Path, rank: int, rows: Sequence[Row]):
        self.path = folder / f"rank{rank}.jsonl"
        self.rows = rows
        self.size = 0  # bytes of what was written

    def go_on(self, size: int) -> None:
        """Go on from a checkpoint that was saved when the file had `size` bytes."""
        self.size = size

    def write(
        self, step: int, batch: int, groups: Sequence[Group], discarded: Sequence[Group] = ()
    ) -> None:
        """Add a rollout batch, sampled before optimizer step `step`.

        discarded: groups whose place others took; they have "used": false.
        """
        self._cut_back()
        with append_jsonl(self.path) as out:
            for used, group in [(True, g) for g in groups] + [(False, g) for g in discarded]:
                record = {"step": step, "batch": batch, "used": used, **group.to_json()}
                record["question"] = self.rows[group.question].data["id"]
                out.write(dump_line(record))
        self.size = self.path.stat().st_size

    def _cut_back(self) -> None:
        """Take away what a run that was killed wrote after the checkpoint."""
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < self.size:
            print(f"{self.path}: rollouts before this step are missing, it was cut or removed")
            self.size = there
        elif there > self.size:
            os.truncate(self.path, self.size)
