"""Dynamic tiling, as InternVL has it from 1.5 on: which grid an image gets, and its tiles.

    800x1300 -> 2 columns x 3 rows: resized to 896x1344, cut into 6 tiles, plus a thumbnail

The grid (InternVL 1.5, arXiv 2404.16821, section 3.1): of all grids of min_tiles to max_tiles tiles
the one whose aspect ratio is closest to the image's, smaller ones first; on a tie a larger grid is
taken only where the image's area is over half of that grid's area. Grids of equal size that tie are
taken in the order of their columns, as in transformers and so in vLLM. The published training code
goes through a set there; with min_tiles=1 the order decides nothing, because a square or flatter
grid is always closer (proven in tests/test_tiling.py for every budget up to 40 tiles).

There is one path, and it is exact: bit-equal to transformers' GotOcr2ImageProcessor, which vLLM
runs for this model, for the same kernel does the work (torch's antialiased bicubic resize of uint8,
first along the rows, then along the columns). It is faster because an image goes through in strips
that fit the cache: each leaves Pillow once, without a copy, and is narrowed at once to the width of
the grid and to that of the thumbnail; no array of the whole image in full size is ever built. What
is left is mostly the JPEG's decoding (benchmarks/preprocess.py has both, and what is gained).

Decoding at a reduced size (libjpeg's scaled DCT) is not offered. On photographs of 12 megapixels
with noise and text it moved pixels of the tiles by up to 15/255 (1 tile) and 60/255 (12 tiles), by
8/255 even where half the size is still 4 times that of the one tile: the engine would not see the
same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from internvl.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

TILE_SIZE = 448  # pixels a side, of every published checkpoint
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
_STRIP_PIXELS = 1 << 20  # 4 MiB: stays in the cache, and makes few strips of an image


@lru_cache(maxsize=256)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of every grid that is allowed, smaller ones first."""
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(f"min_tiles={min_tiles}, max_tiles={max_tiles}: give 1 <= min <= max")
    sides = range(1, max_tiles + 1)
    grids = [(i, j) for i in sides for j in sides if min_tiles <= i * j <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = TILE_SIZE
) -> tuple[int, int]:
    """Columns and rows that an image of width x height pixels is cut into.

    >>> choose_grid(800, 1300)
    (2, 3)
    """
    if width < 1 or height < 1:
        raise UserError(f"an image of {width}x{height} pixels has no tiles")
    ratio, area = width / height, width * height
    best, closest = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        # the very expressions of the published code: other roundings would find other ties
        large = area > 0.5 * tile_size * tile_size * columns * rows
        if distance < closest or (distance == closest and large):
            best, closest = (columns, rows), distance
    return best


def count_tiles(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = TILE_SIZE
) -> int:
    """Tiles of an image, the thumbnail of a cut one included.

    >>> count_tiles(800, 1300)
    7
    """
    columns, rows = choose_grid(
        width, height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size
    )
    return columns * rows + (columns * rows > 1)


def processor_tile_size(image_processor: Any) -> int:
    """Side of a tile in pixels, from a checkpoint's image processor.

    Raises `UserError` where its settings ask for other pixels than `cut_images` makes.
    """
    height, width = image_processor.size["height"], image_processor.size["width"]
    resample, resizes = image_processor.resample, image_processor.do_resize
    if height != width or resample != _BICUBIC or not resizes:
        raise UserError(
            f"preprocessor_config.json: size is {height}x{width}, resample {resample}, do_resize "
            f"{resizes}; InternVL's tiles are square, resample {_BICUBIC} (bicubic), do_resize true"
        )
    return int(height)


def cut_images(
    images: Sequence[Image.Image],
    *,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = TILE_SIZE,
) -> tuple[torch.Tensor, list[int]]:
    """Cut RGB images into tiles, row by row, each cut image's thumbnail behind its tiles.

    min_tiles, max_tiles: of each image, the thumbnail not counted. Returns uint8
    [X, 3, tile_size, tile_size] and the number of tiles of each image.
    """
    grids = [
        choose_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
        for image in images
    ]
    counts = [columns * rows + (columns * rows > 1) for columns, rows in grids]
    tiles = _empty(sum(counts), 3, tile_size, tile_size)
    parts = tiles.split(counts)
    for image, grid, part in zip(images, grids, parts, strict=True):
        _cut(image, grid, part)
    return tiles, counts


def _cut(image: Image.Image, grid: tuple[int, int], out: torch.Tensor) -> None:
    """Resize one image for its grid and for its thumbnail, and write both into out [X, 3, T, T]."""
    if image.mode != "RGB":
        raise UserError(f"an image of mode {image.mode!r}; expected 'RGB' (see load_image)")
    columns, rows = grid
    size, cells = out.shape[-1], columns * rows
    columns_of_rows = out[:cells].view(rows, columns, 3, size, size)
    narrow = _narrow(image, columns, size)
    for column in range(columns):
        whole = _resize(narrow[column : column + 1].permute(0, 3, 1, 2), rows * size, size)
        columns_of_rows[:, column] = whole[0, :3].view(3, rows, size, size).permute(1, 0, 2, 3)
    if cells > 1:
        out[cells] = _resize(narrow[-1:].permute(0, 3, 1, 2), size, size)[0, :3]


def _narrow(image: Image.Image, columns: int, size: int) -> torch.Tensor:
    """The image's rows resized, its height as it is: uint8 [columns (+ 1), H, size, 4].

    One block a column of the grid, then the thumbnail's (in a grid of one column it is the same).
    The fourth channel is Pillow's padding: carrying it along is cheaper than packing three.
    """
    width, height = image.size
    step = max(1, _STRIP_PIXELS // width)
    blocks = _empty(columns + (columns > 1), height, size, 4)
    for top in range(0, height, step):
        bottom = min(height, top + step)
        strip = image.crop((0, top, width, bottom))
        pixels = _memory(strip).view(1, bottom - top, width, 4).permute(0, 3, 1, 2)
        grid = _resize(pixels, bottom - top, columns * size)[0].permute(1, 2, 0)
        by_column = grid.reshape(bottom - top, columns, size, 4).permute(1, 0, 2, 3)
        blocks[:columns, top:bottom] = by_column
        if columns > 1:
            blocks[columns, top:bottom] = _resize(pixels, bottom - top, size)[0].permute(1, 2, 0)
    return blocks


def _memory(strip: Image.Image) -> torch.Tensor:
    """A picture's own memory, without a copy: uint8 [H * W * 4]."""
    import pyarrow
    import torch

    try:
        return torch.from_dlpack(pyarrow.array(strip).flatten())
    except ValueError:  # it lies in several blocks (a small PILLOW_BLOCK_SIZE): a copy, then
        return torch.frombuffer(bytearray(strip.tobytes("raw", "RGBX")), dtype=torch.uint8)


def _empty(*shape: int) -> torch.Tensor:
    """Memory of numpy's: unlike torch's it asks for huge pages, and so has fewer page faults."""
    import numpy as np
    import torch

    return torch.from_numpy(np.empty(shape, np.uint8))


def _resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic resize of uint8 [1, C, H, W] (the same tensor where nothing changes)."""
    import torch.nn.functional as functional

    if pixels.shape[-2:] == (height, width):
        return pixels
    return functional.interpolate(
        pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
