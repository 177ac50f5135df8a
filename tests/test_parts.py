"""What is trained, at which learning rate: parts frozen, adapted, or trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from plain import load_plain
from safetensors.torch import load_file
from trainer_cases import (
    Recorded,
    conversations,
    make_trainer,
    train,
    write_images,
)

from internvl.checkpoint import full_weights, load_model
from internvl.conversion.merge import merge_adapter
from internvl.errors import UserError
from internvl.parts import part_of
from sft.config import SFTConfig
from training.cli import ModelArguments, parse_config, peft_config
from training.parts import count_parts, describe_parts

VIT, PROJECTOR, LLM = "vision tower", "projector", "language model"
RATES = {"vit_learning_rate": 0.01, "projector_learning_rate": 0.03, "vit_layer_decay": 0.5}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 4)
    return folder


def lora(**options: Any) -> LoraConfig:
    """The configuration that the command line makes of these options."""
    return peft_config(ModelArguments("model", use_peft=True, lora_r=4, **options))


def sft_trainer(model: Path, images: Path, output: Path, **options: Any) -> Any:
    return make_trainer("sft", model, output, conversations(images, 4), Recorded(), **options)


def trained_names(trainer: Any) -> set[str]:
    return {name for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "part", [VIT, *(pytest.param(part, marks=pytest.mark.slow) for part in (PROJECTOR, LLM))]
)
def test_a_frozen_part_stays_and_the_others_learn_as_before(
    part: str, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """Their first gradients are those of full training, by gradient checkpointing, too."""
    option = {VIT: "freeze_vit", PROJECTOR: "freeze_projector", LLM: "freeze_llm"}[part]
    rows = conversations(images, 4)
    full = train("sft", tiny_model, tmp_path, rows, max_steps=1, num_train_epochs=1)
    run = train(
        *("sft", tiny_model, tmp_path, rows),
        **{option: True, "max_steps": 1, "gradient_checkpointing": True},
    )
    assert {part_of(name) for name in run.gradients[0]} == {VIT, PROJECTOR, LLM} - {part}
    for name, gradient in run.gradients[0].items():
        assert torch.allclose(gradient, full.gradients[0][name], atol=1e-5), name
    before = load_model(tiny_model).state_dict()
    moved = {
        part_of(name)
        for name, weight in run.trainer.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert moved == {VIT, PROJECTOR, LLM} - {part}


def expected_rate(name: str) -> float:
    """By hand, for the tiny model's two layers of the vision tower."""
    if "vision_tower.embeddings" in name:
        return 0.01 * 0.5**3
    if "vision_tower.encoder.layer.0" in name:
        return 0.01 * 0.5**2
    if "vision_tower.encoder.layer.1" in name:
        return 0.01 * 0.5
    return 0.03 if "projector" in name else 0.02


@pytest.mark.parametrize(
    "schedule",
    [
        "linear",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("cosine_with_min_lr", "constant_with_warmup")
        ),
    ],
)
def test_rates_by_part_are_those_of_an_optimizer_made_by_hand(
    schedule: str, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """Weight decay off norms and biases, every group scheduled; the weights equal to the bit."""
    options = {**RATES, "optim": "adamw_torch", "weight_decay": 0.1, "num_train_epochs": 3}
    options |= {"lr_scheduler_type": schedule, "warmup_steps": 1, "per_device_train_batch_size": 2}
    if schedule == "cosine_with_min_lr":
        options["lr_scheduler_kwargs"] = {"min_lr": 0.001}
    rows = conversations(images, 4)
    run = train("sft", tiny_model, tmp_path, rows, **options)
    assert len(run.gradients) == 6
    model = load_model(tiny_model)
    groups = [
        {
            "params": [parameter],
            "lr": expected_rate(name),
            # norms are the parameters of one dimension here, apart from these two of a layer
            "weight_decay": 0.1 if parameter.dim() > 1 or "lambda" in name else 0.0,
        }
        for name, parameter in model.named_parameters()
    ]
    names = [name for name, _ in model.named_parameters()]
    groups[names.index("model.vision_tower.embeddings.patch_embeddings.projection.bias")][
        "weight_decay"
    ] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.999), eps=1e-8)
    from transformers import get_scheduler

    scheduler = get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=6,
        scheduler_specific_kwargs=options.get("lr_scheduler_kwargs"),
    )
    for gradients in run.gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
        scheduler.step()
    for name, parameter in model.named_parameters():
        trained = run.trainer.model.state_dict()[name]
        assert torch.equal(trained, parameter), (name, (trained - parameter).abs().max())
    assert run.logs[1]["learning_rate"] == pytest.approx(0.02)  # the LLM's is the one logged


