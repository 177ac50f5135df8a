"""What a checkpoint is, what an image costs it, and what memory its training will take.

Only config.json and the headers of the safetensors files are read: a 241B is told in a second.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.errors import UserError
from internvl.folders import HF_TYPE, read_config_json
from internvl.memory import GIB, Memory, State, Work, count_lora, estimate
from internvl.parts import PARTS, part_of
from internvl.terminal import print_table

if TYPE_CHECKING:
    from transformers import InternVLConfig


def weight_headers(folder: Path) -> Iterator[tuple[str, list[int], str]]:
    """Yield (name, shape, dtype) of every tensor of a folder, from the headers of its files.

    Raises `UserError` where there is no safetensors file, or a header cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors there, so its weights cannot be counted")
    for file in files:
        with file.open("rb") as raw:
            try:
                (length,) = struct.unpack("<Q", raw.read(8))
                header = json.loads(raw.read(length))
            except (struct.error, ValueError, OverflowError, MemoryError) as error:
                raise UserError(f"{file}: not a safetensors file: {error}") from None
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, entry["shape"], entry["dtype"]


def count_parameters(folder: Path) -> tuple[dict[str, int], set[str]]:
    """({part: parameters}, {dtypes on disk}) of a checkpoint folder in either layout."""
    parts, dtypes = dict.fromkeys(PARTS, 0), set[str]()
    for name, shape, dtype in weight_headers(folder):
        parts[part_of(name)] += math.prod(shape)
        dtypes.add(dtype)
    return parts, dtypes


@dataclass(frozen=True)
class Training:
    """One way to train, as far as memory goes; SFT takes what MPO takes.

    lora_r: rank (None: all weights). vision: the vision tower and the projector are trained, too.
    engine: a vLLM engine holds the weights once more, in bfloat16.
    """

    name: str
    lora_r: int | None = None
    vision: bool = True
    engine: bool = False


TRAININGS = (
    Training("MPO"),
    Training("MPO, LoRA", lora_r=16, vision=False),
    Training("GSPO", vision=False, engine=True),
    Training("GSPO, LoRA", lora_r=16, vision=False, engine=True),
)


def estimate_memory(
    config: InternVLConfig,
    parameters: dict[str, int],
    training: Training,
    *,
    tokens: int,
    tiles: int,
    checkpointing: bool = True,
) -> Memory:
    """Estimate what training takes on one device, in bytes, under bfloat16 autocast and AdamW.

    parameters: by part (`count_parameters`). tokens, tiles: of one micro-batch. All weights:
    float32 weights, gradients and two moments (16 bytes each), and a bfloat16 copy while it runs;
    LoRA: a bfloat16 base and float32 adapters. MPO keeps no second model: its reference's
    log-probabilities are computed once. Not counted: the allocator's slack, the engine's KV cache.
    """
    everything = sum(parameters.values())
    if training.lora_r is not None:
        adapters = count_lora(config, training.lora_r)
        state = State(2 * everything + 4 * adapters, everything + adapters, adapters)
    else:
        trained = everything if training.vision else parameters[PARTS[2]]
        state = State(4 * everything, everything, trained)
    work = Work(tokens, tiles, checkpointing, training.vision)
    return estimate(config, state, work, engine=2 * everything if training.engine else 0)


def print_info(folder: Path, *, images: Sequence[Path], max_tiles: int, tokens: int) -> None:
    """Print what a checkpoint is, what images cost it, and what training it takes.

    images: files whose cost to tell beside the usual sizes. max_tiles: tile budget of a prompt.
    tokens: of a micro-batch.
    """
    config, layout = read_config(folder)
    parameters, dtypes = count_parameters(folder)
    _print_sizes(folder, config, layout, parameters, dtypes)
    _print_images(config, images, max_tiles)
    _print_memory(config, parameters, tokens)


