"""Tiny checkpoints in the published custom-code layout, made on the spot with random weights.

Names, shapes and keys follow the published configs and modeling files; every family has a small
tokenizer of its real kind. `FAMILIES` lists them; `make_published` writes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from published_tokenizers import TOKENIZERS, write_json
from torch import Tensor

_DYNAMIC = {"factor": 2.0, "type": "dynamic"}


@dataclass(frozen=True)
class Family:
    """A published family: its language model, its template and what is special about it."""

    architecture: str
    template: str
    llm: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    spare: int = 0  # rows of the embeddings beyond the tokenizer


_MODEL_TYPES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
}
FAMILIES = {
    # InternVL 2.5, 3: the vocabulary is exactly the tokenizer's
    "qwen2": Family("Qwen2ForCausalLM", "internvl2_5", {"rope_scaling": dict(_DYNAMIC)}),
    # InternVL 3.5: padded vocabulary, heads of another width than hidden / heads
    "qwen3": Family("Qwen3ForCausalLM", "internvl2_5", {"head_dim": 64}, spare=16),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "internvl2_5",
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        spare=16,
    ),
    # InternVL 2-8B, 2.5-8B
    "internlm2": Family(
        "InternLM2ForCausalLM",
        "internlm2-chat",
        {"bias": False, "rope_scaling": dict(_DYNAMIC), "rms_norm_eps": 1e-5},
    ),
    # InternVL 2-76B
    "llama": Family(
        "LlamaForCausalLM", "Hermes-2", {"attention_bias": False, "rms_norm_eps": 1e-5}, spare=3
    ),
    # InternVL 2.5-38B: InternViT-6B, RMS norms, normalised queries and keys, no qkv bias
    "vit6b": Family(
        "Qwen2ForCausalLM",
        "internvl2_5",
        vision={"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
    ),
}


def make_published(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a tiny published checkpoint to `folder`; returns its config.

    changes: keys of config.json to set, a dotted name for one of a part ("llm_config.vocab_size").
    """
    folder.mkdir(parents=True)
    kind = FAMILIES[family]
    vocabulary = TOKENIZERS[kind.architecture](folder)
    config = make_config(kind, vocabulary + kind.spare, str(dtype).removeprefix("torch."))
    for key, value in (changes or {}).items():
        part, _, leaf = key.rpartition(".")
        (config[part] if part else config)[leaf] = value
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2], "_from": "test"})
    (folder / "modeling_internvl_chat.py").write_text("raise RuntimeError('was run')\n")
    (folder / "configuration_internvl_chat.py").write_text("raise RuntimeError('was run')\n")
    (folder / "README.md").write_text("# a tiny InternVL\n")
    save_weights(folder, make_tensors(config, seed, dtype), shards)
    return config