def test_groups_come_in_one_order(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """LLM, projector, vision tower from its last layer down, each with and without decay."""
    trainer = sft_trainer(tiny_model, images, tmp_path, weight_decay=0.1, **RATES)
    groups = trainer.create_optimizer().param_groups
    rates = [0.02] * 2 + [0.03] * 2 + [0.005] * 2 + [0.0025] * 2 + [0.00125] * 2
    assert [group["lr"] for group in groups] == rates
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 5
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(trainer.model.parameters()))


def test_a_run_with_rates_by_part_goes_on(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """From step 2's checkpoint to the weights of the run that was not stopped."""
    options = {**RATES, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    options |= {"num_train_epochs": 2, "per_device_train_batch_size": 2}
    whole = sft_trainer(tiny_model, images, tmp_path, **options)
    whole.run()
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "checkpoint-4" / "complete.json").rename(tmp_path / "checkpoint-4" / "incomplete")
    again = sft_trainer(tiny_model, images, tmp_path, **options)
    again.run()
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    changed = sft_trainer(tiny_model, images, tmp_path, **{**options, "vit_layer_decay": 0.9})
    with pytest.raises(UserError, match=r"vit_layer_decay: 0\.5 then, 0\.9 now"):
        changed.run()


def test_an_adapter_on_both_parts_with_the_projector_whole(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """It trains what it says, loads in plain PEFT, and merges to the same weights."""
    config = lora(lora_parts=["llm", "vit"], lora_modules_to_save=["multi_modal_projector"])
    output = tmp_path / "adapter"
    trainer = sft_trainer(
        *(tiny_model, images, output), peft_config=config, optim="adamw_torch", **RATES
    )
    names = trained_names(trainer)
    assert {part_of(name) for name in names} == {VIT, PROJECTOR, LLM}
    kinds = ("lora_A", "lora_B", "multi_modal_projector.modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in names)
    assert sum("lora_A" in name for name in names) == 2 * 7 + 2 * 6  # two layers of each tower
    rates = {g["lr"] for g in trainer.create_optimizer().param_groups}
    assert rates == {0.02, 0.03, 0.005, 0.0025}  # nothing of the embeddings is trained
    trainer.run()
    expected = dict(full_weights(trainer.model))
    plain, _ = load_plain(tiny_model)
    loaded = PeftModel.from_pretrained(plain, str(output))
    for name, weight in full_weights(loaded):
        assert torch.equal(weight, expected[name]), name
    merge_adapter(output, tmp_path / "merged", base=tiny_model, progress=False)
    merged = load_model(tmp_path / "merged").state_dict()
    for name, weight in expected.items():
        assert torch.allclose(merged[name], weight, atol=1e-6), name
    projector = load_file(tiny_model / "model.safetensors")
    assert projector  # the base is not written to
    assert count_parts(trainer.model)[PROJECTOR].trained == count_parts(plain)[PROJECTOR].every


def test_what_is_trained_is_told(
    tiny_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = sft_trainer(tiny_model, images, tmp_path, freeze_vit=True)
    line = describe_parts(trainer.model, count_parts(trainer.model))
    sizes = dict.fromkeys((VIT, PROJECTOR, LLM), 0)
    for name, parameter in load_model(tiny_model).named_parameters():
        sizes[part_of(name)] += parameter.numel()
    shown = {part: f"{size / 1000:.2f} k" for part, size in sizes.items()}
    assert line == (
        f"trained (all weights): {LLM} {shown[LLM]} of {shown[LLM]}, {PROJECTOR} "
        f"{shown[PROJECTOR]} of {shown[PROJECTOR]}, {VIT} 0 of {shown[VIT]} parameters"
    )
    assert line in capsys.readouterr().out
    adapted = sft_trainer(tiny_model, images, tmp_path, peft_config=lora())
    line = describe_parts(adapted.model, count_parts(adapted.model))
    assert line.startswith("trained (by adapter): language model 19.46 k of ")
    assert f"of {shown[LLM]}, projector 0 of {shown[PROJECTOR]}" in line


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"freeze_vit": True}, {"lora_target_modules": ["q_proj"]}, "freeze_vit is set, but the ad"),
    (
        {"freeze_projector": True},
        {"lora_modules_to_save": ["multi_modal_projector"]},
        "freeze_projector is set, but the adapter trains",
    ),
    ({"vit_learning_rate": 0.1}, {}, "vit_learning_rate is given, but nothing of the vision"),
    ({"vit_layer_decay": 0.9}, {}, "vit_layer_decay is given, but nothing of the vision tower"),
    ({"projector_learning_rate": 0.1}, {}, "projector_learning_rate is given, but nothing of"),
]


@pytest.mark.parametrize(("options", "adapter", "message"), REFUSED, ids=str)
def test_an_adapter_that_does_not_fit_is_refused(
    options: dict[str, Any],
    adapter: dict[str, Any],
    message: str,
    tiny_model: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as error:
        sft_trainer(tiny_model, images, tmp_path, peft_config=lora(**adapter), **options)
    assert message in str(error.value)


EARLY: list[tuple[str, str]] = [
    ("--freeze_llm --freeze_vit --freeze_projector", "leave nothing to train"),
    ("--freeze_vit --vit_learning_rate 0.1", "vit_learning_rate is given, but freeze_vit is set"),
    ("--freeze_vit --vit_layer_decay 0.9", "vit_layer_decay is given, but freeze_vit is set"),
    ("--freeze_projector --projector_learning_rate 0.1", "but freeze_projector is set"),
    ("--vit_layer_decay 1.5", "vit_layer_decay is 1.5; it is at most 1"),
    ("--vit_learning_rate 0", "vit_learning_rate is 0.0; it must be positive"),
    ("--use_peft --freeze_llm", "freeze_llm is set, but lora_parts has llm"),
    ("--use_peft --freeze_vit --lora_parts llm vit", "freeze_vit is set, but lora_parts has vit"),
    ("--use_peft --lora_parts mlp", "lora_parts names ['mlp']; its values are llm and vit"),
    ("--use_peft --lora_parts vit --lora_target_modules q_proj", "are both given; give one"),
    ("--lora_parts vit", "lora_parts is given, but use_peft is not"),
    ("--lora_modules_to_save multi_modal_projector", "is given, but use_peft is not"),
]


@pytest.mark.parametrize(("words", "message"), EARLY)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(
    words: str, message: str
) -> None:
    start = ["--model_name_or_path", "m", "--train_file", "t", "--use_cpu", "true"]
    flags = [w for word in words.split() for w in ([word, "true"] if word in _BARE else [word])]
    with pytest.raises(UserError) as error:
        parse_config([SFTConfig, ModelArguments], "sft", [*start, *flags])
    assert message in str(error.value)


_BARE = {"--freeze_llm", "--freeze_vit", "--freeze_projector", "--use_peft"}


def test_an_optimizer_of_ones_own_has_no_rates_by_part(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    trainer = sft_trainer(tiny_model, images, tmp_path, **RATES)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="learning rates by part need the optimizer"):
        trainer.create_optimizer()
