"""What a run will take of memory, told before it starts; QLoRA's options and gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import Recorded, conversations, make_trainer, pairs, train, write_images
from transformers import InternVLConfig

from internvl.checkpoint import load_model
from internvl.errors import UserError
from internvl.memory import State, Work, estimate
from internvl.model import InternVLForConditionalGeneration
from mpo.config import MPOConfig
from rl.config import RLConfig
from training import memory, quantising
from training.cli import ModelArguments, peft_config
from training.memory import Room, optimizer_bytes, state_of
from training.parts import count_parts

VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "model_type": "qwen3",
    "vocab_size": 50_000,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
FOUR_BIT = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 4)
    return folder


def start(model: Path, images: Path, output: Path, **options: Any) -> Any:
    return make_trainer("sft", model, output, conversations(images, 2), Recorded(), **options)


def test_state_is_counted(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """Weights 4 bytes, gradients 4, AdamW 8; LoRA's gradients and states are the adapter's."""
    trainer = start(tiny_model, images, tmp_path, optim="adamw_torch")
    number = sum(p.numel() for p in trainer.model.parameters())
    assert state_of(trainer.model, trainer.args) == State(4 * number, number, number, 4, 8)
    adapter = peft_config(ModelArguments("m", use_peft=True, lora_r=4))
    trainer = start(tiny_model, images, tmp_path, optim="sgd", peft_config=adapter)
    state = state_of(trainer.model, trainer.args)
    assert (state.parameters, state.trained, state.moments) == (number + 19456, 19456, 0)
    config = trainer.model.get_base_model().config
    need = estimate(config, State(4e6, 10**6, 10**6, shards=(4, 2, 1)), Work(100, 1))
    assert (need.weights, need.gradients, need.optimizer) == (6e6 / 4, 4e6 / 2, 8e6)


@pytest.mark.parametrize(
    ("kind", "options", "copies"),
    [
        (MPOConfig, {}, (0, 0)),
        (MPOConfig, {"precompute_ref_log_probs": False}, (1, 0)),
        (RLConfig, {}, (0, 0)),
        (RLConfig, {"beta": 0.04}, (0, 2)),
    ],
)
def test_a_references_weights_are_counted(
    kind: Any, options: dict[str, Any], copies: tuple[int, int]
) -> None:
    """On the device MPO's that is asked at each step, on the host RL's; frozen weights are not."""
    args = kind(train_file="t", use_cpu=True, max_steps=1, bf16=True, **options)
    model = InternVLForConditionalGeneration(InternVLConfig(vision_config=VISION, text_config=TEXT))
    model.model.vision_tower.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert args.copies_of_trained == copies
    state = state_of(model, args)
    assert state.reference == 4 * trained * copies[0]
    assert estimate(model.config, state, Work(8, 0)).weights == (
        4 * state.parameters + 4 * trained * copies[0] + 2 * trained
    )
    lines = memory.report_memory(model, args, count_parts(model))
    start = f"(then {8 * trained / 2**30:.2f} of the start)"
    assert (start in lines[1]) == (copies[1] > 0)


def test_optimizers_by_name() -> None:
    names = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "sgd", "lion_32bit")
    assert [optimizer_bytes(name) for name in names] == [8, 2, 8, 0, 4]


def test_what_cannot_fit_is_refused_and_what_hardly_fits_is_warned_of(
    tiny_model: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start(tiny_model, images, tmp_path)
    told = capsys.readouterr().out
    assert "device memory, estimated: " in told and "host memory, estimated: " in told
    monkeypatch.setattr(memory, "device_room", lambda device: Room(2**30, 2**20))
    start(tiny_model, images, tmp_path)
    told = capsys.readouterr().out
    assert "WARNING: about " in told and "lower max_tokens_per_microbatch (16384)" in told
    monkeypatch.setattr(memory, "device_room", lambda device: Room(2**20, 2**20))
    with pytest.raises(UserError, match=r"weights, gradients and optimizer take .* train by LoRA"):
        start(tiny_model, images, tmp_path)


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "is_bitsandbytes_available", lambda: False)
    for options, message in (
        ({"load_in_4bit": True}, "load_in_4bit needs use_peft"),
        ({"load_in_4bit": True, "use_peft": True}, "load_in_4bit needs the package bitsandbytes"),
        ({"load_in_4bit": True, "use_peft": True, "dtype": "float16"}, "not float16"),
        ({"use_bnb_nested_quant": True}, "load_in_4bit is not set"),
    ):
        with pytest.raises(UserError, match=message):
            ModelArguments("m", **options)
    monkeypatch.setattr(quantising, "is_bitsandbytes_available", lambda: True)
    assert ModelArguments("m", load_in_4bit=True, use_peft=True).bnb_4bit_quant_type == "nf4"


@pytest.mark.skipif(not FOUR_BIT, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("nested", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_adapter_is_trained_over_four_bits(
    nested: bool, tiny_model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPO's first loss is exact, and the gradients are those over the same base dequantised."""
    import trainer_cases

    config = quantising.four_bit(kind="nf4", nested=nested, dtype=torch.float32)

    def load(path: Path, dtype: str = "float32") -> Any:
        return load_model(path, dtype=dtype, quantization=config)

    def whole(path: Path, dtype: str = "float32") -> Any:
        from bitsandbytes.functional import dequantize_4bit

        plain, packed = load_model(path), load(path)
        held = dict(packed.named_parameters())
        for name, parameter in plain.named_parameters():
            if state := getattr(held[name], "quant_state", None):
                assert "language_model.layers" in name
                parameter.data = dequantize_4bit(held[name].data, state)
        return plain

    runs = []
    for loader in (load, whole):
        monkeypatch.setattr(trainer_cases, "load_model", loader)
        adapter = peft_config(ModelArguments("m", use_peft=True, lora_r=4))
        output = tmp_path / loader.__name__
        rows = pairs(images, 4)
        runs.append(train("mpo", tiny_model, output, rows, peft_config=adapter, max_steps=2))
    packed, plain = runs
    assert packed.losses == pytest.approx(plain.losses, rel=1e-4)
    for name, gradient in plain.gradients[0].items():
        assert torch.allclose(packed.gradients[0][name], gradient, atol=1e-4), name