def make_config(kind: Family, vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json as published, for a model of some hundred thousand parameters."""
    llm = {
        "architectures": [kind.architecture],
        "model_type": _MODEL_TYPES[kind.architecture],
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": False,
        # what transformers 4 wrote into every config
        "top_k": 50,
        "temperature": 1.0,
        "return_dict": True,
        "attn_implementation": "flash_attention_2",
        **kind.llm,
    }
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "initializer_factor": 0.1,
        "initializer_range": 0.02,
        "use_flash_attn": True,
        "torch_dtype": dtype,
        **kind.vision,
    }
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "llm_config": llm,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": kind.template,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }


# ---------------------------------------------------------------------------------- weights


def make_tensors(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights by published name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape, kind in tensor_shapes(config):
        noise = torch.randn(shape, generator=generator)
        if kind == "norm":  # around one, as a scale is
            noise = 1 + 0.1 * noise
        elif kind == "linear":
            noise = noise / math.sqrt(shape[-1])
        elif kind == "patch":
            noise = noise / math.sqrt(math.prod(shape[1:]))
        else:
            noise = 0.3 * noise
        tensors[name] = noise.to(dtype)
    return tensors


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind (norm, linear, patch, other) of every published tensor."""
    vision, llm = config["vision_config"], config["llm_config"]
    yield from _vision_shapes(vision)
    wide = vision["hidden_size"] * int(1 / config["downsample_ratio"]) ** 2
    width = llm["hidden_size"]
    yield "mlp1.0.weight", (wide,), "norm"
    yield "mlp1.0.bias", (wide,), "other"
    for name, size in (("mlp1.1", wide), ("mlp1.3", width)):
        yield f"{name}.weight", (width, size), "linear"
        yield f"{name}.bias", (width,), "other"
    if llm["architectures"] == ["InternLM2ForCausalLM"]:
        yield from _internlm2_shapes(llm)
    else:
        yield from _language_shapes(llm)


def _vision_shapes(vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patch = vision["patch_size"]
    stem = "vision_model.embeddings"
    yield f"{stem}.class_embedding", (1, 1, width), "other"
    yield f"{stem}.patch_embedding.weight", (width, 3, patch, patch), "patch"
    yield f"{stem}.patch_embedding.bias", (width,), "other"
    places = (vision["image_size"] // patch) ** 2 + 1
    yield f"{stem}.position_embedding", (1, places, width), "other"
    for layer in range(vision["num_hidden_layers"]):
        stem = f"vision_model.encoder.layers.{layer}"
        yield f"{stem}.ls1", (width,), "other"
        yield f"{stem}.ls2", (width,), "other"
        for norm in ("norm1", "norm2"):
            yield f"{stem}.{norm}.weight", (width,), "norm"
            if vision["norm_type"] == "layer_norm":
                yield f"{stem}.{norm}.bias", (width,), "other"
        if vision["qk_normalization"]:
            yield f"{stem}.attn.q_norm.weight", (width,), "norm"
            yield f"{stem}.attn.k_norm.weight", (width,), "norm"
        yield f"{stem}.attn.qkv.weight", (3 * width, width), "linear"
        if vision["qkv_bias"]:
            yield f"{stem}.attn.qkv.bias", (3 * width,), "other"
        for name, rows, columns in (
            ("attn.proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            yield f"{stem}.{name}.weight", (rows, columns), "linear"
            yield f"{stem}.{name}.bias", (rows,), "other"


def _internlm2_shapes(llm: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    width, inner, heads = llm["hidden_size"], llm["intermediate_size"], llm["num_attention_heads"]
    fused = (heads + 2 * llm["num_key_value_heads"]) * (width // heads)
    yield "language_model.model.tok_embeddings.weight", (llm["vocab_size"], width), "other"
    for layer in range(llm["num_hidden_layers"]):
        stem = f"language_model.model.layers.{layer}"
        yield f"{stem}.attention.wqkv.weight", (fused, width), "linear"
        yield f"{stem}.attention.wo.weight", (width, width), "linear"
        if llm["bias"]:
            yield f"{stem}.attention.wqkv.bias", (fused,), "other"
            yield f"{stem}.attention.wo.bias", (width,), "other"
        yield f"{stem}.feed_forward.w1.weight", (inner, width), "linear"
        yield f"{stem}.feed_forward.w3.weight", (inner, width), "linear"
        yield f"{stem}.feed_forward.w2.weight", (width, inner), "linear"
        yield f"{stem}.attention_norm.weight", (width,), "norm"
        yield f"{stem}.ffn_norm.weight", (width,), "norm"
    yield "language_model.model.norm.weight", (width,), "norm"
    yield "language_model.output.weight", (llm["vocab_size"], width), "linear"


def _language_shapes(llm: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    width, heads = llm["hidden_size"], llm["num_attention_heads"]
    dim = llm.get("head_dim", width // heads)
    queries, keys = heads * dim, llm["num_key_value_heads"] * dim
    qwen2 = llm["architectures"] == ["Qwen2ForCausalLM"]
    yield "language_model.model.embed_tokens.weight", (llm["vocab_size"], width), "other"
    for layer in range(llm["num_hidden_layers"]):
        stem = f"language_model.model.layers.{layer}"
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{stem}.self_attn.{name}.weight", (rows, width), "linear"
            if qwen2:
                yield f"{stem}.self_attn.{name}.bias", (rows,), "other"
        yield f"{stem}.self_attn.o_proj.weight", (width, queries), "linear"
        if llm["architectures"][0].startswith("Qwen3"):
            yield f"{stem}.self_attn.q_norm.weight", (dim,), "norm"
            yield f"{stem}.self_attn.k_norm.weight", (dim,), "norm"
        yield f"{stem}.input_layernorm.weight", (width,), "norm"
        yield f"{stem}.post_attention_layernorm.weight", (width,), "norm"
        experts, inner = llm.get("num_experts", 0), llm["intermediate_size"]
        if experts:
            yield f"{stem}.mlp.gate.weight", (experts, width), "linear"
            inner = llm["moe_intermediate_size"]
        for owner in [f"mlp.experts.{index}" for index in range(experts)] or ["mlp"]:
            yield f"{stem}.{owner}.gate_proj.weight", (inner, width), "linear"
            yield f"{stem}.{owner}.up_proj.weight", (inner, width), "linear"
            yield f"{stem}.{owner}.down_proj.weight", (width, inner), "linear"
    yield "language_model.model.norm.weight", (width,), "norm"
    if not llm["tie_word_embeddings"]:
        yield "language_model.lm_head.weight", (llm["vocab_size"], width), "linear"


def save_weights(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Safetensors with an index, or one file."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, through safetensors itself."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors
