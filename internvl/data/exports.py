"""Records on their way out: what JSON cannot hold becomes text, and image bytes become files."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from internvl.data.quarantine import json_value
from internvl.data.rows import Row
from internvl.errors import DataError
from internvl.images import FORMATS

IMAGES_FOLDER = "images"  # beside the output
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "DIB": "bmp"}


def portable_record(
    row: Row, output: Path, root: Path | None = None, *, write: bool = True
) -> dict[str, Any]:
    """The record for a JSONL file `output`, with the tile budget of its data set.

    Image bytes (with any other image of the row) are written as they are into `images/` beside the
    output, named by their SHA-256, and the record holds their paths from there. Without bytes,
    paths stay; those of a row with another image root than `root` are written from `root`.
    write: False only names the files. Raises `DataError` for other bytes, or an image that is none.
    """
    record = {name: _plain(name, value) for name, value in row.data.items() if name != "image"}
    if row.images:
        record["image"] = _image_field(row, output.parent, root, write=write)
    if row.video_source() is not None:
        record["video"] = _from(root, row.image_root, row.data["video"])
    if row.max_tiles is not None:
        record.setdefault("max_tiles", row.max_tiles)
    return record


def _plain(name: str, value: object) -> object:
    if isinstance(value, bytes):
        raise DataError(f"field {name!r} holds {len(value)} bytes, which JSON cannot hold")
    return json_value(value)


def _image_field(row: Row, folder: Path, root: Path | None, *, write: bool) -> str | list[str]:
    if any(isinstance(image, bytes) for image in row.images):
        names = [os.path.relpath(path, folder) for path in store_images(row, folder, write=write)]
    else:
        names = [_from(root, row.image_root, str(image)) for image in row.images]
    return names if isinstance(row.data["image"], list) else names[0]


def _from(root: Path | None, own_root: Path, name: str) -> str:
    """A path as it is written for readers that start from `root`."""
    if root is None or own_root == root or os.path.isabs(name):
        return name
    return os.path.relpath(own_root / name, root)


def store_images(row: Row, folder: Path, *, write: bool = True) -> list[Path]:
    """Write a row's images as they are into `folder/images`, each once; returns their files.

    write: False only names the files. Raises `DataError` for bytes that are no image.
    """
    return [
        _store(source if isinstance(source, bytes) else source.read_bytes(), folder, write)
        for source in row.image_sources()
    ]


def _store(encoded: bytes, folder: Path, write: bool) -> Path:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            kind = image.format or ""
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image of {len(encoded)} bytes: {error}") from None
    name = f"{hashlib.sha256(encoded).hexdigest()[:32]}.{_ENDINGS.get(kind, kind.lower())}"
    path = folder / IMAGES_FOLDER / name
    if write and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{name}.{os.getpid()}.partial")
        partial.write_bytes(encoded)
        partial.replace(path)
    return path
