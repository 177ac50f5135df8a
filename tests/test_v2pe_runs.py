"""V2PE in runs: options, MPO's reference, the checkpoint's own step, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trainer_cases import (
    LARGE,
    Recorded,
    ScriptedSampler,
    conversations,
    make_trainer,
    pairs,
    put_sampler,
    questions,
    train,
    write_images,
)

from internvl.checkpoint import checksum, load_model
from internvl.data import Row
from internvl.errors import UserError
from internvl.packing import pack
from internvl.positions import checkpoint_step
from internvl.sampler import open_sampler
from rewards import Outcome, Verdict
from rl.__main__ import main as rl_main
from sft.config import SFTConfig
from training.cli import ModelArguments, parse_config
from training.encoders import make_encoder

STEPS = [1.0, 0.5, 0.25, 1 / 256]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 8)
    return folder


# ---------------------------------------------------------------- training


def reference_of(trainer: Any) -> tuple[str, list[float]]:
    """The key of the reference and its pairs, and the log-probabilities that rows carry."""
    return trainer.reference.keys["train"], [
        pair.ref_chosen_logps for pair in trainer.train_dataset
    ]


def test_reference_and_policy_see_the_same_draws(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """The policy, before its first step, gives the reference's numbers; other draws, others."""
    rows = pairs(images, 8)
    found = []
    options: dict[str, Any] = {"position_steps": STEPS, "inference_position_step": 0.5}
    other: dict[str, Any] = {**options, "seed": 4}
    for number, given in enumerate([{}, options, other, {"position_steps": [0.5]}]):
        made = make_trainer("mpo", tiny_model, tmp_path / str(number), rows, Recorded(), **given)
        examples = [made.encode(row) for row in made.train_dataset]
        policy = made.score(made.model, pack(examples))
        sums = pack(examples).sum_by_completion(policy.logprobs).detach()
        stored = torch.tensor([example.completion_values["ref_logps"] for example in examples])
        assert (sums - stored.flatten()).abs().max() < 1e-4
        found.append(reference_of(made))
    assert len({key for key, _ in found}) == 4
    with_images = [index for index in range(8) if index % 4]
    for one, another in [(0, 1), (1, 2), (1, 3)]:
        gaps = [abs(found[one][1][i] - found[another][1][i]) for i in with_images]
        assert max(gaps) > 1e-3
    assert found[0][1][0] == pytest.approx(found[1][1][0], abs=1e-5)  # no image, no draw


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, None),
        ({"position_steps": [1.0]}, None),
        ({"position_steps": [0.25]}, 0.25),
        ({"position_steps": STEPS, "inference_position_step": 0.5}, 0.5),
    ],
)
def test_the_checkpoint_says_its_step(
    tiny_model: Path, images: Path, tmp_path: Path, options: dict[str, Any], written: float | None
) -> None:
    rows = conversations(images, 2)
    options = {**options, "max_steps": 1, "max_tokens_per_microbatch": LARGE}
    trainer = train("sft", tiny_model, tmp_path / "out", rows, **options).trainer
    trainer.save_model()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("position_step") == written
    saved = load_model(tmp_path / "out")
    assert checkpoint_step(saved.config.to_dict()) == (written or 1.0)
    # the next stage goes on with it unless it is told otherwise
    following = make_trainer("sft", tmp_path / "out", tmp_path / "next", rows, Recorded())
    assert following.encoder.position_steps == (written or 1.0,)


