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
    for each trained number. reference: bytes of a reference that is held beside, to be asked in
    every micro-batch. shards: over how many devices weights, gradients and optimizer states are
    cut up.
    """

    weights: float
    parameters: int
    trained: int
    gradient: float = 4
    moments: float = 8
    reference: float = 0
    shards: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Work:
    """What one micro-batch runs: its tokens and tiles, and how.

    vision: the vision tower is trained, and keeps what it needs for that. entropy: of the scored
    tokens' distributions it is wanted, too. gpu: False where it runs on a CPU.
    """

    tokens: int
    tiles: int
    checkpointing: bool = True
    vision: bool = True
    bf16: bool = True
    entropy: bool = False
    gpu: bool = True


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

    engine: what a sampler holds beside. Under autocast the float32 weights that are trained are
    there once more in bfloat16 while a micro-batch runs (others are cast where they are used, and
    forgotten). A pass before the first step (MPO's reference) takes less than a step: nothing is
    kept for a backward. Not counted: the allocator's slack.
    """
    cast = 2 * state.trained if work.bf16 and state.weights > 2 * state.parameters else 0
    heads = 2 if state.reference else 1  # its logits, beside those that wait for their backward
    weights, gradients, optimizer = state.shards
    return Memory(
        weights=(state.weights + state.reference + cast) / weights,
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
        logits=heads * _logit_bytes(config, work),
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
# counts again), attention by `split`, which keeps queries, keys, values and its output, as flash
# kernels do. (float32, bfloat16 autocast)
_KEPT_HIDDEN, _KEPT_ATTENTION, _KEPT_MLP = (24, 26), (8, 4), (16, 8)
_KEPT_QK_NORM = (8, 6)
_KEPT_EXPERT, _KEPT_EXPERT_MLP = (8, 8), (16, 14)  # for each expert that a token passes
_KEPT_VISION, _KEPT_VISION_MLP = (40, 28), (8, 4)


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
    layer = _KEPT_HIDDEN[kind] * width + _KEPT_ATTENTION[kind] * (queries + keys)
    if config.text_config.model_type.startswith("qwen3"):
        layer += _KEPT_QK_NORM[kind] * (queries + keys)
    if experts := getattr(config.text_config, "num_experts_per_tok", 0):
        layer += _KEPT_EXPERT[kind] * experts * width + _KEPT_EXPERT_MLP[kind] * inner
    else:
        layer += _KEPT_MLP[kind] * inner
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


# Float32 tensors that internvl/logprobs.py makes of a chunk of logits: (alone, with the entropy and
# the sampler's temperature and forbidden ids). A GPU works on all rows of it at once.
_LOGITS_CPU, _LOGITS_GPU = (1, 2), (2, 4)


def _logit_bytes(config: InternVLConfig, work: Work) -> int:
    """One chunk of logits as computed, and what is made of it; in float32 the first is the same."""
    from internvl.logprobs import MAX_LOGITS, MAX_LOGITS_GPU

    vocabulary = config.text_config.vocab_size
    most = MAX_LOGITS_GPU if work.gpu else MAX_LOGITS
    copies = (_LOGITS_GPU if work.gpu else _LOGITS_CPU)[int(work.entropy)]
    numbers = min(max(most, vocabulary), work.tokens * vocabulary)
    computed = 2 if work.bf16 else 4 if work.entropy else 0
    return numbers * (4 * copies + computed)
