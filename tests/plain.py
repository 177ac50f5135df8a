"""The plain way that packing is compared with: transformers' own model and processor.

One sequence at a time, padding and prefix sharing nowhere, full logits, log_softmax. Nothing of
internvl.packing, internvl.attention, internvl.logprobs or internvl.encoding is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass
class Plain:
    """A prompt as the processor's own call gives it, and the completions to score after it.

    ids: prompt. pixels: [X, 3, H, W] or None. completions: ids. masks: which tokens are scored.
    """

    ids: list[int]
    pixels: Tensor | None
    completions: list[list[int]]
    masks: list[list[bool]]


def load_plain(folder: Path) -> tuple[Any, Any]:
    """transformers' model (SDPA, float32) and processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    return model.train(), AutoProcessor.from_pretrained(folder)


def call_processor(
    processor: Any, messages: list[dict[str, str]], images: Sequence[Image.Image], max_tiles: int
) -> tuple[list[int], Tensor | None]:
    """Ids and pixels by InternVLProcessor.__call__; "<image>" in a message is one image."""
    turns = [{**m, "content": m["content"].replace("<image>", "<IMG_CONTEXT>")} for m in messages]
    generate = messages[-1]["role"] == "user"
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    out = processor(
        text=[text],
        images=list(images) or None,
        return_tensors="pt",
        crop_to_patches=True,
        min_patches=1,
        max_patches=max(1, max_tiles // max(1, len(images))),
    )
    return out["input_ids"][0].tolist(), out["pixel_values"] if images else None


def plain_logits(model: Any, plain: Plain, completion: list[int]) -> Tensor:
    """Logits [|y|, V] that predict the completion's tokens: transformers' own forward."""
    ids = torch.tensor([plain.ids + completion])
    logits = model(input_ids=ids, pixel_values=plain.pixels, use_cache=False).logits[0]
    return logits[len(plain.ids) - 1 : -1]


def plain_logprobs(
    model: Any, plain: Plain, temperature: float = 1.0, forbidden: Sequence[int] = ()
) -> list[Tensor]:
    """Log-probabilities of each completion's scored tokens."""
    out = []
    for completion, mask in zip(plain.completions, plain.masks, strict=True):
        logits = plain_logits(model, plain, completion).clone() / temperature
        logits[:, list(forbidden)] = -torch.inf
        every = logits.log_softmax(-1)
        scored = every[torch.arange(len(completion)), torch.tensor(completion)]
        out.append(scored[torch.tensor(mask)])
    return out


def gradients(model: torch.nn.Module, *, all_reached: bool = True) -> dict[str, Tensor]:
    """Every parameter's gradient by name, taken away from the model.

    all_reached: whether backward must have reached every parameter (DDP waits for each of them).
    """
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not (all_reached and parameter.grad is None), f"{name} received no gradient"
            gradient = parameter.grad
            out[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            parameter.grad = None
    return out


def gradient_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference in any parameter, relative to that parameter's largest gradient.

    A gradient that is zero in exact arithmetic (the bias of attention keys) is rounding on both
    sides: no scale is taken below a thousandth of the largest of all. Where all of `theirs` are
    zero, ours must be.
    """
    assert ours.keys() == theirs.keys()
    floor = max(1e-3 * max(float(g.abs().max()) for g in theirs.values()), 1e-30)
    return max(
        float((ours[name] - g).abs().max()) / max(float(g.abs().max()), floor)
        for name, g in theirs.items()
    )


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
