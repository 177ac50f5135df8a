"""Records for the tests of data: images as bytes, rows, files of rows."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from plain import noise_image

from internvl.data import Quarantine, Row, read_rows

QUESTION = {"id": "q", "question": "<image>\nHow many?", "answer": "3"}


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """The bytes of an image file of 30 x 20 pixels."""
    out = io.BytesIO()
    noise_image(30, 20, seed).save(out, kind)
    return out.getvalue()


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def row(folder: Path, **fields: Any) -> Row:
    return Row({**QUESTION, **fields}, folder / "rows.jsonl", 1, folder)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def read(path: Path, kind: Any = "question", **options: Any) -> list[Row]:
    quarantine = Quarantine(path.with_name("quarantine.jsonl"), max_bad=100)
    return list(read_rows(path, kind=kind, quarantine=quarantine, **options))
