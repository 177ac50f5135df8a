"""An online run with everything on, killed anywhere: it ends as if nothing had happened.

Rollouts on disk, held-out evaluation, dynamic sampling and a reference, all at once; killed in a
step, in a rollout, in an evaluation and in a save. Compared to the byte: weights, rollouts, the
evaluations' records; and every logged value but the times.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stage_runs import InSave, InStep, Kill, StageRun, _die
from test_resume import assert_same_result
from test_resume import make as make
from test_resume import options as options
from test_resume import pairs as pairs

KILLED = -signal.SIGKILL
Make = Callable[..., StageRun]
STEPS = 8


@dataclass(frozen=True)
class InAnswers:
    """Dies when the `number`-th question of a rollout batch, or of an evaluation, is answered.

    evaluation: at step `step`'s evaluation, and otherwise in the rollout batch made at that step.
    """

    step: int
    number: int
    evaluation: bool

    def __call__(self, output_dir: Path) -> None:
        from internvl.hf_sampler import TransformersSampler
        from rl.rollouts import RolloutMaker

        answer, stream = RolloutMaker.answer, TransformersSampler.stream
        now: list[bool] = [False]

        def watched(maker: Any, batch: int, asked: Any, version: int, state: Any = None) -> Any:
            now[0] = version == self.step and (batch < 0) == self.evaluation
            return answer(maker, batch, asked, version, state)

        def dying(*args: Any, **kwargs: Any) -> Any:
            for count, done in enumerate(stream(*args, **kwargs), start=1):
                if now[0] and count == self.number:
                    _die()
                yield done

        RolloutMaker.answer = watched  # type: ignore[method-assign]
        TransformersSampler.stream = dying  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def everything(tiny_world: Path) -> dict[str, Any]:
    """4 rollout batches of 2 steps; saves lie within them, evaluations at their ends."""
    return {
        "max_steps": STEPS,
        "num_generations": 2,  # so that groups without spread are many
        "dynamic_sample": True,
        "max_resample_times": 2,
        "beta": 0.05,
        "entropy_coef": 0.01,
        "log_completions": True,
        "eval_file": str(tiny_world / "heldout.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
        "collapse_min_entropy": 1e-6,
    }


@pytest.fixture(scope="module")
def reference(
    options: dict[str, dict[str, Any]],
    everything: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> StageRun:
    folder = str(tmp_path_factory.mktemp("everything") / "reference")
    run = StageRun("rl", {**options["rl"], **everything, "output_dir": folder})
    run.finish()
    logs = run.logged()
    # all of it did something
    assert sum("eval_pass@1" in log for log in logs) == STEPS // 2
    assert any(log.get("frac_groups_discarded", 0.0) > 0 for log in logs)
    assert any(log.get("kl", 0.0) > 0 for log in logs)
    return run


def records(run: StageRun) -> dict[str, bytes]:
    """The files that rollouts and evaluations were written to."""
    files = [*run.folder.glob("rollouts/*"), *run.folder.glob("evaluation/*")]
    assert len(files) == 1 + STEPS // 2
    return {str(file.relative_to(run.folder)): file.read_bytes() for file in files}


DRAWN = random.Random(7).randint(2, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [InStep(DRAWN)],
        [InAnswers(4, 3, evaluation=False)],
        [InAnswers(6, 2, evaluation=True)],
        [InSave(6)],
        [InSave(3, before="optimizer"), InAnswers(2, 1, evaluation=True), InStep(8)],
    ],
    ids=["step", "rollout", "evaluation", "save", "three times"],
)
def test_killed_with_everything_on(
    kills: list[Kill], make: Make, everything: dict[str, Any], reference: StageRun
) -> None:
    run = make("rl", **everything)
    for kill in kills:
        assert run.start(kill).code == KILLED
    run.finish()
    assert_same_result(run, reference)
    assert records(run) == records(reference)
