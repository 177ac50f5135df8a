"""Rollouts: questions to groups of verified completions with advantages.

    questions of this rank -> sampler (G each) -> verify -> rewards -> advantages -> Group

A stream makes the next rollout batch when it is asked for one, from the weights that the sampler
has then; nothing is made ahead. What it made is a function of (seed, batch number, weights) alone,
so a resumed run makes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from internvl.data import Row
from internvl.sampler import Completion, Sampler, SamplingConfig, request_of
from rewards import Verdict, verify
from rl.advantages import group_advantages, has_spread


@dataclass
class Group:
    """One question's completions.

    question: its index in the data set. completions: ids; sampler_logprobs: the sampler's
    log-probability of each of them; advantages, rewards (None: could not be judged), outcomes: one
    each. weight_version: optimizer steps that the sampling weights had behind them. old_logprobs:
    the trainer's own log-probabilities before the rollout batch's first step, where needed.
    """

    question: int
    completions: list[list[int]]
    texts: list[str]
    sampler_logprobs: list[list[float]]
    rewards: list[float | None]
    advantages: list[float]
    outcomes: list[str]
    formats: list[bool]
    clipped: list[bool]
    weight_version: int
    old_logprobs: list[list[float]] | None = None

    @property
    def spread(self) -> bool:
        """Whether the group carries any gradient."""
        return has_spread(self.advantages)

    def to_json(self) -> dict[str, Any]:
        """The group as JSON; floats survive exactly."""
        return asdict(self)


def question_order(number: int, epoch: int, seed: int) -> list[int]:
    """The shuffled order in which an epoch visits the questions."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(number, generator=generator).tolist()


def questions_of_batch(number: int, size: int, batch: int, seed: int) -> list[int]:
    """The questions of rollout batch `batch`, of `size` over all ranks; epochs run on end to end.

    >>> order = question_order(5, 0, 7)
    >>> questions_of_batch(5, 2, 0, 7) + questions_of_batch(5, 2, 1, 7) == order[:4]
    True
    """
    out, orders = [], dict[int, list[int]]()
    for place in range(batch * size, (batch + 1) * size):
        epoch, index = divmod(place, number)
        if epoch not in orders:
            orders[epoch] = question_order(number, epoch, seed)
        out.append(orders[epoch][index])
    return out


def request_seed(seed: int, batch: int, question_id: str, repeat: int = 0) -> int:
    """The sampling seed of a question in a rollout batch, the same in every process.

    repeat: how often it came before in this batch, where there are fewer questions than places.
    """
    text = f"{seed}/{batch}/{question_id}" + (f"/{repeat}" if repeat else "")
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def reward_of(outcome: str, format_ok: bool, format_weight: float) -> float | None:
    """1 for correct plus `format_weight` for the format; None where it could not be judged."""
    if outcome in ("cannot_judge", "timeout"):
        return None
    return float(outcome == "correct") + format_weight * float(format_ok)


@dataclass
class RolloutSettings:
    """How rollouts are drawn; see RLConfig."""

    sampling: SamplingConfig
    questions: int  # of an optimizer step, this rank's own
    steps: int  # optimizer steps of a rollout batch
    seed: int
    rank: int
    world_size: int
    scale_rewards: bool
    format_weight: float


class RolloutMaker:
    """Makes rollout batch number b of this rank, from the sampler's current weights."""

    def __init__(
        self,
        rows: Sequence[Row],
        sampler: Sampler,
        settings: RolloutSettings,
        judge: Callable[..., Verdict] = verify,
    ):
        self.rows = rows
        self.sampler = sampler
        self.settings = settings
        self.judge = judge

    def make(self, batch: int, weight_version: int) -> list[Group]:
        """Sample, verify and weigh this rank's groups of rollout batch `batch`."""
        s = self.settings
        size = s.questions * s.steps * s.world_size
        everyone = questions_of_batch(len(self.rows), size, batch, s.seed)
        # shared out step by step: W ranks do in a step what one of W times the questions does
        starts = [(step * s.world_size + s.rank) * s.questions for step in range(s.steps)]
        places = [place for start in starts for place in range(start, start + s.questions)]
        mine = [everyone[place] for place in places]
        repeats = [everyone[:place].count(everyone[place]) for place in places]
        requests = [
            request_of(row, request_seed(s.seed, batch, row.data["id"], repeat))
            for row, repeat in zip((self.rows[index] for index in mine), repeats, strict=True)
        ]
        answers = self.sampler.sample(requests, s.sampling)
        return [
            self._group(index, completions, weight_version)
            for index, completions in zip(mine, answers, strict=True)
        ]

    def _group(self, index: int, completions: list[Completion], weight_version: int) -> Group:
        data = self.rows[index].data
        verdicts = [
            self.judge(
                completion.text,
                data["answer"],
                matcher=data.get("matcher"),
                options=data.get("options"),
            )
            for completion in completions
        ]
        outcomes = [str(verdict.outcome) for verdict in verdicts]
        clipped = [completion.finish_reason == "length" for completion in completions]
        # a completion that was cut never followed the format, whatever it holds
        formats = [v.format_ok and not cut for v, cut in zip(verdicts, clipped, strict=True)]
        rewards = [
            reward_of(outcome, format_ok, self.settings.format_weight)
            for outcome, format_ok in zip(outcomes, formats, strict=True)
        ]
        return Group(
            question=index,
            completions=[list(completion.token_ids) for completion in completions],
            texts=[completion.text for completion in completions],
            sampler_logprobs=[list(completion.logprobs) for completion in completions],
            rewards=rewards,
            advantages=group_advantages(rewards, scale=self.settings.scale_rewards),
            outcomes=outcomes,
            formats=formats,
            clipped=clipped,
            weight_version=weight_version,
        )
