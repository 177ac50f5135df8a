"""Held-out questions during training: pass@1 and pass@k of the current weights.

    eval_file -> the policy's weights -> the same sampler, seeds of its own -> verdicts -> eval_*

Nothing of the training run is moved by it: every completion has a seed made from its question, so
the random number generators and the question stream stay where they are, and two evaluations
differ by the weights alone. Each rank answers its share; the records of all are written by the
first, whole, to evaluation/step-<N>.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl.data import Row, write_jsonl
from internvl.sampler import StreamSampler
from rewards.estimates import pass_at_k
from rl.config import RLConfig
from rl.ranks import everywhere, gather
from rl.rewarding import Rewarder, Verify, make_terms
from rl.rollouts import Broken, Group, RolloutMaker, RolloutSettings

QUESTIONS_AT_ONCE = 256  # their images are in memory together
_BATCH = -1  # no rollout batch has this number: the seeds are the evaluation's own


def make_held_out(
    args: RLConfig, rows: Sequence[Row], settings: RolloutSettings, verify: Verify
) -> HeldOut:
    """The evaluation that the options ask for; settings: the training's, but for n and heat."""
    n = args.num_generations_eval or args.num_generations
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    sampling = replace(settings.sampling, n=n, temperature=temperature)
    return HeldOut(
        rows,
        Rewarder(rows, make_terms(args), verify, args.reward_timeout),
        replace(settings, sampling=sampling),
        args.eval_pass_k or sorted({1, n}),
        Path(args.output_dir or "") / "evaluation",
    )


@dataclass
class HeldOut:
    """Answers held-out questions and says how well.

    settings: the sampling of the evaluation (n, temperature), its seed, and this rank. ks: of
    pass@k. folder: where the records go.
    """

    rows: Sequence[Row]
    rewarder: Rewarder
    settings: RolloutSettings
    ks: Sequence[int]
    folder: Path

    def evaluate(self, sampler: StreamSampler, step: int, trainer_state: Any) -> dict[str, float]:
        """Metrics without a prefix; every rank must call it, and gets those of all."""
        s = self.settings
        maker = RolloutMaker(self.rows, sampler, s, self.rewarder)
        mine = range(s.rank, len(self.rows), s.world_size)
        found: list[tuple[int, Group | Broken]] = []
        with everywhere():
            for start in range(0, len(mine), QUESTIONS_AT_ONCE):
                part = mine[start : start + QUESTIONS_AT_ONCE]
                groups = maker.answer(_BATCH, [(index, 0) for index in part], step, trainer_state)
                found += zip(part, groups, strict=True)
        everyone = sorted((pair for part in gather(found) for pair in part), key=lambda p: p[0])
        groups = [group for _, group in everyone]
        if s.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(self.folder / f"step-{step}.jsonl", map(self._record, groups))
        return self._metrics(groups)

    def _record(self, group: Group | Broken) -> dict[str, Any]:
        data = self.rows[group.question].data
        if isinstance(group, Broken):
            return {"id": data["id"], "fault": group.reason}
        return {
            "id": data["id"],
            "question": data["question"],
            "answer": data.get("answer"),
            "completions": group.texts,
            "outcomes": group.outcomes,
            "formats": group.formats,
            "rewards": group.rewards,
            "clipped": group.clipped,
            "lengths": [len(ids) for ids in group.completions],
        }

    def _metrics(self, everyone: Sequence[Group | Broken]) -> dict[str, float]:
        """Rates over questions and completions; one that could not be judged is not correct."""
        groups = [group for group in everyone if isinstance(group, Group)]
        values = {"questions": float(len(groups)), "broken": float(len(everyone) - len(groups))}
        if not groups:
            return values
        n = len(groups[0].completions)
        for k in self.ks:
            rates = [pass_at_k(n, group.outcomes.count("correct"), k) for group in groups]
            mean = math.fsum(rates) / len(rates)
            values[f"pass@{k}"] = mean
            if len(rates) > 1:
                squares = math.fsum((rate - mean) ** 2 for rate in rates)
                values[f"pass@{k}_se"] = math.sqrt(squares / (len(rates) - 1) / len(rates))
        rewards = [r for group in groups for r in group.rewards if r is not None]
        every = len(groups) * n
        if rewards:
            values["reward"] = math.fsum(rewards) / len(rewards)
        values["rewards/not_judged"] = 1.0 - len(rewards) / every
        values["format"] = sum(sum(group.formats) for group in groups) / every
        values["completions/clipped_ratio"] = sum(sum(g.clipped) for g in groups) / every
        lengths = sum(len(ids) for group in groups for ids in group.completions)
        values["completions/mean_length"] = lengths / every
        return values
