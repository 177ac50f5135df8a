"""Small pictures inside an HTML page, with the cuts that the tiling makes.

    image -> grid (internvl.tiling) -> at most `side` pixels -> data URI, and where the cuts lie

A page that shows a cut draws lines over its picture: the picture itself stays as it is.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl.tiling import TILE_SIZE, choose_grid

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_SIDE = 512  # pixels; such a photograph takes some 30 kB
THUMBNAIL_BYTES = 42_000  # at most, before base64: 300 of them are 17 MB of a page
_SMALL_PNG = 20_000  # bytes up to which a picture keeps every pixel
_LEAST_SIDE = 64  # pixels; no picture is made smaller than that for its bytes
_QUALITIES = (78, 55, 30)  # of WebP


@dataclass(frozen=True)
class Thumbnail:
    """A picture to be shown.

    uri: its data URI. width, height: of what is shown. size: (width, height) of the original, in
    pixels. grid: (columns, rows) of its tiles; None where it is not cut (a frame of a video).
    """

    uri: str
    width: int
    height: int
    size: tuple[int, int]
    grid: tuple[int, int] | None

    @property
    def cuts(self) -> list[tuple[str, float]]:
        """Where the cuts lie: ("x" or "y", percent of the width or height)."""
        if self.grid is None:
            return []
        columns, rows = self.grid
        vertical = [("x", 100 * number / columns) for number in range(1, columns)]
        return vertical + [("y", 100 * number / rows) for number in range(1, rows)]

    @property
    def tiles(self) -> int:
        """Tiles that the model sees, the thumbnail of a cut picture included."""
        if self.grid is None:
            return 1
        cells = self.grid[0] * self.grid[1]
        return cells + (cells > 1)

    @property
    def tiling(self) -> str:
        """The tiles in words."""
        if self.grid is None or self.grid == (1, 1):
            return "1 tile"
        return f"{self.grid[0]} x {self.grid[1]} tiles + thumbnail"


def make_thumbnail(
    image: Image.Image,
    *,
    max_tiles: int | None,
    tile_size: int = TILE_SIZE,
    side: int = THUMBNAIL_SIDE,
    most_bytes: int = THUMBNAIL_BYTES,
) -> Thumbnail:
    """An RGB picture with its tiles, at most `side` pixels wide and high.

    max_tiles: of this picture (None: it is not cut, and is one tile). most_bytes: of the encoded
    picture; one that is richer (noise) is shown coarser, then smaller.
    """
    size, grid = image.size, None
    if max_tiles is not None:
        grid = choose_grid(*size, max_tiles=max_tiles, tile_size=tile_size)
    small = image.copy()
    small.thumbnail((side, side))
    kind, data = "png", _encoded(small, "PNG", optimize=True) if small.size == size else b""
    if not data or len(data) > min(_SMALL_PNG, most_bytes):
        kind, small, data = "webp", *_as_webp(small, most_bytes)
    text = base64.b64encode(data).decode("ascii")
    return Thumbnail(f"data:image/{kind};base64,{text}", *small.size, size, grid)


def _as_webp(picture: Image.Image, most_bytes: int) -> tuple[Image.Image, bytes]:
    """The picture as it is shown, and its bytes."""
    while True:
        for quality in _QUALITIES:
            data = _encoded(picture, "WEBP", quality=quality)
            if len(data) <= most_bytes or max(picture.size) <= _LEAST_SIDE:
                return picture, data
        picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
