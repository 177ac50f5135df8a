"""How likely a model finds the two replies of a pair, given the image: what MPO's losses are of."""

from __future__ import annotations

from pathlib import Path

import torch

from internvl.chat import load_processor, normalize_tiles
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import DataError
from internvl.packing import pack
from internvl.positions import checkpoint_step


class PairScorer:
    """A checkpoint on one device that tells log-probabilities of replies.

    dtype: "auto" is float32 on a CPU and bfloat16 on a GPU. max_tiles: budget of a prompt whose
    row names none.
    """

    def __init__(self, model: str | Path, *, max_tiles: int, dtype: str = "auto"):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "float32" if self._device.type == "cpu" else "bfloat16"
        self._model = load_model(model, dtype=dtype).to(self._device).eval()
        step = checkpoint_step(self._model.config.to_dict())
        processor = load_processor(str(model))
        context = self._model.config.text_config.max_position_embeddings
        self._encoder = Encoder(processor, max_tiles, context, position_steps=(step,))

    @torch.inference_mode()
    def rest_logprobs(self, row: Row) -> tuple[float, float]:
        """Mean log-probability a token of what follows the beginning that both replies share.

        Of the chosen reply, then of the rejected one; their end-of-turn tokens are included. Of the
        tokens that training would see. Raises `DataError` for a row that cannot be trained on.
        """
        if fault := self._encoder.fault(row, "pair"):
            raise DataError(fault)
        example = self._encoder.pair(row)
        shared = shared_beginning(*example.completions)
        batch = pack([example]).on(self._device)
        tiles = (
            batch.tiles if len(batch.tiles) else batch.tiles.new_zeros(1, *batch.tiles.shape[1:])
        )
        pixels = normalize_tiles(self._encoder.processor, tiles).to(self._model.dtype)
        logprobs = self._model(packed=batch, pixel_values=pixels).logprobs
        chosen, rejected = logprobs.split([len(ids) for ids in example.completions])
        return float(chosen[shared:].mean()), float(rejected[shared:].mean())


def shared_beginning(some: list[int], others: list[int]) -> int:
    """How many token ids two replies have in common before they part.

    >>> shared_beginning([1, 2, 3, 9], [1, 2, 4, 9])
    2
    """
    for place, (a, b) in enumerate(zip(some, others, strict=False)):
        if a != b:
            return place
    return min(len(some), len(others))
