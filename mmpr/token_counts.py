"""Tokens and tiles of a record, as the trainer and the engine count them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from internvl.data import Row
from internvl.tiling import count_tiles

KEPT_PROMPTS = 4096  # a question's rollouts and pairs mostly stand together


def picture_budget(row: Row, max_tiles: int) -> int:
    """Tiles that each picture of a row may have, the thumbnail not counted; they share the budget.

    max_tiles: where neither the row nor its data set names a budget. A frame of a video has one.
    """
    from internvl.chat import tile_settings

    pictures = row.num_frames or len(row.images)
    return int(tile_settings(pictures, row.tile_budget(max_tiles))["max_patches"])


class TokenCounter:
    """Counts tokens with a checkpoint's processor; of images only the headers are read.

    model: a checkpoint folder. max_tiles: the budget of a prompt that names none.
    """

    def __init__(self, model: Path, max_tiles: int):
        from internvl.chat import load_processor
        from internvl.encoding import Encoder
        from internvl.tiling import processor_tile_size

        self._processor = load_processor(str(model))
        self._encoder = Encoder(self._processor, max_tiles=max_tiles)
        self._tile_size = processor_tile_size(self._processor.image_processor)
        self._prompt = lru_cache(maxsize=KEPT_PROMPTS)(self._count_prompt)

    def count(self, row: Row, kind: str) -> dict[str, int]:
        """{"prompt_tokens", "image_tokens", "tiles", and of each text of the answer} of a row.

        prompt_tokens holds the image tokens. Raises DataError for an image whose header shows that
        it cannot be used, and for text that spells a control token.
        """
        sizes = tuple(row.image_sizes())
        budget = picture_budget(row, self._encoder.max_tiles)
        tiles = sum(
            count_tiles(*size, max_tiles=budget, tile_size=self._tile_size) for size in sizes
        )
        counts = {"tiles": tiles, "image_tokens": tiles * self._processor.image_seq_length}
        if kind == "conversation":
            return {**counts, "tokens": self._encoder.length(row, "conversation", list(sizes))}
        from internvl.encoding import history_messages

        text = row.prompt_text(row.data["question"])
        history = history_messages(row) if kind == "pair" else []
        before = tuple((turn["role"], turn["content"]) for turn in history)
        prompt, opening = self._prompt(text, row.data.get("system"), before, len(sizes))
        counts["prompt_tokens"] = prompt + counts["image_tokens"]
        for name in ("chosen", "rejected"):
            if kind == "pair":
                counts[f"{name}_tokens"] = self._reply(opening, row.data[name], name)
        if kind in ("rollout", "verdict") and not isinstance(row.data.get("token_ids"), list):
            counts["completion_tokens"] = self._reply(opening, row.data["completion"], "completion")
        return counts

    def _count_prompt(
        self, text: str, system: str | None, before: tuple[tuple[str, str], ...], pictures: int
    ) -> tuple[int, str]:
        """(tokens without those of the pictures, rendered text) of a prompt."""
        from internvl.chat import encode_messages, prompt_messages, render_prompt

        history = [{"role": role, "content": said} for role, said in before]
        opening = render_prompt(self._processor, text, system, history)
        messages = prompt_messages(text, system, history)
        encoded = encode_messages(self._processor, messages, [0] * pictures, generate=True)
        return len(encoded.ids), opening

    def _reply(self, opening: str, text: str, name: str) -> int:
        from internvl.chat import encode_reply
        from internvl.control_tokens import refuse_control_tokens

        refuse_control_tokens(self._processor, text, name)
        return len(encode_reply(self._processor, opening, text))
