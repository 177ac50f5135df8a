"""The InternVL that is trained: transformers' model with one more way to call it, packed.

`model(packed=batch, pixel_values=...)` runs the vision tower once over the batch's tiles, the
language model once over the packed row, and the head over completion tokens only, all inside
`forward`, so that the hooks of DDP, FSDP and DeepSpeed fire. Called otherwise, it is transformers'
own model. The class keeps the name of its parent: a checkpoint names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from internvl.attention import AUTO, SHARED_PREFIX
from internvl.errors import UserError
from internvl.logprobs import ScoringHead, TokenScores, WithEntropy, score_tokens
from internvl.packing import PackedBatch


class InternVLForConditionalGeneration(transformers.InternVLForConditionalGeneration):
    """transformers' InternVL with a packed forward that returns log-probabilities.

    attention_backend: how a packed row's attention is computed (`internvl.attention`); may be set.
    liger_head: whether Liger's function scores the tokens where it can (`internvl.logprobs`).
    """

    attention_backend: str = AUTO
    liger_head: bool = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: weights have the parent's names, so transformers' name conversions apply."""
        return False

    def forward(
        self,
        *args: Any,
        packed: PackedBatch | None = None,
        vision_of: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' forward, or `score_packed`, or `vision_features`, as is asked for."""
        if vision_of is not None:
            return self.vision_features(vision_of)
        if packed is None:
            return super().forward(*args, **kwargs)
        # PEFT passes every argument of transformers' forward on, most of them as None
        given = {name: value for name, value in kwargs.items() if value is not None}
        return self.score_packed(packed, *args, **given)

    def score_packed(
        self,
        packed: PackedBatch,
        pixel_values: Tensor | None = None,
        *,
        vision_features: Tensor | None = None,
        temperature: float = 1.0,
        forbidden: Sequence[int] = (),
        with_entropy: WithEntropy = False,
        max_logits: int | None = None,
    ) -> TokenScores:
        """Log-probabilities of a micro-batch's scored tokens.

        packed: on the model's device. pixel_values: float [X, 3, H, W], the batch's tiles
        normalised; a batch without images brings one dummy tile, whose features are used times
        zero, so that every rank's backward reaches every parameter. vision_features: [X, P, D],
        what `vision_features` made of them before, instead of pixel_values.
        """
        if vision_features is None:
            features = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        else:
            features = self.model.multi_modal_projector(vision_features.to(self.dtype))
        features = features.flatten(0, 1)
        embeds = self.get_input_embeddings()(packed.input_ids)
        if len(packed.image_positions):
            if len(packed.image_positions) != len(features):
                raise UserError(
                    f"{len(packed.image_positions)} image slots but {len(features)} image features"
                )
            embeds = embeds.index_copy(0, packed.image_positions, features.to(embeds.dtype))
        else:
            embeds = embeds + 0.0 * features.sum().to(embeds.dtype)
        if packed.position_ids.dtype not in (torch.int64, torch.float32):
            raise UserError(
                f"positions came as {packed.position_ids.dtype}, which rounds fractions of a "
                "step: turn off the casting of a module's inputs (FSDP, DeepSpeed)"
            )
        hidden = self.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=packed.position_ids[None],
            attention_mask=None,
            use_cache=False,
            layout=packed.layout,
            attention_backend=self.attention_backend,
        ).last_hidden_state[0]
        return score_tokens(
            hidden.index_select(0, packed.sources),
            packed.targets,
            self.lm_head,
            temperature=temperature,
            forbidden=forbidden,
            with_entropy=with_entropy,
            vocab_size=self.config.text_config.vocab_size,
            max_logits=max_logits,
            liger=self.liger_head,
        )

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """What the projector is given: pixels [X, 3, H, W] -> [X, P, D], P visual tokens a tile.

        Where the vision tower is frozen they never change and can be kept.
        """
        layer = self.config.vision_feature_layer
        tower = self.model.vision_tower
        out = tower(pixel_values=pixel_values.to(self.dtype), output_hidden_states=layer != -1)
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default":
            hidden = hidden[:, 1:]  # without the class token
        side = math.isqrt(hidden.shape[1])
        grid = hidden.unflatten(1, (side, side))
        ratio = self.config.downsample_ratio
        return self.model.pixel_shuffle(grid, scale_factor=ratio).flatten(1, 2)


def adopt(model: torch.nn.Module) -> InternVLForConditionalGeneration:
    """Give transformers' InternVL the packed forward, in place (weights and layout are the same).

    Raises `UserError` for any other model.
    """
    if not isinstance(model, transformers.InternVLForConditionalGeneration):
        raise UserError(
            f"the model is {type(model).__name__}, expected InternVLForConditionalGeneration"
        )
    if not isinstance(model, InternVLForConditionalGeneration):
        model.__class__ = InternVLForConditionalGeneration
    if type(model.lm_head) is torch.nn.Linear:
        model.lm_head.__class__ = ScoringHead
    assert isinstance(model, InternVLForConditionalGeneration)
    if model.config.text_config._attn_implementation != SHARED_PREFIX:
        model.set_attn_implementation({"text_config": SHARED_PREFIX, "vision_config": "sdpa"})
    return model


@contextmanager
def plain_attention(model: InternVLForConditionalGeneration) -> Iterator[None]:
    """While open, the language model attends by SDPA, as transformers' own forward needs."""
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": SHARED_PREFIX, "vision_config": "sdpa"})
