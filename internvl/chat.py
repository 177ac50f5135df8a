"""From a question with images to token ids, tiles and image slots: one path for all stages.

    question "<image>\\nHow many?"          render_prompt (what an engine is given: one placeholder
      + images                              an image; vLLM expands it)
         |
         v
    Prompt(ids, tiles, image_slots)         encode_prompt (what the trainer packs: expanded)

The image processor is transformers' own, called with the same settings by trainer and engine, so
that both see bit-equal pixels; here it stops at uint8 and `normalize_tiles` does the rest on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import IMAGE_PLACEHOLDER
from internvl.errors import DataError, UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import InternVLProcessor


@dataclass
class Prompt:
    """An encoded prompt.

    ids: token ids, image placeholders expanded. tiles: uint8 [X, 3, H, W], all images in order.
    """

    ids: list[int]
    tiles: torch.Tensor


def load_processor(path: str) -> InternVLProcessor:
    """The processor (tokenizer, image processor, chat template) of a checkpoint folder."""
    from transformers import AutoProcessor, InternVLProcessor

    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; expected an InternVL checkpoint folder")
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no processor can be loaded from it: {reason}") from None
    if not isinstance(processor, InternVLProcessor):
        raise UserError(
            f"{path}: its processor is {type(processor).__name__}, expected InternVLProcessor "
            "(a checkpoint in the HF-native layout)"
        )
    return processor


def forbidden_token_ids(processor: InternVLProcessor) -> list[int]:
    """Ids that a policy must not sample: an image token in a completion has no image behind it."""
    tokenizer: Any = processor.tokenizer
    tokens = [
        processor.image_token,
        processor.video_token,
        tokenizer.start_image_token,
        tokenizer.end_image_token,
    ]
    ids = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return sorted(ids - {None, tokenizer.unk_token_id})


def eos_token_id(processor: InternVLProcessor) -> int:
    """The id that ends an assistant's turn (`<|im_end|>` in InternVL's template)."""
    eos = processor.tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no eos token, so no completion could ever end")
    return int(eos)


def render_messages(
    processor: InternVLProcessor, messages: list[dict[str, str]], *, generate: bool
) -> str:
    """Messages [{"role", "content"}] through the checkpoint's chat template, as text.

    Each "<image>" becomes one image token (unexpanded). Raises `DataError` when the text already
    holds an image token: it would be taken for an image.
    """
    turns = []
    for message in messages:
        text = message["content"]
        if processor.image_token in text:
            raise DataError(f"the text holds the image token {processor.image_token!r}: {text!r}")
        turns.append({**message, "content": text.replace(IMAGE_PLACEHOLDER, processor.image_token)})
    return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))


def render_prompt(processor: InternVLProcessor, question: str, system: str | None = None) -> str:
    """A question as the unexpanded prompt text that an engine is given."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return render_messages(processor, messages, generate=True)


def cut_tiles(
    processor: InternVLProcessor, images: Sequence[Image.Image], max_tiles: int
) -> tuple[torch.Tensor, list[int]]:
    """Cut RGB images into tiles.

    max_tiles: the budget of the whole prompt; several images share it, max(1, max_tiles // images)
    each (InternVL 2.5), the thumbnail not counted. Returns uint8 tiles [X, 3, H, W] and the number
    of tiles of each image.
    """
    import torch

    image_processor: Any = processor.image_processor
    if not images:
        height, width = image_processor.size["height"], image_processor.size["width"]
        return torch.zeros((0, 3, height, width), dtype=torch.uint8), []
    out = image_processor(
        images=list(images),
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
        **tile_settings(len(images), max_tiles),
    )
    tiles = out["pixel_values"]
    assert tiles.dtype == torch.uint8, f"tiles are {tiles.dtype}, expected uint8"
    return tiles, [int(count) for count in out["num_patches"]]


def tile_settings(num_images: int, max_tiles: int) -> dict[str, Any]:
    """The image processor's keyword arguments for a prompt: trainer and engine share them."""
    return {
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": max(1, max_tiles // max(1, num_images)),
    }


def expand_images(processor: InternVLProcessor, text: str, tile_counts: Sequence[int]) -> str:
    """Replace each image token by `<img>` + 256 context tokens a tile + `</img>`."""
    pieces = text.split(processor.image_token)
    if len(pieces) != len(tile_counts) + 1:
        raise DataError(f"{len(tile_counts)} image(s) but {len(pieces) - 1} placeholder(s): {text}")
    out = [pieces[0]]
    for count, piece in zip(tile_counts, pieces[1:], strict=True):
        context = processor.image_token * (processor.image_seq_length * count)
        out.append(f"{processor.start_image_token}{context}{processor.end_image_token}{piece}")
    return "".join(out)


def encode_text(processor: InternVLProcessor, text: str) -> list[int]:
    """Text to ids; no token is added at either end (the template has written them)."""
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_completion(processor: InternVLProcessor, text: str) -> list[int]:
    """A completion's ids, ended by the end-of-turn token.

    Raises `DataError` when the text holds an image token: there is no image behind it.
    """
    if processor.image_token in text:
        raise DataError(f"the completion holds the image token {processor.image_token!r}: {text!r}")
    return [*encode_text(processor, text), eos_token_id(processor)]


def encode_prompt(
    processor: InternVLProcessor,
    question: str,
    images: Sequence[Image.Image],
    max_tiles: int,
    system: str | None = None,
) -> Prompt:
    """A question with its images as the trainer sees it: expanded ids and uint8 tiles."""
    tiles, counts = cut_tiles(processor, images, max_tiles)
    text = expand_images(processor, render_prompt(processor, question, system), counts)
    return Prompt(encode_text(processor, text), tiles)


def normalize_tiles(processor: InternVLProcessor, tiles: torch.Tensor) -> torch.Tensor:
    """uint8 tiles to the float32 pixels that the vision tower takes, on the tiles' device.

    Bit-equal to what the image processor returns when it normalises by itself.
    """
    image_processor: Any = processor.image_processor
    return image_processor.rescale_and_normalize(
        tiles,
        do_rescale=True,
        rescale_factor=image_processor.rescale_factor,
        do_normalize=True,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
