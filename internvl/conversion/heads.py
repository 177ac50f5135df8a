"""The language model's head: a matrix of its own, or the embeddings once more.

The first HF-native releases (InternVL3-1B-hf and others, of transformers 4.52) say nothing of
`tie_word_embeddings` at the top of config.json and store a head of its own. transformers 5 takes
the missing key for true; but neither it nor vLLM ties a stored head that differs from the
embeddings, and neither does anything here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl.conversion.layouts import EMBEDDINGS, HEAD, hf_name
from internvl.conversion.shards import Segment, Weights, open_weights

TIED = "tie_word_embeddings"


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """An HF-native config that says that the head is its own, wherever that is read."""
    return {**config, TIED: False, "text_config": {**config["text_config"], TIED: False}}


def same_bytes(weights: Weights, one: str, other: str) -> bool:
    """Whether two tensors are equal in dtype, shape and bytes."""
    info = weights.tensors[one]
    if weights.tensors.get(other) != info:
        return False
    pairs = zip(
        weights.read(Segment(one, 0, info.nbytes)),
        weights.read(Segment(other, 0, info.nbytes)),
        strict=True,
    )
    return all(left == right for left, right in pairs)


def has_own_head(folder: Path) -> bool:
    """Whether an HF-native folder stores a head, and one that differs from the embeddings."""
    weights = open_weights(folder, allow_pickle=False)
    actual = {hf_name(name): name for name in weights.tensors}
    if not {HEAD, EMBEDDINGS} <= set(actual):
        return False
    return not same_bytes(weights, actual[HEAD], actual[EMBEDDINGS])
