"""RLTrainer with a scripted sampler: whose weights draw, what is stored, what the gradients are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import Plain, gradient_error, gradients, load_plain, plain_logprobs
from torch import Tensor
from trainer_cases import (
    FORBIDDEN,
    LARGE,
    MAX_TILES,
    REWARDS,
    Recorded,
    ScriptedSampler,
    make_trainer,
    put_sampler,
    questions,
    train,
    write_images,
)

from internvl.data import Row
from internvl.errors import UserError
from internvl.sampler import SampleRequest
from rl.groups import StartWeights
from rl.rollouts import questions_of_batch

KINDS = ["mixed", "equal", "other", "unjudged", "other", "mixed", "equal", "mixed"]
G, BATCH, MINI_STEPS, STEPS, TEMPERATURE = 4, 2, 2, 4, 0.7
LOW, HIGH = 0.05, 0.08  # wide, so that a large learning rate clips some ratios and not others
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "max_tokens_per_microbatch": LARGE,
    "num_generations": G,
    "steps_per_generation": MINI_STEPS,
    "max_steps": STEPS,
    "temperature": TEMPERATURE,
    "max_completion_length": 64,
    "epsilon": LOW,
    "epsilon_high": HIGH,
    "learning_rate": 0.004,
    "max_logprob_gap": 1e-4,
    "log_completions": True,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, len(KINDS))
    return questions(folder, KINDS)


@pytest.fixture(scope="module")
def run(tiny_model: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two rollout batches of two mini-steps, each of two groups."""
    return train("rl", tiny_model, tmp_path_factory.mktemp("rl"), rows, **OPTIONS)


def groups_of(step: int, run: Recorded) -> list[int]:
    """The questions of an optimizer step, by the stream's definition."""
    batch, place = divmod(step, MINI_STEPS)
    seed = run.trainer.args.seed
    everyone = questions_of_batch(len(KINDS), BATCH * MINI_STEPS, batch, seed)
    return everyone[place * BATCH : (place + 1) * BATCH]


def expected_advantages(kind: str) -> list[float]:
    """(R - mean) / (std + 1e-4), by numpy; zeros where nothing was judged or all are alike."""
    rewards = REWARDS[kind]
    if None in rewards or len(set(rewards)) == 1:
        return [0.0] * G
    values = np.array(rewards, dtype=float)
    return ((values - values.mean()) / (values.std(ddof=1) + 1e-4)).tolist()


class PlainPolicy:
    """Log-probabilities of a question's completions under recorded weights, by transformers."""

    def __init__(self, folder: Path, rows: list[Row], run: Recorded):
        self.model, self.processor = load_plain(folder)
        self.rows, self.run = rows, run
        self.forbidden = [self.processor.tokenizer.convert_tokens_to_ids(t) for t in FORBIDDEN]

    def logprobs(self, step: int, asked: list[int]) -> list[list[Tensor]]:
        """Of each question's completions, under the weights that step `step` starts from."""
        self.model.load_state_dict(self.run.weights[step], strict=True)
        return [self._logprobs(question) for question in asked]

    def plain(self, question: int) -> Plain:
        """A question with its completions."""
        row = self.rows[question]
        request = SampleRequest(row.data["question"], tuple(row.load_images()), seed=0)
        return self.run.trainer.sampler.plain(request, MAX_TILES)

    def _logprobs(self, question: int) -> list[Tensor]:
        return plain_logprobs(self.model, self.plain(question), TEMPERATURE, self.forbidden)


@pytest.fixture(scope="module")
def policy(tiny_model: Path, rows: list[Row], run: Recorded) -> PlainPolicy:
    return PlainPolicy(tiny_model, rows, run)


def test_rollouts_are_drawn_from_the_step_they_are_used_at(run: Recorded) -> None:
    """Staleness 0: one update of the sampler a rollout batch, with the policy's very weights."""
    versions = run.trainer.sampler.versions
    assert len(versions) == STEPS // MINI_STEPS
    for batch, weights in enumerate(versions):
        policy = run.weights[batch * MINI_STEPS]
        assert weights.keys() == policy.keys()
        assert all(torch.equal(weights[name], policy[name]) for name in policy)
    log = Path(run.trainer.args.output_dir) / "rollouts" / "rank0.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["weight_version"] for r in records] == [0] * 4 + [2] * 4
    assert [r["step"] for r in records] == [0] * 4 + [2] * 4
    asked = [index for step in range(STEPS) for index in groups_of(step, run)]
    assert [int(r["question"]) for r in records] == asked
    for record in records:
        kind = KINDS[int(record["question"])]
        assert record["rewards"] == pytest.approx(REWARDS[kind])
        assert record["advantages"] == pytest.approx(expected_advantages(kind), rel=1e-12)
        assert record["clipped"] == [False, False, True, False]


