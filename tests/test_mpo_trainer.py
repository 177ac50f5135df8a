"""MPOTrainer's options and reports: losses without a reference, the control, held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mpo_cases import PAIRS, add_noise, make_rows, moved_trainer, one_step
from plain import gradient_error, gradients
from tiny_llms import make_family
from trainer_cases import train

from internvl.data import Row


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return make_rows(tmp_path_factory.mktemp("rows"), PAIRS)


def test_losses_that_need_no_reference_make_no_pass(
    checkpoint: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ORPO: no file of a reference; what is compared instead are mean log-probabilities."""
    run = train(
        *("mpo", checkpoint, tmp_path, rows),
        loss_type=["orpo", "sft"],
        loss_weights=[0.1, 1.0],
        per_device_train_batch_size=3,
    )
    assert not [*tmp_path.rglob("*.safetensors")] and not (tmp_path / "reference").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first loss")]
    assert told == [
        f"first loss {run.losses[0]:.6f}; orpo and sft can be anything there, so it is not checked"
    ]
    for log, loss in zip(run.logs, run.losses, strict=True):
        assert loss == pytest.approx(0.1 * log["loss/orpo"] + log["loss/sft"], rel=1e-6)
        assert log["rewards/chosen"] == pytest.approx(-log["loss/sft"], rel=1e-6)
        assert "bco/delta" not in log and "entropy" not in log
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_loss/orpo"} <= {
        *run.evaluation
    }
    assert run.delta == 0.0


def test_a_loss_of_weight_0_is_measured_and_not_trained_on(
    checkpoint: Path, rows: list[Row], tmp_path: Path
) -> None:
    """The control 0 0 1: SFT's gradients, with the rewards still compared to the reference."""
    found: list[Any] = []
    runs: list[dict[str, Any]] = [{"loss_weights": [0.0, 0.0, 1.0]}, {"loss_type": "sft"}]
    for number, options in enumerate(runs):
        trainer = moved_trainer(checkpoint, tmp_path / str(number), rows, **options)
        found.append((*one_step(trainer), gradients(trainer.model)))
    (loss, control, _, grads), (sft_loss, sft, _, sft_grads) = found
    assert loss == pytest.approx(sft_loss, rel=1e-7)
    assert gradient_error(grads, sft_grads) < 1e-6
    assert {"loss/sigmoid", "loss/bco_pair", "bco/delta"} == {*control} - {*sft}
    assert control["rewards/margins"] != pytest.approx(sft["rewards/margins"], rel=1e-2)


def test_held_out_pairs_are_measured_exactly(
    checkpoint: Path, rows: list[Row], tmp_path: Path
) -> None:
    """Accuracy and margins over all pairs; delta enters its BCO and is not moved by it."""
    values = []
    for number, size in enumerate((1, 3, len(rows))):
        trainer = moved_trainer(
            *(checkpoint, tmp_path / str(number), rows),
            eval_dataset=rows,
            per_device_eval_batch_size=size,
            max_tokens_per_microbatch=200,
        )
        trainer.shift.update(total=0.5, count=2)
        values.append(trainer.evaluate())
        assert (trainer.shift.total, trainer.shift.count) == (0.5, 2)
        assert values[-1]["eval_bco/delta"] == 0.25
    add_noise(trainer.model)  # elsewhere again: one step there tells the same numbers
    second = trainer.evaluate()
    _, step, _ = one_step(trainer)
    names = [name for name in values[0] if name.startswith(("eval_re", "eval_loss", "eval_logps"))]
    assert len(names) == 1 + 3 + 4 + 2
    for name in names:
        assert values[1][name] == pytest.approx(values[0][name], rel=1e-5), name
        assert values[2][name] == pytest.approx(values[0][name], rel=1e-5), name
        if name != "eval_loss":
            assert second[name] == pytest.approx(step[name.removeprefix("eval_")], rel=1e-5), name
    accuracies = {value["eval_rewards/accuracies"] for value in [*values, second]}
    assert {round(len(rows) * accuracy, 6) % 1 for accuracy in accuracies} == {0.0}
    assert second["eval_rewards/margins"] == pytest.approx(
        second["eval_rewards/chosen"] - second["eval_rewards/rejected"], abs=1e-6
    )


def test_held_out_accuracy_is_the_share_of_pairs_put_right(
    checkpoint: Path, rows: list[Row], tmp_path: Path
) -> None:
    """Trained on the pairs until all are right: from 0 (all rewards are equal at first) to 1."""
    run = train(
        *("mpo", checkpoint, tmp_path, rows),
        eval_rows=len(rows),
        per_device_train_batch_size=len(rows),
        learning_rate=0.3,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
    )
    history = [log for log in run.trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in history] == [0, 3, 6, 6]  # at last by train() of these tests
    assert history[0]["eval_rewards/accuracies"] == history[0]["eval_rewards/margins"] == 0.0
    assert run.evaluation["eval_rewards/accuracies"] == 1.0
    assert run.evaluation["eval_rewards/margins"] > history[1]["eval_rewards/margins"] > 0.0
    assert torch.tensor(run.losses).isfinite().all()