def test_a_run_goes_on_with_the_same_draws(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """Two epochs, the second made again from the first one's checkpoint: the same bytes."""
    given: dict[str, Any] = {"position_steps": STEPS, "inference_position_step": 1.0}
    given |= {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    given["per_device_train_batch_size"] = 8

    def weights() -> str:
        rows = conversations(images, 8)
        trainer = make_trainer("sft", tiny_model, tmp_path / "out", rows, Recorded(), **given)
        trainer.run()
        return checksum(trainer.model.named_parameters())

    whole = weights()
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    assert weights() == whole
    given["inference_position_step"] = 0.5
    with pytest.raises(UserError, match=r"inference_position_step: 1\.0 then, 0\.5 now"):
        weights()


def test_steps_from_a_file_and_from_flags(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("model_name_or_path: m\ntrain_file: t\nposition_steps: [1, 0.00390625]\n")
    words = ["--config", str(file), "--use_cpu", "true", "--inference_position_step", "1"]
    args, _ = parse_config([SFTConfig, ModelArguments], "sft", words)
    assert (args.position_steps, args.inference_position_step) == ([1, 1 / 256], 1.0)
    args, _ = parse_config([SFTConfig, ModelArguments], "sft", [*words, "--position_steps", "1"])
    assert args.position_steps == [1.0]
    file.write_text("model_name_or_path: m\ntrain_file: t\nposition_steps: 0.5\n")
    with pytest.raises(UserError, match=r"position_steps is 0\.5; expected a list"):
        parse_config([SFTConfig, ModelArguments], "sft", words)


def test_online_with_the_transformers_sampler(
    stepped_model: Path, images: Path, tmp_path: Path
) -> None:
    """Sampler and trainer stand at the same positions, before and after an update."""

    def verify(asked: Any) -> list[Verdict]:
        even = [len(text) % 2 == 0 for _, text in asked]  # so that groups have a spread
        outcomes = [Outcome.CORRECT if right else Outcome.WRONG for right in even]
        return [Verdict(o, "5", "number", float(o == "correct"), True) for o in outcomes]

    given = {"num_generations": 4, "max_completion_length": 8, "max_logprob_gap": 1e-4}
    rows = questions(images, ["mixed"] * 4)
    trainer = make_trainer(
        *("rl", stepped_model, tmp_path / "out", rows, Recorded()),
        **{**given, "max_steps": 2, "steps_per_generation": 1, "per_device_train_batch_size": 4},
    )
    put_sampler(trainer, open_sampler(stepped_model, backend="transformers"))
    trainer.maker.rewarder.verify = verify
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["grad_norm"] > 0 and second["grad_norm"] > 0
    assert max(first["sampling/logprob_gap_max"], second["sampling/logprob_gap_max"]) < 1e-5


# ---------------------------------------------------------------- refusals

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"position_steps": [0.3]}, "position_steps is 0.3; a position step is one of 1, 0.5"),
    ("sft", {"position_steps": [2.0]}, "position_steps is 2.0; a position step is one of"),
    ("sft", {"position_steps": []}, "position_steps is empty"),
    ("sft", {"position_steps": [1.0, 0.5]}, "say with inference_position_step which one"),
    ("mpo", {"inference_position_step": 0.5}, "which is not among position_steps"),
    (
        "mpo",
        {"position_steps": [1.0, 0.5], "inference_position_step": 0.25},
        "inference_position_step is 0.25, which is not among position_steps",
    ),
    ("rl", {"position_steps": [0.5], "max_steps": 1}, "rollouts are sampled, and then trained on"),
]


@pytest.mark.parametrize(("stage", "options", "message"), REFUSED)
def test_options_that_cannot_be_honoured(
    tiny_model: Path, tmp_path: Path, stage: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(stage, tiny_model, tmp_path, [], Recorded(), **options)


def test_vllm_is_refused_by_name(
    stepped_model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sampler, by the online stage before it loads anything, and by its trainer."""
    refusal = "position_step is 0.25: vLLM knows no fractional positions.*transformers sampler"
    with pytest.raises(UserError, match=refusal):
        open_sampler(stepped_model, backend="vllm")
    (tmp_path / "rows.jsonl").write_text("")
    words = [
        "--model_name_or_path",
        str(stepped_model),
        "--train_file",
        str(tmp_path / "rows.jsonl"),
    ]
    words += ["--max_steps", "1", "--sampler", "vllm", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["rl", *words, "--use_cpu", "true"])
    with pytest.raises(UserError, match=refusal):
        rl_main()
    rows = questions(images, ["mixed"])
    made = make_trainer("rl", stepped_model, tmp_path / "out", rows, Recorded(), max_steps=1)
    assert made.encoder.position_steps == (0.25,)
    monkeypatch.setattr(ScriptedSampler, "name", "vllm")
    with pytest.raises(UserError, match=refusal):
        make_trainer("rl", stepped_model, tmp_path / "out", rows, Recorded(), max_steps=1)


def test_an_adapter_cannot_carry_a_step(stepped_model: Path, images: Path, tmp_path: Path) -> None:
    """It is used with the config of its base, which must then say it."""
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    rows: list[Row] = conversations(images, 2)
    given: dict[str, Any] = {"peft_config": lora, "position_steps": [0.5]}
    with pytest.raises(UserError, match=r'write "position_step": 0\.5 there first'):
        make_trainer("sft", stepped_model, tmp_path, rows, Recorded(), **given)
    given["position_steps"] = [0.25]
    made = make_trainer("sft", stepped_model, tmp_path, rows, Recorded(), **given)
    assert made.encoder.position_steps == (0.25,)


def test_tf32_would_round_positions(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    rows = conversations(images, 2)
    made = make_trainer("sft", tiny_model, tmp_path, rows, Recorded(), position_steps=[0.5])
    made.args.tf32 = True  # which transformers itself refuses on a CPU
    model = load_model(tiny_model)
    with pytest.raises(UserError, match="tf32 is on, which can round fractional positions"):
        make_encoder(model, made.processing_class, made.args)
    made.args.position_steps = None
    assert make_encoder(model, made.processing_class, made.args).position_steps == (1.0,)


def test_a_checkpoint_that_says_nonsense(stepped_model: Path) -> None:
    config = json.loads((stepped_model / "config.json").read_text())
    (stepped_model / "config.json").write_text(json.dumps({**config, "position_step": "1/4"}))
    with pytest.raises(UserError, match=r"config\.json is '1/4'; a position step is one of"):
        open_sampler(stepped_model, backend="transformers")
