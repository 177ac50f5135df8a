"""What training takes of a device's memory: the one model of it, for `internvl info` and a run.

Weights, gradients and optimizer states are counted; activations follow from the shapes, by bytes a
token and layer that were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import InternVLConfig

GIB = 2**30


@dataclass(frozen=True)
class State:
    """What is held whatever the data are.

    weights: bytes of all weights as they lie in memory. parameters: their number. trained: of them
    (an adapter's, too). gradient: bytes of one gradient number. moments: bytes of optimizer states
    for each trained number. copies: other whole models held beside (a reference's). shards: over
    how many devices weights, gradients and optimizer states are cut up.
    """

    weights: float
    parameters: int
    trained: int
    gradient: float = 4
    moments: float = 8
    copies: int = 0
    shards: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Work:
    """What one micro-batch runs: its tokens and tiles, and how.

    vision: the vision tower is trained, and keeps what it needs for that.
    """

    tokens: int
    tiles: int
    checkpointing: bool = True
    vision: bool = True
    bf16: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    engine: float = 0

    @property
    def state(self) -> float:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return sum(vars(self).values())


def estimate(config: InternVLConfig, state: State, work: Work, engine: float = 0) -> Memory:
    """Estimate what training takes on one device, in bytes.

    engine: what a sampler holds beside. Under autocast the weights that are in float32 are there
    once more in bfloat16 while a micro-batch runs. Not counted: the allocator's slack.
    """
    cast = 2 * state.parameters if work.bf16 and state.weights >= 4 * state.parameters else 0
    weights, gradients, optimizer = state.shards
    return Memory(
        weights=(state.weights * (1 + state.copies) + cast) / weights,
        gradients=state.gradient * state.trained / gradients,
        optimizer=state.moments * state.trained / optimizer,
        activations=activation_bytes(
            config,
            tokens=work.tokens,
            tiles=work.tiles,
            checkpointing=work.checkpointing,
            vision=work.vision,
            bf16=work.bf16,
        ),
        logits=_logit_bytes(config, work.tokens),
        engine=engine,
    )


def count_lora(config: InternVLConfig, rank: int) -> int:
    """Adapter parameters of LoRA on every linear layer of the language model.

    The experts of a mixture are one tensor of three dimensions, not linear layers: they get none.
    """
    width, queries, keys, inner = _text_widths(config)
    layer = (width + queries) * 2 + (width + keys) * 2
    if "moe_intermediate_size" not in config.text_config.to_dict():
        layer += 3 * (width + inner)
    return rank * layer * config.text_config.num_hidden_layers


def _text_widths(config: InternVLConfig) -> tuple[int, int, int, int]:
    """(hidden size, query width, key width, width of the MLP that a token passes)."""
    text = config.text_config.to_dict()
    width, heads = text["hidden_size"], text["num_attention_heads"]
    head = text.get("head_dim") or width // heads
    inner = text["intermediate_size"]
    if "moe_intermediate_size" in text:
        inner = text["num_experts_per_tok"] * text["moe_intermediate_size"]
    return width, heads * head, text["num_key_value_heads"] * head, inner


# Bytes that autograd keeps for one token in one layer, for each unit of a width: counted with
# saved_tensors_hooks over tiny models whose widths were varied one at a time (tests/test_info.py
# counts again). (float32, bfloat16 autocast)
_KEPT_HIDDEN, _KEPT_QUERY, _KEPT_KEY, _KEPT_MLP = (25, 28), (26, 15), (8, 2), (16, 8)
_KEPT_QK_NORM = (8, 4)
_KEPT_VISION, _KEPT_VISION_MLP = (42, 28), (8, 4)


def activation_bytes(
    config: InternVLConfig,
    *,
    tokens: int,
    tiles: int,
    checkpointing: bool,
    vision: bool = True,
    bf16: bool = True,
) -> int:
    """Bytes that one micro-batch's forward keeps for its backward.

    checkpointing: only each layer's input is kept (float32), and one layer is whole at a time.
    vision: False where the vision tower is frozen and keeps nothing.
    """
    kind = int(bf16)
    width, queries, keys, inner = _text_widths(config)
    layer = _KEPT_HIDDEN[kind] * width + _KEPT_QUERY[kind] * queries + _KEPT_KEY[kind] * keys
    layer += _KEPT_MLP[kind] * inner
    if config.text_config.model_type.startswith("qwen3"):
        layer += _KEPT_QK_NORM[kind] * (queries + keys)
    layers = config.text_config.num_hidden_layers
    total = tokens * (4 * width * layers + layer if checkpointing else layer * layers)
    if not vision or not tiles:
        return total
    eyes = config.vision_config
    patches = tiles * (math.prod(eyes.image_size) // math.prod(eyes.patch_size) + 1)
    layer = _KEPT_VISION[kind] * eyes.hidden_size + _KEPT_VISION_MLP[kind] * eyes.intermediate_size
    layers = eyes.num_hidden_layers
    kept = 4 * eyes.hidden_size * layers + layer if checkpointing else layer * layers
    return total + patches * kept


def _logit_bytes(config: InternVLConfig, tokens: int) -> int:
    """One chunk of logits, four times: as computed, in float32, and twice in its backward."""
    from internvl.logprobs import MAX_LOGITS

    vocabulary = config.text_config.vocab_size
    return 4 * 4 * min(max(MAX_LOGITS, vocabulary), tokens * vocabulary)
