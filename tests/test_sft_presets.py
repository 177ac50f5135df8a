"""Stages by name: what they train, with adapters and rates too, and what contradicts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from trainer_cases import Recorded, conversations, make_trainer, write_images

from internvl.errors import UserError
from internvl.parts import part_of
from mpo.config import MPOConfig
from sft.config import SFTConfig
from sft.presets import STAGES
from training.cli import ModelArguments, parse_config, peft_config
from training.parts import SHORT

PROJECTOR = {"lora_modules_to_save": ["multi_modal_projector"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 2)
    return folder


def trained(trainer: Any) -> set[str]:
    """The parts that the trainer trains something of."""
    return {SHORT[part_of(name)] for name, p in trainer.model.named_parameters() if p.requires_grad}


def lora(**options: Any) -> LoraConfig:
    return peft_config(ModelArguments("model", use_peft=True, lora_r=2, **options))


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_trains_its_parts_and_no_others(
    stage: str, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    rows = conversations(images, 2)
    rates = {} if stage == "mlp_warmup" else {"vit_learning_rate": 0.01, "vit_layer_decay": 0.9}
    trainer = make_trainer("sft", tiny_model, tmp_path, rows, Recorded(), stage=stage, **rates)
    assert trained(trainer) == set(STAGES[stage])
    groups = trainer.create_optimizer().param_groups
    held = sum(p.numel() for group in groups for p in group["params"])
    assert held == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if rates:  # embeddings, two layers, and the other parts
        found = sorted({group["lr"] for group in groups})
        assert found == pytest.approx([*(0.01 * 0.9**k for k in (3, 2, 1)), 0.02])


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        ("vit_incremental", {"lora_parts": ["vit"], **PROJECTOR}),
        ("full", {"lora_parts": ["llm", "vit"], **PROJECTOR}),
    ],
)
def test_a_stage_by_adapter(
    stage: str, adapter: dict[str, Any], tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    rows = conversations(images, 2)
    trainer = make_trainer(
        *("sft", tiny_model, tmp_path, rows, Recorded()),
        peft_config=lora(**adapter),
        stage=stage,
        vit_drop_path=0.1,
    )
    assert trained(trainer) == set(STAGES[stage])


def test_an_adapter_without_a_part_of_the_stage_is_refused(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    config = lora(lora_parts=["vit"])
    with pytest.raises(UserError, match="the stage trains the projector, but the adapter has"):
        make_trainer(
            *("sft", tiny_model, tmp_path, conversations(images, 2), Recorded()),
            peft_config=config,
            stage="vit_incremental",
        )


EARLY: list[tuple[str, str]] = [
    ("--stage warmup", "stage is 'warmup'; it is one of mlp_warmup, vit_incremental, full"),
    ("--stage full --freeze_vit true", "stage is 'full', which trains the vit, but freeze_vit is"),
    ("--stage mlp_warmup --freeze_projector true", "but freeze_projector is set"),
    ("--stage mlp_warmup --vit_learning_rate 1e-5", "but freeze_vit is set, too"),
    ("--stage mlp_warmup --vit_drop_path 0.1", "vit_drop_path is 0.1, but freeze_vit is set"),
    ("--stage mlp_warmup --use_peft true", "the stage freezes the llm, but lora_parts has llm"),
    ("--stage full --use_peft true", "the stage trains the vit, but the adapter has nothing"),
    (
        "--stage full --use_peft true --lora_parts llm vit",
        "name multi_modal_projector in lora_modules_to_save, or leave the stage out",
    ),
    ("--vit_drop_path 1", "vit_drop_path is 1.0; it is from 0 to below 1"),
    ("--vit_drop_path -0.1", "vit_drop_path is -0.1; it is from 0 to below 1"),
    ("--jpeg_quality 75", "jpeg_quality is [75]; give the lowest and the highest"),
    ("--jpeg_quality 90 80", "jpeg_quality is [90, 80]; give the lowest and the highest"),
    ("--jpeg_quality 0 100", "from 1 to 100"),
]


@pytest.mark.parametrize(("words", "message"), EARLY)
def test_what_contradicts_itself_is_said_before_anything_is_loaded(
    words: str, message: str
) -> None:
    start = ["--model_name_or_path", "m", "--train_file", "t", "--use_cpu", "true"]
    with pytest.raises(UserError) as error:
        parse_config([SFTConfig, ModelArguments], "sft", [*start, *words.split()])
    assert message in str(error.value)


def test_the_resolved_options_are_a_configuration_again() -> None:
    """What a stage froze is written down as frozen, and agrees with the stage."""
    first = SFTConfig(output_dir="o", train_file="t", use_cpu=True, stage="mlp_warmup")
    options = {name: getattr(first, name) for name in ("freeze_llm", "freeze_vit", "stage")}
    assert options == {"freeze_llm": True, "freeze_vit": True, "stage": "mlp_warmup"}
    again = SFTConfig(output_dir="o", train_file="t", use_cpu=True, **options)
    assert not again.freeze_projector and again.asked_parts == ("projector",)


def test_a_drop_path_of_what_no_adapter_trains_is_refused(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"vit_drop_path is 0\.1, but nothing of the vision"):
        make_trainer(
            *("sft", tiny_model, tmp_path, conversations(images, 2), Recorded()),
            peft_config=lora(),
            vit_drop_path=0.1,
        )


@pytest.mark.parametrize("option", ["--vit_drop_path", "--stage", "--vision_from"])
def test_other_stages_have_no_such_option(option: str) -> None:
    """MPO's policy and reference must be one network: there is no drop path to be set."""
    with pytest.raises(UserError, match=f"unknown option {option}"):
        parse_config([MPOConfig, ModelArguments], "mpo", ["--model_name_or_path", "m", option, "1"])
