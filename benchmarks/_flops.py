"""How many floating-point operations a step takes: what a speed-up can be, and no more.

A product of [a, b] and [b, c] counts 2abc. A step is a forward (1) and a backward (2 for a linear
layer: gradients of input and weight; 1 for the patches, whose input needs none; 2.5 for attention,
whose kernels compute the scores once more). Gradient checkpointing runs every layer's forward
again. Norms, activations, softmax, rotary positions and the optimizer count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.data import Shape

BACKWARD = {"patches": 1.0, "attention": 2.5, "linear": 2.0}


@dataclass(frozen=True)
class Work:
    """What a forward is given.

    tiles: through the vision tower. tokens: rows of the language model, padding included. scores:
    pairs of a query and a key that attention computes in one layer. scored: rows of the head.
    head_again: whether the head's logits are computed once more in backward.
    """

    tiles: float
    tokens: float
    scores: float
    scored: float
    head_again: bool = False

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tiles + other.tiles,
            self.tokens + other.tokens,
            self.scores + other.scores,
            self.scored + other.scored,
            self.head_again or other.head_again,
        )


def forward_parts(shape: Shape, work: Work) -> dict[str, float]:
    """Operations of one forward, by part."""
    vision, text = shape.vision_hidden, shape.text_hidden
    rows = work.tiles * (shape.patches + 1)
    query, key = shape.text_heads * shape.head_dim, shape.text_kv_heads * shape.head_dim
    vision_weights = 4 * vision**2 + 2 * vision * shape.vision_mlp
    text_weights = text * (2 * query + 2 * key) + 3 * text * shape.text_mlp
    projector_weights = 4 * vision * text + text**2
    return {
        "patches": 2 * work.tiles * shape.patches * 3 * shape.patch**2 * vision,
        "vision_linear": 2 * rows * shape.vision_layers * vision_weights,
        "vision_attention": 4 * rows * (shape.patches + 1) * vision * shape.vision_layers,
        "projector": 2 * work.tiles * shape.visual_tokens * projector_weights,
        "text_linear": 2 * work.tokens * shape.text_layers * text_weights,
        "text_attention": 4 * work.scores * query * shape.text_layers,
        "head": 2 * work.scored * text * shape.vocab,
    }


def forward_flops(shape: Shape, work: Work) -> float:
    """Operations of a forward without gradients (a reference, old log-probabilities)."""
    return sum(forward_parts(shape, work).values())


def step_flops(
    shape: Shape, work: Work, *, checkpointing: bool = False, frozen_vision: bool = False
) -> float:
    """Operations of forward and backward; frozen_vision: the tower and the projector need none."""
    total = 0.0
    for part, forward in forward_parts(shape, work).items():
        vision = part.startswith(("patches", "vision", "projector"))
        if vision and frozen_vision:
            total += forward
            continue
        kind = part if part == "patches" else part.rpartition("_")[2]
        factor = 1.0 + BACKWARD.get(kind, BACKWARD["linear"])
        layered = part.startswith(("vision_", "text_"))
        if (checkpointing and layered) or (part == "head" and work.head_again):
            factor += 1.0
        total += forward * factor
    return total


def model_flops(shape: Shape, work: Work) -> float:
    """Forward and twice that for backward, nothing computed again: what MFU is counted by."""
    return 3 * forward_flops(shape, work)


def packed_work(prompts: list[int], completions: list[list[int]], tiles: int) -> Work:
    """What a shared prefix needs: each prompt once, and no score that the mask hides.

    prompts: their tokens; completions: the tokens of each prompt's answers.
    """
    tokens = sum(prompts) + sum(map(sum, completions))
    scores = float(sum(p * (p + 1) / 2 for p in prompts))
    for prompt, answers in zip(prompts, completions, strict=True):
        scores += sum(c * prompt + c * (c + 1) / 2 for c in answers)
    return Work(tiles, tokens, scores, sum(map(sum, completions)))


def padded_work(
    rows: int, length: int, tiles: int, scored: int, *, head_again: bool = True
) -> Work:
    """What rows padded to `length` compute: every score, since their mask is a dense one."""
    return Work(tiles, rows * length, float(rows * length**2), scored, head_again)
