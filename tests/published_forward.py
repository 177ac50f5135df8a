"""A forward of the published layout in plain torch, on the published tensors themselves.

Written from the description of the layout, sharing nothing with transformers or the package: ViT
with fused qkv and layer scale, pixel shuffle v2, mlp1, and a causal language model (InternLM2 on
its own wqkv; Qwen2, Qwen3, Qwen3-MoE and LLaMA). One sequence, one tile an image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]


@torch.no_grad()
def published_logits(
    config: dict[str, Any], tensors: Tensors, ids: list[int], pixels: Tensor, image_id: int
) -> Tensor:
    """Logits [T, V] for ids [T]; pixels [X, 3, H, W] fill the places of `image_id` in order."""
    llm = config["llm_config"]
    fused = llm["architectures"] == ["InternLM2ForCausalLM"]
    table = "tok_embeddings" if fused else "embed_tokens"
    tokens = torch.tensor(ids)
    hidden = tensors[f"language_model.model.{table}.weight"][tokens].clone()
    hidden[tokens == image_id] = image_features(config, tensors, pixels).flatten(0, 1)
    for layer in range(llm["num_hidden_layers"]):
        stem = f"language_model.model.layers.{layer}."
        part = {name[len(stem) :]: value for name, value in tensors.items() if stem in name}
        before, after = ("attention_norm", "ffn_norm")
        if not fused:
            before, after = ("input_layernorm", "post_attention_layernorm")
        normed = rms_norm(hidden, part[f"{before}.weight"], llm["rms_norm_eps"])
        hidden = hidden + _attention(llm, part, normed, fused)
        normed = rms_norm(hidden, part[f"{after}.weight"], llm["rms_norm_eps"])
        hidden = hidden + _feed_forward(llm, part, normed, fused)
    hidden = rms_norm(hidden, tensors["language_model.model.norm.weight"], llm["rms_norm_eps"])
    head = "output" if fused else "lm_head"
    name = f"language_model.{head}.weight"
    if name not in tensors:
        name = f"language_model.model.{table}.weight"  # tied
    return hidden @ tensors[name].T


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def linear(part: Tensors, name: str, hidden: Tensor) -> Tensor:
    """x W^T + b, without b where the layer has none."""
    return functional.linear(hidden, part[f"{name}.weight"], part.get(f"{name}.bias"))


# ----------------------------------------------------------------------------------- vision


def image_features(config: dict[str, Any], tensors: Tensors, pixels: Tensor) -> Tensor:
    """Image tokens [X, N, D] of tiles: ViT without its class token, pixel shuffle v2, mlp1."""
    vision = config["vision_config"]
    stem = "vision_model.embeddings."
    size = vision["patch_size"]
    count, _, height, width = pixels.shape
    rows, columns = height // size, width // size
    # a patch as one vector: channel, row, column
    patches = pixels.reshape(count, 3, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    kernel = tensors[f"{stem}patch_embedding.weight"].flatten(1)
    hidden = patches.reshape(count, rows * columns, -1) @ kernel.T
    hidden = hidden + tensors[f"{stem}patch_embedding.bias"]
    start = tensors[f"{stem}class_embedding"].expand(count, 1, -1)
    hidden = torch.cat([start, hidden], 1) + tensors[f"{stem}position_embedding"]
    for layer in range(vision["num_hidden_layers"]):
        stem = f"vision_model.encoder.layers.{layer}."
        part = {name[len(stem) :]: value for name, value in tensors.items() if stem in name}
        mixed = _vision_attention(vision, part, _vision_norm(vision, part, "norm1", hidden))
        hidden = hidden + mixed * part["ls1"]
        inner = linear(part, "mlp.fc1", _vision_norm(vision, part, "norm2", hidden))
        hidden = hidden + linear(part, "mlp.fc2", functional.gelu(inner)) * part["ls2"]
    shuffled = pixel_shuffle(hidden[:, 1:].reshape(count, rows, columns, -1))
    normed = functional.layer_norm(
        shuffled, shuffled.shape[-1:], tensors["mlp1.0.weight"], tensors["mlp1.0.bias"]
    )
    return linear(tensors, "mlp1.3", functional.gelu(linear(tensors, "mlp1.1", normed)))


def pixel_shuffle(grid: Tensor) -> Tensor:
    """[X, R, C, D] to [X, R/2 * C/2, 4 D]: each 2x2 block's features, row by row of the block."""
    count, rows, columns, width = grid.shape
    blocks = grid.reshape(count, rows // 2, 2, columns // 2, 2, width)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(count, rows * columns // 4, 4 * width)


def _vision_norm(vision: dict[str, Any], part: Tensors, name: str, hidden: Tensor) -> Tensor:
    weight, eps = part[f"{name}.weight"], vision["layer_norm_eps"]
    if vision["norm_type"] == "rms_norm":
        return rms_norm(hidden, weight, eps)
    return functional.layer_norm(hidden, weight.shape, weight, part[f"{name}.bias"], eps)


def _vision_attention(vision: dict[str, Any], part: Tensors, hidden: Tensor) -> Tensor:
    count, length, width = hidden.shape
    heads = vision["num_attention_heads"]
    queries, keys, values = linear(part, "attn.qkv", hidden).split(width, -1)
    if vision["qk_normalization"]:  # over all heads together
        queries = rms_norm(queries, part["attn.q_norm.weight"], vision["layer_norm_eps"])
        keys = rms_norm(keys, part["attn.k_norm.weight"], vision["layer_norm_eps"])
    apart = [x.reshape(count, length, heads, -1).transpose(1, 2) for x in (queries, keys, values)]
    scores = apart[0] @ apart[1].transpose(-1, -2) / math.sqrt(width // heads)
    mixed = scores.softmax(-1) @ apart[2]
    return linear(part, "attn.proj", mixed.transpose(1, 2).reshape(count, length, width))


# --------------------------------------------------------------------------------- language


def _attention(llm: dict[str, Any], part: Tensors, hidden: Tensor, fused: bool) -> Tensor:
    """Causal attention over one sequence [T, D]."""
    length, width = hidden.shape
    heads, groups = llm["num_attention_heads"], llm["num_key_value_heads"]
    dim = llm.get("head_dim", width // heads)
    if fused:
        # a group of wqkv's rows: its queries, then one key, then one value
        each = linear(part, "attention.wqkv", hidden).reshape(length, groups, -1, dim)
        queries = each[:, :, :-2].reshape(length, heads, dim)
        keys, values = each[:, :, -2], each[:, :, -1]
    else:
        queries = linear(part, "self_attn.q_proj", hidden).reshape(length, heads, dim)
        keys = linear(part, "self_attn.k_proj", hidden).reshape(length, groups, dim)
        values = linear(part, "self_attn.v_proj", hidden).reshape(length, groups, dim)
    if "self_attn.q_norm.weight" in part:  # Qwen3: each head by itself
        queries = rms_norm(queries, part["self_attn.q_norm.weight"], llm["rms_norm_eps"])
        keys = rms_norm(keys, part["self_attn.k_norm.weight"], llm["rms_norm_eps"])
    queries, keys = rotate(llm, queries, dim), rotate(llm, keys, dim)
    mixed = torch.empty(length, heads, dim)
    future = torch.ones(length, length).triu(1).bool()
    for head in range(heads):
        group = head // (heads // groups)
        scores = queries[:, head] @ keys[:, group].T / math.sqrt(dim)
        mixed[:, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ values[:, group]
    out = "attention.wo" if fused else "self_attn.o_proj"
    return linear(part, out, mixed.reshape(length, heads * dim))


def rotate(llm: dict[str, Any], vectors: Tensor, dim: int) -> Tensor:
    """Rotary positions 0 .. T-1 on [T, heads, dim]: component i turns with component i + dim/2."""
    length = len(vectors)
    theta = llm["rope_theta"]
    scaling, limit = llm["rope_scaling"], llm["max_position_embeddings"]
    if scaling and length > limit:  # "dynamic": a wider base for a longer sequence
        assert scaling["type"] == "dynamic"
        factor = scaling["factor"]
        theta *= (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))
    speeds = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * speeds
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    first, second = vectors[..., : dim // 2], vectors[..., dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _feed_forward(llm: dict[str, Any], part: Tensors, hidden: Tensor, fused: bool) -> Tensor:
    if fused:
        gate, up, down = "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"
        inner = functional.silu(linear(part, gate, hidden)) * linear(part, up, hidden)
        return linear(part, down, inner)
    if not llm.get("num_experts"):
        return _gated(part, "mlp", hidden)
    # the likeliest experts of each token, weighted by their share
    shares = (hidden @ part["mlp.gate.weight"].T).softmax(-1)
    best, chosen = shares.topk(llm["num_experts_per_tok"], -1)
    if llm["norm_topk_prob"]:
        best = best / best.sum(-1, keepdim=True)
    out = torch.zeros_like(hidden)
    for token, experts in enumerate(chosen.tolist()):
        for share, expert in zip(best[token], experts, strict=True):
            out[token] += share * _gated(part, f"mlp.experts.{expert}", hidden[token])
    return out


def _gated(part: Tensors, owner: str, hidden: Tensor) -> Tensor:
    gate = functional.silu(linear(part, f"{owner}.gate_proj", hidden))
    return linear(part, f"{owner}.down_proj", gate * linear(part, f"{owner}.up_proj", hidden))