def test_old_logprobs_are_the_policys_before_the_first_mini_step(
    run: Recorded, policy: PlainPolicy
) -> None:
    """Stored for the second mini-step only; the first one's are those of its own forward."""
    stored = iter(run.old_logprobs)
    for step in range(STEPS):
        asked = [q for q in groups_of(step, run) if any(expected_advantages(KINDS[q]))]
        if not asked:
            continue
        old = next(stored)
        if step % MINI_STEPS == 0:
            assert old.isnan().all()
            continue
        before = torch.cat(list(chain(*policy.logprobs(step - 1, asked)))).detach()
        now = torch.cat(list(chain(*policy.logprobs(step, asked)))).detach()
        assert (old - before).abs().max() < 1e-5
        assert (old - now).abs().max() > 1e-3  # the policy has moved since
    assert next(stored, None) is None


def test_gradients_are_gspos(run: Recorded, policy: PlainPolicy) -> None:
    """Of all four steps, from the paper's formula on plain log-probabilities.

    Every completion is in the denominator, also those of groups without spread; |y| counts the
    end-of-turn token where it was sampled and nothing where the completion was cut.
    """
    clipped = []
    for step in range(STEPS):
        total = torch.zeros(())
        asked = groups_of(step, run)
        with torch.no_grad():
            olds = policy.logprobs(step - step % MINI_STEPS, asked)
        news = policy.logprobs(step, asked)
        for question, new, old in zip(asked, news, olds, strict=True):
            advantages = expected_advantages(KINDS[question])
            for logprobs, before, advantage in zip(new, old, advantages, strict=True):
                s = ((logprobs - before).sum() / len(logprobs)).exp()
                bounded = s.clamp(1 - LOW, 1 + HIGH)
                total = total - torch.minimum(s * advantage, bounded * advantage)
                if any(advantages):
                    clipped.append(bool((bounded - s) * advantage < 0))
        loss = total / (G * len(asked))
        loss.backward()
        expected = gradients(policy.model, all_reached=False)
        error = gradient_error(run.gradients[step], expected)
        print(f"GSPO step {step}: gradients differ by {error:.1e}")
        assert error < 1e-5
        assert run.losses[step] == pytest.approx(loss.item(), abs=1e-6)
    assert any(clipped) and not all(clipped)


def test_tokens_are_those_that_were_trained_on(run: Recorded, policy: PlainPolicy) -> None:
    """A group is one prompt and its completions; one without spread is not run."""
    seen = []
    for step in range(STEPS):
        asked = [q for q in groups_of(step, run) if any(expected_advantages(KINDS[q]))]
        plain = [policy.plain(question) for question in asked]
        seen.append(sum(len(one.ids) + sum(map(len, one.completions)) for one in plain))
    assert [log["num_tokens"] for log in run.logs] == list(accumulate(seen))


def test_metrics_of_the_first_step(run: Recorded) -> None:
    first = run.logs[0]
    kinds = [KINDS[question] for step in (0, 1) for question in groups_of(step, run)]
    judged = [r for kind in kinds for r in REWARDS[kind] if r is not None]
    flat = [not any(expected_advantages(kind)) for kind in kinds]
    assert first["reward"] == pytest.approx(np.mean(judged))
    assert first["frac_reward_zero_std"] == np.mean(flat)
    spread = [np.std(REWARDS[kind], ddof=1) if any(REWARDS[kind]) else 0.0 for kind in kinds]
    assert first["reward_std"] == pytest.approx(np.mean(spread), abs=1e-7)
    assert first["rewards/not_judged"] == 1 - len(judged) / (G * len(kinds))
    assert first["completions/clipped_ratio"] == 1 / G
    assert first["clip_ratio/region_mean"] == 0.0  # the policy is still the old one
    assert 0.0 < run.logs[1]["clip_ratio/region_mean"] < 1.0
    assert max(log.get("sampling/logprob_gap_max", 0.0) for log in run.logs) < 1e-5


class StuckSampler(ScriptedSampler):
    """A sampler whose weight update does nothing after the first time."""

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        if not self.versions:
            super().update_weights(named_parameters)


def test_a_sampler_that_kept_old_weights_is_found_out(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """By the canary, before anything is sampled; without one, by what was sampled."""
    for canary, said in ((2, "after the weights were handed over, scripted"), (0, "sampler")):
        options = {**OPTIONS, "canary_questions": canary}
        trainer = make_trainer("rl", tiny_model, tmp_path, rows, Recorded(), **options)
        put_sampler(trainer, StuckSampler(tiny_model))
        with pytest.raises(UserError, match=f"step 2: {said} and (the )?trainer differ by"):
            trainer.train()


def test_a_run_goes_on_with_the_reference_that_it_began_with(
    tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    given = {**OPTIONS, "beta": 0.1}
    trainer = make_trainer("rl", tiny_model, tmp_path / "a", rows, Recorded(), **given)
    state = json.loads(json.dumps(trainer.stage_state()))
    again = make_trainer("rl", tiny_model, tmp_path / "b", rows, Recorded(), **given)
    again.load_stage_state(state)
    with torch.no_grad():
        next(p for p in again.model.parameters() if p.requires_grad).add_(0.1)
    state["start"] = StartWeights(again.model).checksum
    with pytest.raises(UserError, match="a run that began with other weights, to which beta refe"):
        trainer.load_stage_state(state)
