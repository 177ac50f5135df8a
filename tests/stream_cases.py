"""Conversations of every shape for SFT's stream, each told by its number; alone and in packs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plain import Plain, call_processor, noise_image

from internvl.data import Quarantine, Row, read_rows
from internvl.packing import PackedBatch

MAX_TILES = 6
# 1, 2, 3, 4 and 6 tiles (and a thumbnail where there are several), two images, none
PICTURES: list[list[tuple[int, int]]] = [
    [],
    [(56, 56)],
    [(112, 56)],
    [(168, 56)],
    [(112, 112)],
    [(168, 112)],
    [(56, 56), (112, 56)],
]
VIDEO = len(PICTURES)  # of the kinds of rows the one with a video, of FRAMES frames
FRAMES = 3
KINDS = VIDEO + 1
_TOLD = re.compile(r"item (\d+) ?,")


def write_pictures(folder: Path) -> None:
    """What the rows of every kind show; a kind's rows show the same."""
    for kind, sizes in enumerate(PICTURES):
        for place, (width, height) in enumerate(sizes):
            noise_image(width, height, 10 * kind + place).save(folder / f"{kind}-{place}.png")
    (folder / "film").mkdir()
    for frame in range(FRAMES):
        noise_image(60, 40, 100 + frame).save(folder / "film" / f"{frame}.png")


def record(number: int, kind: int, words: int = 4) -> dict[str, Any]:
    """A conversation of two exchanges, its pictures in the second; words: of the last answer."""
    marks = "<video>" if kind == VIDEO else "<image>\n" * len(PICTURES[kind])
    turns = ["What is 4 + 5?", "Final Answer: 9"]
    turns += [f"{marks} item {number} , what is it?", "the red bar is " * (words // 4) + "5."]
    data: dict[str, Any] = {
        "id": str(number),
        "conversations": [
            {"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(turns)
        ],
    }
    if kind == VIDEO:
        return {**data, "video": "film", "num_frames": FRAMES}
    return {**data, "image": [f"{kind}-{place}.png" for place in range(len(PICTURES[kind]))]}


def write_rows(file: Path, kinds: Sequence[int], *, first: int = 0, words: int = 4) -> Path:
    """A row of each kind asked for, numbered from `first`; the answers grow with their place."""
    with file.open("w") as out:
        for place, kind in enumerate(kinds):
            line = record(first + place, kind, words * (1 + place % 4))
            out.write(json.dumps(line) + "\n")
    return file


def rows_of(file: Path, *, checked: bool = True) -> Sequence[Row]:
    return read_rows(file, kind="conversation", quarantine=Quarantine(None), checked=checked)


def told(batches: Iterable[PackedBatch], tokenizer: Any) -> list[int]:
    """The numbers of the samples in some packs; a sample in pieces comes with its first one."""
    found = []
    for batch in batches:
        found += [int(number) for number in _TOLD.findall(tokenizer.decode(batch.input_ids))]
    return found


def plain_row(row: Row, processor: Any) -> Plain:
    """A row by transformers' own processor, all after the first token as one completion."""
    turns = [(turn["from"], row.prompt_text(turn["value"])) for turn in row.data["conversations"]]
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[who], "content": text} for who, text in turns
    ]
    pictures = row.load_images()
    budget = row.num_frames or MAX_TILES  # of a video one tile a frame
    ids, pixels = call_processor(processor, messages, pictures, budget)
    ids = ids[:-1]  # the template's newline after the last turn is never generated
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    end, mask, inside = processor.tokenizer.eos_token_id, [], False
    for place, token in enumerate(ids):
        inside = inside or ids[place - len(start) : place] == start
        mask.append(inside)
        inside = inside and token != end
    return Plain(ids[:1], pixels, [ids[1:]], [mask[1:]])
