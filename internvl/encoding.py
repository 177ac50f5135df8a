"""Rows to Examples: the one place where records become ids, tiles, image slots and loss masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl.augmentation import JpegAugmentation, recompress
from internvl.chat import (
    Encoded,
    Message,
    Prompt,
    cut_tiles,
    encode_messages,
    encode_prompt,
    encode_reply,
    prompt_messages,
    render_prompt,
    tile_settings,
)
from internvl.control_tokens import refuse_control_tokens
from internvl.data import Kind, Row
from internvl.data.rows import Sizes, look_at_images
from internvl.errors import DataError
from internvl.packing import Example
from internvl.positions import draw_steps
from internvl.tiling import count_tiles, processor_tile_size

if TYPE_CHECKING:
    from PIL import Image
    from transformers import InternVLProcessor

_ROLES = {"human": "user", "gpt": "assistant"}
_TEXTS = ("system", "question", "chosen", "rejected", "conversations")


def history_messages(row: Row) -> list[Message]:
    """The turns before a pair's question."""
    messages: list[Message] = []
    for turn in row.data.get("history") or []:
        role, text = _ROLES[turn["from"]], turn["value"]
        messages.append(
            {"role": role, "content": row.prompt_text(text) if role == "user" else text}
        )
    return messages


def _draw_key(row: Row) -> str:
    """What all that is drawn for a sample is drawn by: its texts, wherever it lies."""
    texts = [row.data.get(name) for name in _TEXTS]
    return json.dumps(texts + ([row.data["history"]] if row.data.get("history") else []))


