"""A frozen vision tower's features: computed once for each image of a rollout batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from internvl.chat import normalize_tiles
from internvl.packing import PackedBatch

if TYPE_CHECKING:
    from training.trainer import PackedTrainer


class FrozenVision:
    """Runs the tower of a trainer's model, and hands on what it made.

    The projector is not part of it: it may learn, and costs next to nothing.
    """

    def __init__(self, trainer: PackedTrainer):
        self._trainer = trainer

    def of_model(self) -> FrozenVision | None:
        """Itself, or None where the tower learns (an adapter on it included) or is sharded.

        Ranks run it another number of times each, and a sharded one gathers weights each time.
        """
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:
            return None
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        learns = any(p.requires_grad and "vision_tower." in n for n, p in model.named_parameters())
        return None if learns else self

    @torch.no_grad()
    def features(self, tiles: Tensor) -> Tensor:
        """Of uint8 tiles [X, 3, H, W]: [X, P, D] on the CPU."""
        if not len(tiles):
            return self.none(0)
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        pixels = normalize_tiles(trainer.processing_class, tiles.to(trainer.args.device))
        with trainer.accelerator.autocast():
            features: Tensor = model(vision_of=pixels).cpu()
        model.train(training)
        return features

    def none(self, tiles: int) -> Tensor:
        """Features of tiles that are not there: zeros."""
        config = self._trainer.accelerator.unwrap_model(self._trainer.model).config
        width = int(config.vision_config.hidden_size / config.downsample_ratio**2)
        return torch.zeros(tiles, self._trainer.processing_class.image_seq_length, width)

    def inputs(self, batch: PackedBatch) -> dict[str, Tensor]:
        """What the packed forward is given instead of pixels; one dummy where there is no image."""
        features = batch.vision_features
        if features is None or not len(features):
            features = self.none(1).to(batch.input_ids.device)
        return {"vision_features": features}
