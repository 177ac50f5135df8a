"""Rows to Examples: the one place where records become ids, tiles, image slots and loss masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl.chat import (
    cut_tiles,
    encode_completion,
    encode_prompt,
    encode_text,
    eos_token_id,
    expand_images,
    render_messages,
    render_prompt,
    tile_settings,
)
from internvl.data import Kind, Row, image_fault
from internvl.errors import DataError
from internvl.packing import Example

if TYPE_CHECKING:
    from transformers import InternVLProcessor

_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Encoder:
    """Encodes rows of any kind with one processor.

    max_tiles: tile budget of a prompt. max_length: tokens that a prompt and its longest completion
    may have together.
    """

    processor: InternVLProcessor
    max_tiles: int = 12
    max_length: int = 2**31

    def completions(self, row: Row, completions: Sequence[list[int]]) -> Example:
        """A question (or pair) row's prompt with the given completions' ids."""
        prompt = encode_prompt(
            self.processor,
            row.prompt_text(row.data["question"]),
            row.load_images(),
            row.tile_budget(self.max_tiles),
            row.data.get("system"),
        )
        return Example(prompt.ids, prompt.tiles, list(completions), self._slots(prompt.ids))

    def pair(self, row: Row) -> Example:
        """A preference pair: completion 0 is chosen, completion 1 rejected."""
        texts = (row.data["chosen"], row.data["rejected"])
        return self.completions(row, [encode_completion(self.processor, text) for text in texts])

    def conversation(self, row: Row) -> Example:
        """A conversation: the first user turn is the prompt, all after it one completion.

        Only the assistant's turns (with their end-of-turn token) are scored.
        """
        tiles, counts = cut_tiles(
            self.processor, row.load_images(), row.tile_budget(self.max_tiles)
        )
        remaining = list(counts)
        context, completion, mask = [], [], []
        for turn, (text, answer) in enumerate(self._turns(row)):
            here = [remaining.pop(0) for _ in range(text.count(self.processor.image_token))]
            ids = encode_text(self.processor, expand_images(self.processor, text, here))
            reply = encode_completion(self.processor, answer)
            if turn == 0:
                context = ids
            else:
                completion += ids
                mask += [False] * len(ids)
            completion += reply
            mask += [True] * len(reply)
        masked_ids = [
            token if not keep else -1 for token, keep in zip(completion, mask, strict=True)
        ]
        slots = self._slots(context + masked_ids)
        return Example(context, tiles, [completion], slots, loss_masks=[mask])

    def _slots(self, ids: Sequence[int]) -> list[int]:
        image_token_id = self.processor.image_token_id
        return [position for position, token in enumerate(ids) if token == image_token_id]

    def _turns(self, row: Row) -> list[tuple[str, str]]:
        """(unexpanded text before the reply, reply) of each exchange."""
        system = row.data.get("system")
        messages = [{"role": "system", "content": system}] if system else []
        eos = self.processor.tokenizer.convert_ids_to_tokens(eos_token_id(self.processor))
        turns, before = [], ""
        for turn in row.data["conversations"]:
            is_reply = turn["from"] == "gpt"
            content = turn["value"] if is_reply else row.prompt_text(turn["value"])
            messages.append({"role": _ROLES[turn["from"]], "content": content})
            if not is_reply:
                continue
            text = render_messages(self.processor, messages[:-1], generate=True)
            if not text.startswith(before):
                raise DataError(
                    f"{row.file}:{row.line}: the chat template rewrites earlier turns, so a "
                    "conversation of several turns cannot be trained in one piece"
                )
            turns.append((text[len(before) :], turn["value"]))
            before = text + turn["value"] + str(eos)
        return turns

    def length(self, row: Row, kind: Kind) -> int:
        """Tokens of a row's prompt and longest completion; of its images only the size is read."""
        if kind == "conversation":
            text_tokens = sum(
                len(encode_text(self.processor, text)) + len(encode_completion(self.processor, end))
                for text, end in self._turns(row)
            )
        else:
            prompt = render_prompt(
                self.processor, row.prompt_text(row.data["question"]), row.data.get("system")
            )
            longest = 0
            if kind == "pair":
                ends = (row.data["chosen"], row.data["rejected"])
                longest = max(len(encode_completion(self.processor, end)) for end in ends)
            text_tokens = len(encode_text(self.processor, prompt)) + longest
        sizes = row.image_sizes()
        settings = tile_settings(len(sizes), row.tile_budget(self.max_tiles))
        visual = 0
        for width, height in sizes:
            tiles = self.processor.image_processor.get_number_of_image_patches(
                height, width, settings
            )
            # the placeholder itself was counted as text; <img> and </img> are added
            visual += tiles * self.processor.image_seq_length + 1
        return text_tokens + visual

    def fault(self, row: Row, kind: Kind, room: int = 0) -> str | None:
        """Why a row cannot be trained on, or None: its images and its length are looked at.

        room: tokens that must be left beside it, for a completion that is yet to be sampled.
        """
        if fault := image_fault(row):
            return fault
        try:
            length = self.length(row, kind)
        except DataError as error:
            return str(error)
        if length + room > self.max_length:
            beside = f" and {room} for its completion" if room else ""
            over = f"over max_length {self.max_length} (never cut; see max_tiles)"
            return f"{length} tokens{beside}, {over}"
        return None
