"""Rollouts: questions to groups of verified completions with advantages.

    questions of this rank -> sampler (G each) -> all at once: verdicts, rewards
        -> advantages of each question -> Group

A stream makes the next rollout batch when it is asked for one, from the weights that the sampler
has then; nothing is made ahead. What it made is a function of (seed, batch number, weights) alone,
so a resumed run makes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from internvl.data import Row
from internvl.errors import DataError
from internvl.sampler import Completion, SamplingConfig, StreamSampler, request_of
from rewards import Verdict
from rl.advantages import group_advantages, has_spread
from rl.config import RLConfig
from rl.judging import sample_and_judge
from rl.phases import Phases
from rl.rewarding import Rewarded, Rewarder


@dataclass
class Group:
    """One question's completions.

    question: its index in the data set. completions: ids; sampler_logprobs: the sampler's
    log-probability of each of them; advantages, rewards (None: could not be judged), outcomes: one
    each. terms: what the rewards are made of, by name, one each. weight_version: optimizer steps
    that the sampling weights had behind them. old_logprobs: the trainer's own log-probabilities
    before the rollout batch's first step, where needed; ref_logprobs: the reference's.
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
    terms: dict[str, list[float | None]]
    weight_version: int
    old_logprobs: list[list[float]] | None = None
    ref_logprobs: list[list[float]] | None = None

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
    return questions_at(number, batch * size, size, seed)


def questions_at(number: int, start: int, count: int, seed: int) -> list[int]:
    """The questions at `count` places of the stream, from place `start` on."""
    out, orders = [], dict[int, list[int]]()
    for place in range(start, start + count):
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


@dataclass(frozen=True)
class Broken:
    """A question that could not be asked, and why: an image was broken at that time."""

    question: int
    reason: str


@dataclass
class RolloutSettings:
    """How rollouts are drawn; see RLConfig."""

    sampling: SamplingConfig
    questions: int  # of an optimizer step, this rank's own
    steps: int  # optimizer steps of a rollout batch
    seed: int
    rank: int
    world_size: int
    scale_rewards: str
    advantage_estimator: str = "grpo"

    @classmethod
    def of(cls, args: RLConfig) -> RolloutSettings:
        """What a run's options say of this rank."""
        return cls(
            sampling=SamplingConfig(
                n=args.num_generations,
                temperature=args.temperature,
                max_tokens=args.max_completion_length,
                max_tiles=args.max_tiles,
            ),
            questions=args.per_device_train_batch_size,
            steps=args.steps_per_generation,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            scale_rewards=args.scale_rewards,
            advantage_estimator=args.advantage_estimator,
        )


class RolloutMaker:
    """Makes rollout batch number b of this rank, from the sampler's current weights."""

    def __init__(
        self,
        rows: Sequence[Row],
        sampler: StreamSampler,
        settings: RolloutSettings,
        rewarder: Rewarder,
        times: Phases | None = None,
    ):
        self.rows = rows
        self.sampler = sampler
        self.settings = settings
        self.rewarder = rewarder
        self.times = times or Phases()

    def places(self) -> list[int]:
        """Which of the places of a rollout batch of all ranks are this rank's, step by step.

        W ranks do in a step what one of W times the questions does.
        """
        s = self.settings
        starts = [(step * s.world_size + s.rank) * s.questions for step in range(s.steps)]
        return [place for start in starts for place in range(start, start + s.questions)]

    def make(
        self,
        batch: int,
        weight_version: int,
        trainer_state: Any = None,
        *,
        start: int | None = None,
    ) -> list[Group | Broken]:
        """Sample, judge and weigh this rank's groups of rollout batch `batch`.

        trainer_state: handed to the users' reward functions. start: the batch's first place in the
        stream of questions, where earlier batches took more than their own number.
        """
        s = self.settings
        size = s.questions * s.steps * s.world_size
        first = batch * size if start is None else start
        everyone = questions_at(len(self.rows), first, size, s.seed)
        places = self.places()
        asked = [(everyone[place], everyone[:place].count(everyone[place])) for place in places]
        return self.answer(batch, asked, weight_version, trainer_state)

    def answer(
        self,
        batch: int,
        asked: Sequence[tuple[int, int]],
        weight_version: int,
        trainer_state: Any = None,
    ) -> list[Group | Broken]:
        """The groups of questions, each with how often it came before in the batch."""
        s = self.settings
        requests = [
            request_of(row := self.rows[index], request_seed(s.seed, batch, row.data["id"], repeat))
            for index, repeat in asked
        ]
        records = [self.rows[index].data for index, _ in asked]
        sampled = sample_and_judge(
            *(self.sampler, self.rewarder.verify, requests, records, s.sampling, self.times)
        )
        judged = [
            (index, answer, verdicts)
            for (index, _), answer, verdicts in zip(asked, *sampled, strict=True)
            if not isinstance(answer, DataError)
        ]
        groups = iter(self._groups(judged, weight_version, trainer_state))
        self.times.note("rewards")
        return [
            Broken(index, str(answer)) if isinstance(answer, DataError) else next(groups)
            for (index, _), answer in zip(asked, sampled[0], strict=True)
        ]

    def _groups(
        self,
        judged: Sequence[tuple[int, list[Completion], list[Verdict]]],
        weight_version: int,
        trainer_state: Any,
    ) -> list[Group]:
        """Groups of (question, its completions, their verdicts); the rewards of all at once."""
        if not judged:
            return []
        answered = [
            (self.rows[index].data, done)
            for index, completions, _ in judged
            for done in completions
        ]
        verdicts = [verdict for *_, several in judged for verdict in several]
        rewarded = self.rewarder.reward(answered, trainer_state, verdicts)
        groups, start = [], 0
        for index, completions, _ in judged:
            part = slice(start, start + len(completions))
            groups.append(self._group(index, completions, rewarded, part, weight_version))
            start = part.stop
        return groups

    def _group(
        self,
        index: int,
        completions: list[Completion],
        rewarded: Rewarded,
        part: slice,
        weight_version: int,
    ) -> Group:
        rewards, settings = rewarded.rewards[part], self.settings
        return Group(
            question=index,
            completions=[list(completion.token_ids) for completion in completions],
            texts=[completion.text for completion in completions],
            sampler_logprobs=[list(completion.logprobs) for completion in completions],
            rewards=rewards,
            advantages=group_advantages(
                rewards,
                # of all ranks' rewards, when they are known: see rl.refill
                scale="none" if settings.scale_rewards == "batch" else settings.scale_rewards,
                estimator=settings.advantage_estimator,
            ),
            outcomes=[str(verdict.outcome) for verdict in rewarded.verdicts[part]],
            formats=rewarded.formats[part],
            clipped=rewarded.clipped[part],
            terms={name: values[part] for name, values in rewarded.terms.items()},
            weight_version=weight_version,
        )
