"""The fixed data and models of benchmarks/sft.py, mpo.py and gspo.py; seeds are named here.

    pairs    32 of one image each with 1, 3, 4, 5 or 6 tiles (two are impossible with a thumbnail),
             answers of 50 to 200 tokens: P 8,180, C 3,915, R 3,877 tokens, 106 tiles in all
    groups   5 (or 3) questions with G answers: 50 to 200 tokens at 1, 3, 4, 5, 6 tiles with G = 8
             or 16, and 300 to 500 tokens at 1, 3, 4 tiles with G = 8
    model    ViT 6 x 192 (257 tokens a tile), Qwen3 6 x 256, vocabulary 8,192, tied, 64 image tokens
             a tile, 9.9 M parameters, drawn from a seed, float32

The seeds of the pairs are the first whose sums are those of the measurements that the goals were
taken from; nothing here may be changed to reach a goal. `GPU_SHAPES` are the language and vision
sizes of InternVL3.5-1B and -2B, for `--device cuda`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from internvl.data import Row

TILES = (1, 3, 4, 5, 6)  # of an image, its thumbnail included
PROMPT_WORDS = (16, 48)
TILE_SEED, PROMPT_SEED, CHOSEN_SEED, REJECTED_SEED = 172, 68, 163, 285
GROUP_SEED, MODEL_SEED = 0, 0


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `vocab` and the like as in its configuration.

    image_size: side of a tile in pixels. text_mlp, vision_mlp: the width inside the MLPs.
    """

    name: str
    image_size: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_mlp: int
    text_layers: int
    text_hidden: int
    text_heads: int
    text_kv_heads: int
    head_dim: int
    text_mlp: int
    vocab: int
    patch: int = 14

    @property
    def patches(self) -> int:
        """Patches of a tile; the vision tower sees one token more."""
        return (self.image_size // self.patch) ** 2

    @property
    def visual_tokens(self) -> int:
        """Tokens of a tile in the language model."""
        return self.patches // 4


SMALL = Shape("9.9M", 224, 6, 192, 3, 768, 6, 256, 4, 2, 64, 768, 8192)
QUICK = replace(SMALL, name="quick", image_size=56, vision_layers=1, text_layers=1, vocab=8192)
GPU_SHAPES = {
    "1b": Shape("InternVL3.5-1B", 448, 24, 1024, 16, 4096, 28, 1024, 16, 8, 128, 3072, 151_936),
    "2b": Shape("InternVL3.5-2B", 448, 24, 1024, 16, 4096, 28, 2048, 16, 8, 128, 6144, 151_936),
}


@dataclass(frozen=True)
class Question:
    """Sizes of one question: tiles of its image, words of its text, tokens of its answers."""

    tiles: int
    words: int
    answers: tuple[int, ...]


def pair_sizes(number: int = 32) -> list[Question]:
    """The fixed pairs; answers are (chosen, rejected), their end-of-turn token included."""
    return _pairs(number, TILES, (50, 200))


def gpu_pair_sizes(number: int) -> list[Question]:
    """Pairs for the shapes of real models: 12 tiles and the thumbnail, answers of 300 to 1,000."""
    return _pairs(number, (13,), (300, 1000))


def _pairs(number: int, tiles: Sequence[int], answers: tuple[int, int]) -> list[Question]:
    drawn_tiles = np.random.default_rng(TILE_SEED).choice(tiles, number)
    words = _draw(PROMPT_SEED, PROMPT_WORDS, number)
    chosen = _draw(CHOSEN_SEED, answers, number)
    rejected = _draw(REJECTED_SEED, answers, number)
    each = zip(drawn_tiles.tolist(), words, chosen, rejected, strict=True)
    return [Question(t, w, (c, r)) for t, w, c, r in each]


def group_sizes(
    generations: int, answers: tuple[int, int], tiles: Sequence[int] = TILES
) -> list[Question]:
    """Questions with `generations` answers each, one for every entry of `tiles`."""
    words = _draw(PROMPT_SEED, PROMPT_WORDS, len(tiles))
    lengths = _draw(GROUP_SEED, answers, generations * len(tiles))
    return [
        Question(t, w, tuple(lengths[n * generations : (n + 1) * generations]))
        for n, (t, w) in enumerate(zip(tiles, words, strict=True))
    ]


def _draw(seed: int, bounds: tuple[int, int], number: int) -> list[int]:
    low, high = bounds
    return [int(n) for n in np.random.default_rng(seed).integers(low, high + 1, number)]


# ---------------------------------------------------------------- texts and pictures

_LETTERS = "abcdefghijklmnopqrst"
WORDS = [f"{a}{b}{c}o" for a in _LETTERS for b in _LETTERS for c in _LETTERS[:8]]  # 3,200


def draw_text(seed: int, words: int) -> str:
    """So many words; each is one token."""
    picked = np.random.default_rng(seed).choice(len(WORDS), words)
    return " ".join(WORDS[i] for i in picked)


def draw_picture(seed: int, tiles: int, side: int) -> Image.Image:
    """Noise that is cut into `tiles` tiles, the thumbnail included."""
    cut = max(1, tiles - 1)
    across = next(n for n in (4, 3, 2, 1) if cut % n == 0) if cut > 5 else cut
    shape = (side * (cut // across), side * across, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def make_rows(questions: Sequence[Question], folder: Path, side: int) -> list[Row]:
    """Rows of kind "pair" (also read as questions), their images written to `folder`.

    A row's data has `answers` too, a text for each of the question's answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, question in enumerate(questions):
        draw_picture(number, question.tiles, side).save(folder / f"{number}.png")
        # the end-of-turn token is the last of an answer's tokens
        answers = [
            draw_text(1000 * (number + 1) + n, length - 1)
            for n, length in enumerate(question.answers)
        ]
        data = {
            "id": str(number),
            "image": f"{number}.png",
            "question": "<image>\n" + draw_text(number, question.words),
            "answer": "5",
            "chosen": answers[0],
            "rejected": answers[1],
            "answers": answers,
        }
        rows.append(Row(data, folder / "rows.jsonl", number + 1, folder))
    return rows


def as_conversations(rows: Sequence[Row]) -> list[Row]:
    """Rows of kind "conversation": each question with its chosen answer."""
    out = []
    for row in rows:
        said = (("human", row.data["question"]), ("gpt", row.data["chosen"]))
        turns = [{"from": who, "value": text} for who, text in said]
        data = {"id": row.data["id"], "image": row.data["image"], "conversations": turns}
        out.append(replace(row, data=data))
    return out


# ---------------------------------------------------------------- models


def make_processor(shape: Shape) -> Any:
    """The processor of the tiny model of cascade/tiny.py with `WORDS` for its vocabulary."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    from cascade.tiny import CHAT_TEMPLATE, IMAGE_MEAN, IMAGE_STD, make_tokenizer

    pixels = {
        "size": {"height": shape.image_size, "width": shape.image_size},
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    # a word at the start of a text, and after a space
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            crop_to_patches=True, min_patches=1, max_patches=12, **pixels
        ),
        tokenizer=make_tokenizer([" " + " ".join(WORDS), *WORDS]),
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=shape.visual_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(shape: Shape, tokenizer: Any) -> Any:
    """InternVLConfig of a shape: Qwen3 behind InternViT, tied embeddings."""
    from transformers import InternVLConfig

    from cascade.tiny import END_OF_TEXT, IM_END, IMAGE_CONTEXT

    vision = {
        "hidden_size": shape.vision_hidden,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "intermediate_size": shape.vision_mlp,
        "attention_bias": True,
        "image_size": shape.image_size,
        "patch_size": shape.patch,
    }
    text = {
        "model_type": "qwen3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.text_hidden,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "num_key_value_heads": shape.text_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.text_mlp,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(IM_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    }
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=shape.visual_tokens,
        tie_word_embeddings=True,
    )


def make_model(shape: Shape, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write a random model of a shape with its processor to `folder`; returns the processor."""
    from transformers import GenerationConfig, InternVLForConditionalGeneration

    processor = make_processor(shape)
    config = make_config(shape, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        model = InternVLForConditionalGeneration(config).to(dtype)
    ids = {"eos_token_id": config.text_config.eos_token_id}
    ids["pad_token_id"] = config.text_config.pad_token_id
    model.config.eos_token_id, model.config.pad_token_id = ids["eos_token_id"], ids["pad_token_id"]
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor
