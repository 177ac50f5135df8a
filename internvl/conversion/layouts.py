"""Tensor names of the two layouts, and how the bytes of one are made of the other's.

    published InternVLChatModel                      HF-native, as save_pretrained writes it
    vision_model.encoder.layers.0.attn.qkv      <->  vision_tower.encoder.layer.0.attention.q_proj,
                                                     k_proj, v_proj (thirds of the rows)
    mlp1.0, mlp1.1, mlp1.3                      <->  multi_modal_projector.layer_norm, linear_1, _2
    language_model.*                            <->  the same names (Qwen2, Qwen3, Qwen3-MoE, LLaMA)
    InternLM2: layers.0.attention.wqkv          <->  LLaMA's q_proj, k_proj, v_proj: for each
                                                     key-value head its queries, its key, its value

The names and shapes that a configuration must have are those of transformers' own model, built
without memory (on the meta device); a tensor that is missing, left over or of another shape is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from internvl.conversion.shards import Segment, Target, TensorInfo
from internvl.errors import UserError

Shapes = dict[str, tuple[int, ...]]
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
INTERNLM2_HEAD = "language_model.output.weight"

# What transformers' modules are called, and what save_pretrained calls them.
_MODULES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_VISION = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
)
_VISION_LAYER = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
_INTERNLM2_LAYER = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Dimensions:
    """What the split of fused tensors depends on; heads of the language model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    internlm2: bool


@dataclass(frozen=True)
class Place:
    """Where an HF tensor lives in the published layout: a tensor, or rows of a fused one.

    rows: (first, last + 1) of the fused tensor's rows, in the order of the HF tensor's rows;
    empty for a tensor that is not fused.
    """

    name: str
    rows: tuple[tuple[int, int], ...] = ()


