"""Places of a rollout batch that cannot be used, given to the next questions.

A question whose image turns out to be broken is put aside and replaced. With dynamic sampling
(DAPO, arXiv 2503.14476, section 3.2) a group without spread is, too, in at most so many rounds:

    groups of all ranks -> places without -> the next questions of the stream, one a place
        -> sampled by the rank whose place it is -> again, until every place is filled

The j-th such place of the whole batch takes the j-th next question, whichever rank it is on, so the
number of ranks changes nothing, and what is sampled is a function of (seed, weights) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl.errors import UserError
from rl.advantages import group_advantages, standard_deviation
from rl.ranks import everywhere, gather
from rl.rollouts import Broken, Group, RolloutMaker, questions_at
from training.batches import BadRow


@dataclass
class Filled:
    """A rollout batch of this rank with every place filled.

    discarded: groups without spread that gave their place to another. bad: questions that could
    not be asked. taken: places of the question stream that all ranks used up for the batch.
    """

    groups: list[Group]
    taken: int
    discarded: list[Group] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def fill(
    maker: RolloutMaker,
    made: Sequence[Group | Broken],
    batch: int,
    start: int,
    weight_version: int,
    trainer_state: Any = None,
    *,
    rounds: int,
) -> Filled:
    """Fill the places of rollout batch `batch`, whose first question was place `start`.

    rounds: of dynamic sampling; 0 keeps groups without spread. Every rank must call it.
    """
    s = maker.settings
    places = maker.places()
    size = s.questions * s.steps * s.world_size
    out = Filled([], size)
    asked = questions_at(len(maker.rows), start, size, s.seed)
    now: list[Group | Broken] = list(made)
    for number in range(rounds + len(maker.rows) + 1):
        mine = [
            places[index]
            for index, group in enumerate(now)
            if isinstance(group, Broken) or (number < rounds and not group.spread)
        ]
        missing = sorted(place for part in gather(mine) for place in part)
        if not missing:
            break
        following = questions_at(len(maker.rows), start + out.taken, len(missing), s.seed)
        out.taken += len(missing)
        mine_now: list[tuple[int, int]] = []
        for place, question in zip(missing, following, strict=True):
            if place in mine:
                mine_now.append((question, asked.count(question)))
            asked.append(question)
        with everywhere():
            answered = maker.answer(batch, mine_now, weight_version, trainer_state)
        fresh = iter(answered)
        for place in sorted(mine):
            index = places.index(place)
            before, now[index] = now[index], next(fresh)
            if isinstance(before, Broken):
                out.bad.append(BadRow(maker.rows[before.question], before.reason))
            else:
                out.discarded.append(before)
    else:
        raise UserError("no question can be asked: the images of all of them are broken")
    out.groups = [group for group in now if isinstance(group, Group)]
    assert len(out.groups) == len(now)
    return out


def scale_by_batch(groups: Sequence[Group], estimator: str) -> None:
    """Divide the advantages by the standard deviation of all ranks' rewards; all must call it."""
    mine = [reward for group in groups for reward in group.rewards]
    batch_std = standard_deviation([reward for part in gather(mine) for reward in part])
    for group in groups:
        group.advantages = group_advantages(
            group.rewards, scale="batch", estimator=estimator, batch_std=batch_std
        )