def _number(text: str) -> int:
    """A text as a number that torch can hold."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


@dataclass
class Encoder:
    """Encodes rows of any kind with one processor.

    max_tiles: tile budget of a prompt whose row names none. max_length: tokens that a prompt and
    its longest completion may have together. position_steps: how far a visual token moves the
    position on (`internvl.positions`); of several, each image's is drawn by the row's text and
    `seed`. augmentation: of the images of pairs and conversations that are trained on; None for all
    else (evaluation, sampling).
    """

    processor: InternVLProcessor
    max_tiles: int = 12
    max_length: int = 2**31
    position_steps: tuple[float, ...] = (1.0,)
    seed: int = 0
    augmentation: JpegAugmentation | None = None

    def completions(self, row: Row, completions: Sequence[list[int]]) -> Example:
        """A question (or pair) row's prompt with the given completions' ids."""
        return self._example(row, self._prompt(row, row.load_images()), completions)

    def pair(self, row: Row) -> Example:
        """A preference pair: completion 0 is chosen, completion 1 rejected."""
        prompt = self._prompt(row, self._training_images(row), history_messages(row))
        return self._example(row, prompt, self._replies(row, prompt.text))

    def conversation(self, row: Row) -> Example:
        """A conversation: the first user turn is the prompt, all after it one completion.

        Only the assistant's turns (with their end-of-turn token) are scored.
        """
        tiles, counts = cut_tiles(
            self.processor, self._training_images(row), row.tile_budget(self.max_tiles)
        )
        encoded = self._encode_conversation(row, counts)
        first = encoded.loss_mask.index(True)
        return Example(
            encoded.ids[:first],
            tiles,
            [encoded.ids[first:]],
            encoded.image_slots,
            loss_masks=[encoded.loss_mask[first:]],
            slot_steps=self._slot_steps(row, counts),
            draw=_number(f"{self.seed}/{_draw_key(row)}"),
        )

    def augments(self, row: Row) -> bool:
        """Whether a row's images are compressed before they are cut; a video's frames never are."""
        images = bool(row.images) and not row.num_frames
        return images and self.augmentation is not None and self.augmentation.takes(row.augment)

    def _training_images(self, row: Row) -> list[Image.Image]:
        """The images, augmented where that was asked for."""
        images = row.load_images()
        if self.augmentation is None or not self.augments(row):
            return images
        qualities = self.augmentation.draw(len(images), key=_draw_key(row), seed=self.seed)
        return [recompress(*drawn) for drawn in zip(images, qualities, strict=True)]

    def _prompt(
        self, row: Row, images: Sequence[Image.Image], history: Sequence[Message] = ()
    ) -> Prompt:
        return encode_prompt(
            self.processor,
            row.prompt_text(row.data["question"]),
            images,
            row.tile_budget(self.max_tiles),
            row.data.get("system"),
            history,
        )

    def _example(self, row: Row, prompt: Prompt, completions: Sequence[list[int]]) -> Example:
        steps = self._slot_steps(row, prompt.tile_counts)
        return Example(
            prompt.ids, prompt.tiles, list(completions), prompt.image_slots, slot_steps=steps
        )

    def _replies(self, row: Row, prompt: str) -> list[list[int]]:
        """Ids of a pair's completions after the prompt's text."""
        for name in ("chosen", "rejected"):
            refuse_control_tokens(self.processor, row.data[name], name)
        texts = (row.data["chosen"], row.data["rejected"])
        return [encode_reply(self.processor, prompt, text) for text in texts]

    def _encode_conversation(self, row: Row, tile_counts: Sequence[int]) -> Encoded:
        """A conversation up to its last reply; what the template writes after it is left out."""
        system = row.data.get("system")
        refuse_control_tokens(self.processor, system or "", "system")
        messages: list[Message] = prompt_messages("", system)[:-1]
        for number, turn in enumerate(row.data["conversations"]):
            role, text = _ROLES[turn["from"]], turn["value"]
            text = row.prompt_text(text) if role == "user" else text
            refuse_control_tokens(self.processor, text, f"turn {number} of 'conversations'")
            messages.append({"role": role, "content": text})
        encoded = encode_messages(self.processor, messages, tile_counts)
        end = len(encoded.ids) - encoded.loss_mask[::-1].index(True)
        return Encoded(encoded.ids[:end], encoded.loss_mask[:end], encoded.image_slots)

    def _slot_steps(self, row: Row, tile_counts: Sequence[int]) -> list[float] | None:
        """The position step of each image slot, or None where all are 1."""
        if self.position_steps == (1.0,):
            return None
        steps = draw_steps(
            self.position_steps, len(tile_counts), key=_draw_key(row), seed=self.seed
        )
        tokens = [count * self.processor.image_seq_length for count in tile_counts]
        return [step for step, n in zip(steps, tokens, strict=True) for _ in range(n)]

    def length(self, row: Row, kind: Kind, sizes: Sizes | None = None) -> int:
        """Tokens of a row's prompt and longest completion; see `size`."""
        return self.size(row, kind, sizes)[0]

    def size(self, row: Row, kind: Kind, sizes: Sizes | None = None) -> tuple[int, int]:
        """Tokens of a row's prompt and longest completion, and its tiles.

        Of its images only the size is read. sizes: of the images, where they are known.
        """
        sizes = row.image_sizes() if sizes is None else sizes
        without = [0] * len(sizes)  # images of no tile: what is left is the text
        if kind == "conversation":
            text_tokens = len(self._encode_conversation(row, without).ids)
        else:
            question, system = row.prompt_text(row.data["question"]), row.data.get("system")
            history = history_messages(row) if kind == "pair" else []
            prompt = render_prompt(self.processor, question, system, history)
            messages = prompt_messages(question, system, history)
            encoded = encode_messages(self.processor, messages, without, generate=True)
            replies = self._replies(row, prompt) if kind == "pair" else [[]]
            text_tokens = len(encoded.ids) + max(map(len, replies))
        settings = tile_settings(len(sizes), row.tile_budget(self.max_tiles))
        side = processor_tile_size(self.processor.image_processor)
        tiles = sum(
            count_tiles(*size, max_tiles=settings["max_patches"], tile_size=side) for size in sizes
        )
        return text_tokens + tiles * self.processor.image_seq_length, tiles

    def limits(self) -> list[object]:
        """What decides, besides processor and row, whether a row can be trained on."""
        return [self.max_tiles, self.max_length]

    def fault(self, row: Row, kind: Kind, room: int = 0) -> str | None:
        """Why a row cannot be trained on, or None: its images and its length are looked at.

        room: tokens that must be left beside it, for a completion that is yet to be sampled.
        """
        fault, sizes = look_at_images(row)
        return fault or self.length_fault(row, kind, room, sizes)

    def length_fault(
        self, row: Row, kind: Kind, room: int = 0, sizes: Sizes | None = None
    ) -> str | None:
        """Why a row whose images are good cannot be trained on, or None; see `fault`, `size`."""
        try:
            length = self.length(row, kind, sizes)
        except DataError as error:
            return str(error)
        if length + room > self.max_length:
            beside = f" and {room} for its completion" if room else ""
            over = f"over max_length {self.max_length} (never cut; see max_tiles)"
            return f"{length} tokens{beside}, {over}"
        return None
