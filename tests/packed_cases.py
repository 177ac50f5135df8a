"""Examples of every shape, encoded by us and, apart from that, by transformers' own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from plain import Plain, call_processor, load_plain, noise_image
from torch import Tensor

from internvl.chat import normalize_tiles
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.logprobs import TokenScores
from internvl.packing import Example, PackedBatch

# 56x56: 1 tile; 112x56: 2 and a thumbnail; 168x56: 3 (of a budget of 2: 2); 112x112: 4
MAX_TILES = 4
QUESTIONS: dict[str, tuple[str, list[tuple[int, int]], list[str]]] = {
    "one completion": (
        "<image>\nWhat is the red bar minus the blue bar?",
        [(56, 56)],
        ["The red bar is 5. 5 - 2 = 3. Final Answer: 3"],
    ),
    "three completions": (
        "<image>\nWhat is the sum of the green and yellow bars?",
        [(56, 56)],
        ["Final Answer: 9", "The green bar is 4. The yellow bar is 5. Final Answer: 9", "It"],
    ),
    "no image": ("What is 4 + 5?", [], ["4 + 5 = 9. Final Answer: 9", "Final Answer: 8"]),
    "two images": (
        "<image>\nand <image>\nWhich red bar is it?",
        [(56, 56), (168, 56)],
        ["The red bar is 7.", "It looks clear from the chart. Final Answer: 7"],
    ),
    "many tiles": ("<image>\nWhat is the chart?", [(112, 112)], ["The red bar.", "The blue bar."]),
}
CONVERSATION = [
    ("What is the sum of 4 and 5?", "4 + 5 = 9. Final Answer: 9"),
    ("<image>\nWhat is the red bar?", "The red bar is 3."),
    ("What is the blue bar?", "Final Answer: 2"),
]


class Cases:
    """The examples of QUESTIONS and CONVERSATION, encoded by us and, apart from that, plainly."""

    def __init__(self, folder: Path, images: Path):
        self.plain_model, self.processor = load_plain(folder)
        self.model = load_model(folder).train()
        self.encoder = Encoder(self.processor, MAX_TILES, max_length=4096)
        self.images = images
        self.examples: list[Example] = []
        self.plain: list[Plain] = []
        for question, sizes, texts in QUESTIONS.values():
            self._add_question(question, sizes, texts)
        self._add_conversation()

    def _row(self, data: dict[str, Any], sizes: Sequence[tuple[int, int]]) -> tuple[Row, list[Any]]:
        number = len(self.examples)
        pictures = [noise_image(*size, seed=10 * number + i) for i, size in enumerate(sizes)]
        names = [f"{number}-{i}.png" for i in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(self.images / name)
        return Row({**data, "image": names}, self.images / "rows.jsonl", 1, self.images), pictures

    def _add_question(self, question: str, sizes: list[tuple[int, int]], texts: list[str]) -> None:
        row, pictures = self._row({"question": question}, sizes)
        # the tiny tokenizer looks whole words up, so a text's ids stand alone
        end = self.processor.tokenizer.eos_token_id
        completions = [[*self.processor.tokenizer(text)["input_ids"], end] for text in texts]
        completions[-1].pop()  # the last one was cut before its end
        self.examples.append(self.encoder.completions(row, completions))
        message = {"role": "user", "content": question}
        ids, pixels = call_processor(self.processor, [message], pictures, MAX_TILES)
        masks = [[True] * len(ids) for ids in completions]
        self.plain.append(Plain(ids, pixels, completions, masks))

    def _add_conversation(self) -> None:
        turns = [
            {"from": who, "value": text}
            for exchange in CONVERSATION
            for who, text in zip(("human", "gpt"), exchange, strict=True)
        ]
        row, pictures = self._row({"conversations": turns}, [(112, 56)])
        self.examples.append(self.encoder.conversation(row))
        messages = [
            {"role": role, "content": text}
            for exchange in CONVERSATION
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        ids, pixels = call_processor(self.processor, messages, pictures, MAX_TILES)
        ids = ids[:-1]  # the template's newline after the last turn is never generated
        # no assistant's turn starts at the first token, so all after it may be the completion
        mask = self._answers(ids)
        self.plain.append(Plain(ids[:1], pixels, [ids[1:]], [mask[1:]]))

    def _answers(self, ids: list[int]) -> list[bool]:
        """True from each "<|im_start|>assistant\\n" to its "<|im_end|>"."""
        start = self.processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
        end = self.processor.tokenizer.eos_token_id
        mask, inside = [], False
        for place, token in enumerate(ids):
            inside = inside or ids[place - len(start) : place] == start
            mask.append(inside)
            inside = inside and token != end
        return mask

    def pixels(self, batch: PackedBatch) -> Tensor:
        """As PackedTrainer does it: a black tile where there is none."""
        tiles = batch.tiles if len(batch.tiles) else torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
        return normalize_tiles(self.processor, tiles)

    def score(self, batch: PackedBatch, **options: Any) -> TokenScores:
        return self.model(packed=batch, pixel_values=self.pixels(batch), **options)


def mean_nll(parts: Sequence[Tensor], completions: int) -> Tensor:
    """-1/C sum over completions of their mean log-probability; parts: one tensor a completion."""
    return -sum((part.mean() for part in parts), torch.zeros(())) / completions


def packed_loss(cases: Cases, batch: PackedBatch, completions: int, **options: Any) -> Tensor:
    scores = cases.score(batch, **options)
    return mean_nll(scores.logprobs.split(batch.lengths.tolist()), completions)