def read_config(folder: Path) -> tuple[InternVLConfig, str]:
    """(the HF-native configuration, "hf" or "chat") of a checkpoint in either layout.

    Raises `UserError` for a folder that holds no InternVL.
    """
    from transformers import InternVLConfig

    from internvl.conversion.published import chat_is_tied, hf_config

    raw = read_config_json(folder)
    if raw["model_type"] == HF_TYPE:
        return InternVLConfig.from_dict(raw), "hf"
    # the ids are the tokenizer's business, and nothing here depends on them
    ids = {"image_token_id": 0, "eos_id": 0, "pad_id": 0}
    return InternVLConfig.from_dict(hf_config(raw, tied=chat_is_tied(raw), **ids)), "chat"


_LAYOUTS = {
    "hf": "HF-native (InternVLForConditionalGeneration)",
    "chat": "published custom code (InternVLChatModel): `internvl convert` makes it HF-native",
}


def _print_sizes(
    folder: Path,
    config: InternVLConfig,
    layout: str,
    parameters: dict[str, int],
    dtypes: set[str],
) -> None:
    text, vision = config.text_config, config.vision_config
    shape = f"{text.num_hidden_layers} layers of {text.hidden_size}"
    rows = [
        ("layout", _LAYOUTS[layout]),
        ("parameters", f"{_count(sum(parameters.values()))} ({', '.join(sorted(dtypes))} on disk)"),
        *((f"  {part}", _count(number)) for part, number in parameters.items()),
        ("language model", f"{text.model_type}, {shape}, vocabulary {text.vocab_size:,}"),
        ("vision tower", f"{vision.num_hidden_layers} layers of {vision.hidden_size}"),
        ("context", f"{text.max_position_embeddings:,} tokens"),
        ("a tile", f"{vision.image_size[0]} px, {config.image_seq_length} tokens"),
    ]
    print_table(str(folder), rows)


def _print_images(config: InternVLConfig, images: Sequence[Path], max_tiles: int) -> None:
    from internvl.images import image_size
    from internvl.tiling import choose_grid, count_tiles

    side = config.vision_config.image_size[0]
    usual = [(side, side), (2 * side, side), (1280, 720), (800, 1300), (1920, 1080), (4000, 3000)]
    sizes = [(f"{width} x {height}", width, height) for width, height in usual]
    sizes += [(str(path), *image_size(path)) for path in images]
    rows = []
    for name, width, height in sizes:
        settings = {"max_tiles": max_tiles, "tile_size": side}
        columns, lines = choose_grid(width, height, **settings)
        tiles = count_tiles(width, height, **settings)
        cut = f"{columns} x {lines}" + (" + thumbnail" if tiles > 1 else "")
        # <img> and </img> stand around the context tokens
        rows.append((name, cut, f"{tiles * config.image_seq_length + 2:,}"))
    title = f"What an image costs, at most {max_tiles} tiles (they are shared by several images)"
    print_table(title, rows, ("image", "tiles", "tokens"), right=(2,))


def _print_memory(config: InternVLConfig, parameters: dict[str, int], tokens: int) -> None:
    # half of the tokens visual is usual for one image a question
    tiles = max(1, tokens // (2 * config.image_seq_length))
    rows = []
    for training in TRAININGS:
        need, without = (
            estimate_memory(
                config, parameters, training, tokens=tokens, tiles=tiles, checkpointing=kind
            )
            for kind in (True, False)
        )
        numbers = (
            need.weights + need.gradients + need.optimizer,
            need.engine,
            need.activations + need.logits,
            need.total,
            without.total,
        )
        rows.append((training.name, *(f"{number / GIB:,.1f}" for number in numbers)))
    columns = ("training", "state", "engine", "activations", "in all", "no checkpointing")
    print_table("Memory of training on one device, in GiB", rows, columns, right=range(1, 6))
    print(
        f"An estimate: unsharded, AdamW, bfloat16 autocast, micro-batches of {tokens:,} tokens and "
        f"{tiles:,} tiles,\ngradient checkpointing. SFT is like MPO; LoRA: rank 16 on the language "
        "model; GSPO: vision frozen,\nthe engine in the same process (its KV cache comes on top)."
    )


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
