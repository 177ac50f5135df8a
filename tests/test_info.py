"""`internvl info`: sizes from headers, and memory against what autograd really keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl import logprobs
from internvl.checkpoint import load_model
from internvl.errors import UserError
from internvl.info import (
    TRAININGS,
    count_parameters,
    estimate_memory,
)
from internvl.logprobs import ScoringHead, score_tokens
from internvl.memory import State, Work, activation_bytes, count_lora, estimate
from internvl.model import InternVLForConditionalGeneration, adopt
from internvl.packing import Example, pack

SIDE = 112
TOKENS_A_TILE = (SIDE // 28) ** 2


def build(family: str, **widths: int) -> InternVLForConditionalGeneration:
    """A random model; widths override D, L, H, KV, I, VD, VL."""
    from transformers import InternVLConfig

    w = {"D": 128, "L": 2, "H": 4, "KV": 2, "I": 384, "VD": 64, "VL": 2} | widths
    text = {
        "model_type": family,
        "vocab_size": 400,
        "hidden_size": w["D"],
        "num_hidden_layers": w["L"],
        "num_attention_heads": w["H"],
        "num_key_value_heads": w["KV"],
        "head_dim": 32,
        "intermediate_size": w["I"],
    }
    if family == "qwen3_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    vision = {
        "hidden_size": w["VD"],
        "num_hidden_layers": w["VL"],
        "num_attention_heads": 4,
        "intermediate_size": 4 * w["VD"],
        "attention_bias": True,
        "image_size": SIDE,
        "patch_size": 14,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=5,
        image_seq_length=TOKENS_A_TILE,
        tie_word_embeddings=False,
    )
    return adopt(InternVLForConditionalGeneration(config)).train()


def kept_bytes(
    model: InternVLForConditionalGeneration, *, tiles: int, bf16: bool, checkpointing: bool
) -> tuple[int, int]:
    """(bytes that autograd keeps of one packed forward, tokens of its row), parameters left out."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    visual = TOKENS_A_TILE * tiles
    empty = torch.zeros((tiles, 3, SIDE, SIDE), dtype=torch.uint8)
    example = Example([5] * visual + [7] * 500, empty, [[8] * 50, [9] * 50], list(range(visual)))
    batch = pack([example])
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        scores = model(packed=batch, pixel_values=empty.float())
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert len(scores.logprobs) == 100
    return size, len(batch.input_ids)


