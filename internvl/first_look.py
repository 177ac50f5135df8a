"""One question to a checkpoint about one picture or video: `internvl chat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.data import IMAGE_PLACEHOLDER, Row, image_fault
from internvl.data.records import VIDEO_PLACEHOLDER
from internvl.errors import UserError
from internvl.folders import require_hf_layout

if TYPE_CHECKING:
    from internvl.sampler import Backend

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def is_video(path: Path) -> bool:
    """Whether a path is taken for a video: a folder of frames, or a video file by its name."""
    return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES


def ask(
    model: Path,
    pictures: Sequence[Path],
    question: str,
    *,
    system: str | None,
    max_tiles: int,
    max_tokens: int,
    temperature: float,
    num_frames: int,
    backend: Backend,
    seed: int,
) -> None:
    """Sample one reply and print it; what it cost goes to stderr.

    pictures: images, or one video. A question without placeholders gets one for each picture put
    before it, as InternVL's own code does. Raises `UserError` for what cannot be asked.
    """
    from transformers.utils import logging

    from internvl.sampler import SamplingConfig, open_sampler, request_of

    require_hf_layout(model)
    logging.disable_progress_bar()  # a reply is a line or two
    config = SamplingConfig(temperature=temperature, max_tokens=max_tokens, max_tiles=max_tiles)
    row = _row(pictures, question, num_frames)
    if fault := image_fault(row):  # before a model is loaded
        raise UserError(fault)
    sampler = open_sampler(model, backend=backend, seed=seed)
    try:
        [[completion]] = sampler.sample([request_of(row, seed)], config)
    finally:
        sampler.close()
    print(completion.text)
    cut = f", cut at {max_tokens}" if completion.finish_reason == "length" else ""
    print(f"{len(completion.token_ids)} tokens{cut}", file=sys.stderr)


def _row(pictures: Sequence[Path], question: str, num_frames: int) -> Row:
    """The question as a record, the pictures by their full paths."""
    videos = [path for path in pictures if is_video(path)]
    if videos and len(pictures) > 1:
        raise UserError(f"{videos[0]} is a video; it is asked about alone, without other pictures")
    names = [str(path.resolve()) for path in pictures]
    data: dict[str, object] = {"id": "chat", "question": question, "answer": ""}
    if videos:
        if VIDEO_PLACEHOLDER not in question:
            data["question"] = f"{VIDEO_PLACEHOLDER}\n{question}"
        data |= {"video": names[0], "num_frames": num_frames}
    else:
        if IMAGE_PLACEHOLDER not in question:
            data["question"] = _placeholders(len(names)) + question
        data["image"] = names
    return Row(data, Path("the command line"), 1, Path("/"))


def _placeholders(count: int) -> str:
    """One image: "<image>"; several: "Image-1: <image>" and so on, a line each (InternVL's)."""
    if count == 1:
        return f"{IMAGE_PLACEHOLDER}\n"
    return "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, count + 1))