def hf_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names (save_pretrained's) and shapes of the model that an HF-native config describes."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    with torch.device("meta"):
        skeleton = InternVLForConditionalGeneration(InternVLConfig.from_dict(dict(config)))
    shapes: Shapes = {}
    for name, parameter in skeleton.named_parameters():
        shapes.update(_one_by_one(hf_name(name), tuple(parameter.shape)))
    return shapes


def hf_name(name: str) -> str:
    """A parameter's name as save_pretrained writes it (given either way)."""
    for module, saved in _MODULES:
        if name.startswith(module):
            return saved + name.removeprefix(module)
    return name


def _one_by_one(name: str, shape: tuple[int, ...]) -> Shapes:
    """A mixture's experts are one tensor in transformers' model and one by one on disk.

    The shapes come in the order of the fused tensor's bytes: an expert's gate, then its up.
    """
    parts: Shapes
    if name.endswith(".mlp.experts.gate_up_proj"):
        half = (shape[1] // 2, shape[2])
        parts = {"gate_proj": half, "up_proj": half}
    elif name.endswith(".mlp.experts.down_proj"):
        parts = {"down_proj": shape[1:]}
    else:
        return {name: shape}
    stem, experts = name.rpartition(".")[0], shape[0]
    return {
        f"{stem}.{expert}.{part}.weight": part_shape
        for expert in range(experts)
        for part, part_shape in parts.items()
    }


# -------------------------------------------------------------------------------- one name


def place_of(name: str, shape: tuple[int, ...], dimensions: Dimensions) -> Place:
    """Where the HF tensor `name` (of `shape`) lives in the published layout."""
    if name.startswith("vision_tower."):
        return _vision_place(name.removeprefix("vision_tower."), shape[0])
    if name.startswith("multi_modal_projector."):
        module, _, leaf = name.removeprefix("multi_modal_projector.").partition(".")
        return Place(f"{_PROJECTOR[module]}.{leaf}")
    return _internlm2_place(name, dimensions) if dimensions.internlm2 else Place(name)


def _vision_place(name: str, rows: int) -> Place:
    for ours, theirs in _VISION:
        if name.startswith(ours):
            return Place(f"vision_model.{theirs}{name.removeprefix(ours)}")
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
    assert layer, f"no vision tensor of transformers: {name}"
    stem, module, leaf = f"vision_model.encoder.layers.{layer[1]}.", layer[2], layer[3] or ""
    if part := re.fullmatch(r"attention\.([qkv])_proj", module):
        third = "qkv".index(part[1])
        return Place(f"{stem}attn.qkv{leaf}", ((third * rows, (third + 1) * rows),))
    return Place(f"{stem}{_VISION_LAYER[module]}{leaf}")


def _internlm2_place(name: str, dimensions: Dimensions) -> Place:
    if name == EMBEDDINGS:
        return Place("language_model.model.tok_embeddings.weight")
    if name == HEAD:
        return Place(INTERNLM2_HEAD)
    layer = re.fullmatch(r"(language_model\.model\.layers\.\d+\.)(.+)(\.weight|\.bias)", name)
    if not layer:
        return Place(name)  # the last norm
    stem, module, leaf = layer.groups()
    if part := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return Place(f"{stem}attention.wqkv{leaf}", _wqkv_rows(part[1], dimensions))
    return Place(f"{stem}{_INTERNLM2_LAYER[module]}{leaf}")


def _wqkv_rows(part: str, dimensions: Dimensions) -> tuple[tuple[int, int], ...]:
    """Rows of one part in InternLM2's wqkv: a group is its queries, one key and one value."""
    dim, queries = dimensions.head_dim, dimensions.num_heads // dimensions.num_kv_heads
    first, heads = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[part]
    group = (queries + 2) * dim
    return tuple(
        (head * group + first * dim, head * group + (first + heads) * dim)
        for head in range(dimensions.num_kv_heads)
    )


# ------------------------------------------------------------------------------ whole models


def plan_to_hf(
    source: Mapping[str, TensorInfo], shapes: Shapes, dimensions: Dimensions
) -> list[Target]:
    """The HF-native tensors made of the published ones; every source tensor must be used."""
    places = {name: place_of(name, shape, dimensions) for name, shape in shapes.items()}
    _check_match(source, _chat_shapes(shapes, places))
    targets = []
    for name, place in sorted(places.items()):
        info = source[place.name]
        row = info.row_bytes
        rows = place.rows or ((0, info.shape[0]),)
        segments = tuple(Segment(place.name, start * row, stop * row) for start, stop in rows)
        targets.append(Target(name, TensorInfo(info.dtype, shapes[name]), segments))
    return targets


def plan_to_chat(
    source: Mapping[str, TensorInfo], shapes: Shapes, dimensions: Dimensions
) -> list[Target]:
    """The published tensors made of the HF-native ones.

    Names may be save_pretrained's or those of transformers' modules (save_original_format=False),
    whose mixtures hold all experts in one tensor.
    """
    known, starts = _saved_names(source)
    _check_match(known, shapes)
    places = {name: place_of(name, shape, dimensions) for name, shape in shapes.items()}
    parts_of: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        parts_of.setdefault(place.name, []).append((name, place))
    targets = []
    for chat_name, shape in sorted(_chat_shapes(shapes, places).items()):
        parts = parts_of[chat_name]
        dtypes = {known[name].dtype for name, _ in parts}
        if len(dtypes) > 1:
            raise UserError(f"{sorted(dict(parts))} differ in dtype: {sorted(dtypes)}")
        info = TensorInfo(dtypes.pop(), shape)
        pieces = sorted(piece for name, place in parts for piece in _pieces(name, place, shape[0]))
        segments = []
        for _, name, first, last in pieces:
            actual, start = starts[name]
            row = info.row_bytes
            segments.append(Segment(actual, start + first * row, start + last * row))
        targets.append(Target(chat_name, info, tuple(segments)))
    return targets


def plan_same(source: Mapping[str, TensorInfo], shapes: Shapes) -> list[Target]:
    """The HF-native tensors as they are; names may be given either way, as to `plan_to_chat`."""
    known, starts = _saved_names(source)
    _check_match(known, shapes)
    return [
        Target(name, known[name], (Segment(actual, start, start + known[name].nbytes),))
        for name, (actual, start) in sorted(starts.items())
    ]


def _saved_names(
    source: Mapping[str, TensorInfo],
) -> tuple[dict[str, TensorInfo], dict[str, tuple[str, int]]]:
    """HF tensors by save_pretrained's names, and where each starts: its tensor and a byte."""
    known, starts = {}, {}
    for actual, info in source.items():
        start = 0
        for name, shape in _one_by_one(hf_name(actual), info.shape).items():
            known[name] = TensorInfo(info.dtype, shape)
            starts[name] = (actual, start)
            start += known[name].nbytes
    return known, starts


def _pieces(name: str, place: Place, rows: int) -> Iterable[tuple[int, str, int, int]]:
    """Row in the published tensor, HF name, and rows of the HF tensor that go there."""
    if not place.rows:
        return [(0, name, 0, rows)]
    pieces, done = [], 0
    for start, stop in place.rows:
        pieces.append((start, name, done, done + stop - start))
        done += stop - start
    return pieces


def _chat_shapes(shapes: Shapes, places: Mapping[str, Place]) -> Shapes:
    """Names and shapes of the published layout: a fused tensor has the rows of its parts."""
    chat: Shapes = {}
    for name, place in places.items():
        before = chat.get(place.name)
        rows = shapes[name][0] + (before[0] if before else 0)
        chat[place.name] = (rows, *shapes[name][1:])
    return chat


def _check_match(source: Mapping[str, TensorInfo], expected: Shapes) -> None:
    """Raise `UserError` unless the tensors are exactly those that the config describes."""
    faults = {
        "is missing": sorted(set(expected) - set(source)),
        "has no place in the other layout": sorted(set(source) - set(expected)),
    }
    for fault, names in faults.items():
        if names:
            more = f" (and {len(names) - 1} more: {', '.join(names[1:4])}, ...)" * (len(names) > 1)
            raise UserError(f"tensor {names[0]!r} {fault}{more}: config.json and weights disagree")
    for name, shape in expected.items():
        if source[name].shape != shape:
            raise UserError(
                f"tensor {name!r} is {source[name].shape}, config.json makes it {shape}"
            )