SHAPES: list[tuple[str, dict[str, int]]] = [
    ("qwen3", {"D": 256, "H": 8, "I": 768, "L": 6}),
    ("qwen3", {"VD": 256, "VL": 6, "L": 4}),
    ("qwen2", {"D": 256, "H": 8, "I": 1024, "L": 6}),
    ("llama", {"D": 256, "H": 8, "KV": 8, "I": 768, "L": 6}),
    ("qwen3_moe", {"D": 256, "H": 8, "KV": 4, "L": 6}),
]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("family", "widths"), SHAPES)
def test_activations_are_what_autograd_keeps(
    family: str, widths: dict[str, int], bf16: bool
) -> None:
    """Within 7% (the head and the projector are not in the formula)."""
    model = build(family, **widths)
    kept, tokens = kept_bytes(model, tiles=6, bf16=bf16, checkpointing=False)
    if bf16:  # autocast's copies of the weights are counted with the weights
        kept -= 2 * model.num_parameters()
    told = activation_bytes(model.config, tokens=tokens, tiles=6, checkpointing=False, bf16=bf16)
    assert told / kept == pytest.approx(1.0, abs=0.07)


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_keeps_the_input_of_each_layer(bf16: bool) -> None:
    """Two more layers cost exactly their inputs, in the LLM and in the vision tower."""
    sizes = {}
    for layers, vision_layers in ((2, 2), (4, 2), (2, 4)):
        model = build("qwen3", L=layers, VL=vision_layers)
        kept, tokens = kept_bytes(model, tiles=6, bf16=bf16, checkpointing=True)
        told = activation_bytes(model.config, tokens=tokens, tiles=6, checkpointing=True, bf16=bf16)
        sizes[layers, vision_layers] = (kept, told)
    for deeper in ((4, 2), (2, 4)):
        kept, told = (sizes[deeper][i] - sizes[2, 2][i] for i in (0, 1))
        assert kept == told


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors made while it is open: now, and at most."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_the_peak_of_a_step(checkpointing: bool, bf16: bool) -> None:
    """Activations, gradients, a chunk of logits against all tensors that live at once.

    At most 15% too low. It may be too high: by checkpointing the gradients and casts, which are
    large beside activations here, are not all there at the peak.
    """
    model = build("qwen3", D=256, H=8, I=768, L=4, VD=128)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    visual, tiles = 6 * TOKENS_A_TILE, torch.zeros((6, 3, SIDE, SIDE))
    example = Example(
        *([5] * visual + [7] * 700, tiles.to(torch.uint8), [[8] * 100, [9] * 100]),
        list(range(visual)),
    )
    batch = pack([example])
    with LiveBytes(model.parameters()) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = model(packed=batch, pixel_values=tiles)
        scores.logprobs.sum().backward()
    number = model.num_parameters()
    state = State(4 * number, number, number, moments=0)
    work = Work(len(batch.input_ids), 6, checkpointing, bf16=bf16, gpu=False)
    ratio = (estimate(model.config, state, work).total - 4 * number) / live.peak
    assert 0.85 < ratio < (1.5 if checkpointing else 1.15)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_chunk_of_logits_is_the_peak_of_the_head(
    sampled: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three chunks; with the sampler's settings and entropies, too."""
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 2**21)
    monkeypatch.setattr(logprobs, "_BLOCK", 2**16)
    config = build("qwen3").config
    config.text_config.vocab_size = vocabulary = 2**13
    head = ScoringHead(8, vocabulary, bias=False)
    hidden = torch.randn(600, 8, requires_grad=True)
    targets = torch.arange(600)
    settings: Any = {"temperature": 0.7, "forbidden": [5], "with_entropy": True}
    with LiveBytes([head.weight, hidden]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = score_tokens(
                *(hidden, targets, head),
                vocab_size=vocabulary,
                **(settings if sampled else {}),
            )
        scores.logprobs.sum().backward()
    number = head.weight.numel()
    state = State(4 * number, number, number)
    work = Work(600, 0, bf16=bf16, entropy=sampled, gpu=False)
    need = estimate(config, state, work)
    told = need.weights - 4 * number + need.gradients + need.logits
    assert told / live.peak == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_adapters_are_those_of_peft(family: str) -> None:
    """With the stages' own default; the experts of a mixture are no linear layers, and get none."""
    from peft import LoraConfig, get_peft_model

    model: Any = build(family)
    told = count_lora(model.config, 4)
    lora = LoraConfig(r=4, target_modules=r".*language_model\.layers\..*_proj")
    adapted = get_peft_model(model, lora)
    assert told == sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)


def test_parameters_are_counted_from_the_headers(tiny_model: Path) -> None:
    parts, dtypes = count_parameters(tiny_model)
    model = load_model(tiny_model)
    assert sum(parts.values()) == model.num_parameters()
    vision = sum(p.numel() for p in model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert list(parts.values())[:2] == [vision, projector]
    assert dtypes == {"F32"}


def test_memory_of_an_8b() -> None:
    """InternVL3-8B's widths: 16 bytes a weight and its bfloat16 copy; LoRA is a small part."""
    from transformers import InternVLConfig

    text: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": 151674,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    }
    config = InternVLConfig(text_config=text)
    parameters = {"vision tower": 304_000_000, "projector": 33_000_000, "language model": 7.6e9}
    numbers = {name: int(count) for name, count in parameters.items()}
    full, lora, frozen, _ = (
        estimate_memory(config, numbers, training, tokens=16384, tiles=32) for training in TRAININGS
    )
    total = sum(numbers.values())
    assert full.weights + full.gradients + full.optimizer == 18 * total
    assert frozen.gradients == 4 * numbers["language model"]
    assert frozen.engine == 2 * total and full.engine == 0
    # by hand: 16 x 28 layers x (4 attention matrices, 3 of the MLP)
    per_layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert count_lora(config, 16) == 16 * 28 * per_layer == 40_370_176
    assert lora.total < full.total / 5


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.safetensors there"):
        count_parameters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        count_parameters(tmp_path)
