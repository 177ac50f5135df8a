"""Images a second from JPEG files to tiles: internvl against transformers' GotOcr2ImageProcessor.

    python benchmarks/preprocess.py                 # a table
    python benchmarks/preprocess.py --json          # the last line is one JSON object

The JPEGs are photographs drawn from a seed (gradients, textures at several scales, text, sensor
noise), 4000x3000, quality 90, at 1 to 12 tiles. Each side has a process of its own, as what one
leaves in the allocator decides what the other pays in page faults; they run in turns, on one
thread, one tile count after the other, and CPU time is taken, which on a free core is wall time.
Medians over the rounds. What is saved is mostly memory that is never asked for: three arrays of the
whole picture. So the ratio depends on what such memory costs: 1.6 to 1.7 (`bare` 1.3 to 1.4) was
seen on a virtual machine with glibc's defaults, 1.3 to 1.5 there with the tile counts mixed, and
1.26 (1.06) with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000, where no memory is ever given
back: then decoding is all that counts.

    ours           load_image + cut_images: EXIF rotation, RGB, uint8 tiles (the device normalises)
    transformers   its image_utils.load_image (the same: rotation, RGB) + the processor as it comes,
                   as vLLM calls it: float32, normalised                            `speedup`
    bare           Image.open (no rotation) + the processor's resize and cut alone, do_rescale and
                   do_normalize off                                                 `speedup_bare`
    decode         Pillow's decoding alone: nobody is faster than that

`speedup` is over all tile counts together (images / time, equally many of each), `worst_speedup`
that of the worst count. `tiling_speedup` leaves the decoding out on both sides (`bare`).
`max_pixel_difference` is of the tiles that are timed against the processor's, in 1/255: there is
one path, the exact one, and it must be 0. `float_difference` compares the normalised pixels.
`reduced_decode_difference` is why no JPEG is decoded at a reduced size: what that would change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import GotOcr2ImageProcessor
from transformers.image_utils import load_image as their_load_image
from transformers.utils import logging as transformers_logging

from internvl.images import load_image
from internvl.tiling import TILE_SIZE, choose_grid, cut_images

SIZE = (4000, 3000)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSOR: Any = GotOcr2ImageProcessor(
    size={"height": TILE_SIZE, "width": TILE_SIZE}, image_mean=MEAN, image_std=STD
)


def draw_photograph(seed: int) -> Image.Image:
    """A picture of 12 megapixels with what photographs have: see the module's docstring."""
    width, height = SIZE
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pixels = np.stack([120 + 80 * np.sin(x / 900 + c) + 50 * np.cos(y / 700 - c) for c in range(3)])
    for octave in range(1, 6):
        coarse = rng.normal(0, 18 / (octave + 1) ** 0.5, (height >> octave, width >> octave))
        fine = Image.fromarray(coarse.astype(np.float32)).resize(SIZE, Image.Resampling.BICUBIC)
        pixels += np.asarray(fine)
    pixels += rng.normal(0, 4, pixels.shape).astype(np.float32)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=64)
    for _ in range(40):
        place = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        colour = tuple(int(level) for level in rng.integers(0, 256, 3))
        draw.text(place, "InternVL 0123456789", fill=colour, font=font)
    return picture


def decode(path: Path) -> Image.Image:
    """What everybody pays: Pillow's decoding."""
    image = Image.open(path)
    image.load()
    return image


def ours(image: Image.Image, max_tiles: int) -> torch.Tensor:
    return cut_images([image], max_tiles=max_tiles)[0]


def theirs(image: Image.Image, max_tiles: int, *, bare: bool = False) -> torch.Tensor:
    out = PROCESSOR(
        images=[image],
        return_tensors="pt",
        crop_to_patches=True,
        min_patches=1,
        max_patches=max_tiles,
        do_rescale=not bare,
        do_normalize=not bare,
    )
    return out["pixel_values"]


@cache
def decoded(path: Path) -> Image.Image:
    """A picture that stays decoded (the first, untimed round fills the cache)."""
    return decode(path)


SIDES: dict[str, Callable[[Path, int], object]] = {
    "ours": lambda path, tiles: ours(load_image(path), tiles),
    "transformers": lambda path, tiles: theirs(their_load_image(str(path)), tiles),
    "bare": lambda path, tiles: theirs(Image.open(path), tiles, bare=True),
    "decode": lambda path, tiles: decode(path),
    "ours, decoded": lambda path, tiles: ours(decoded(path), tiles),
    "bare, decoded": lambda path, tiles: theirs(decoded(path), tiles, bare=True),
}


def serve(side: str, pipe: Connection) -> None:
    """A side's process: paths and tile counts in, CPU-seconds out."""
    while (task := pipe.recv()) is not None:
        start = time.process_time()
        SIDES[side](*task)
        pipe.send(time.process_time() - start)


def time_sides(
    paths: list[Path], tile_counts: list[int], rounds: int
) -> dict[int, dict[str, float]]:
    """Median CPU-seconds of each side at each tile count, the sides taking turns."""
    context = multiprocessing.get_context("fork")
    pipes: dict[str, Connection] = {}
    for side in SIDES:
        pipes[side], end = context.Pipe()
        context.Process(target=serve, args=(side, end), daemon=True).start()
    seconds = {tiles: {side: list[float]() for side in SIDES} for tiles in tile_counts}
    for tiles, turn in itertools.product(tile_counts, range(rounds + len(paths))):
        for side, pipe in pipes.items():
            pipe.send((paths[turn % len(paths)], tiles))
            taken = pipe.recv()
            if turn >= len(paths):  # every file once, to warm up
                seconds[tiles][side].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    return {
        tiles: {side: statistics.median(values) for side, values in line.items()}
        for tiles, line in seconds.items()
    }


def differences(path: Path, max_tiles: int) -> tuple[int, float, int]:
    """(largest difference of our uint8 tiles, of the floats, of a reduced decoding's tiles)."""
    picture = load_image(path)
    tiles, bare = ours(picture, max_tiles), theirs(Image.open(path), max_tiles, bare=True)
    if tiles.shape != bare.shape:
        raise SystemExit(f"{max_tiles} tiles: {tiles.shape} against {bare.shape}")
    floats = PROCESSOR.rescale_and_normalize(tiles, True, 1 / 255, True, MEAN, STD)
    float_gap = (floats - theirs(Image.open(path), max_tiles)).abs().max().item()
    columns, rows = choose_grid(*picture.size, max_tiles=max_tiles)
    reduced = Image.open(path)
    reduced.draft("RGB", (columns * TILE_SIZE, rows * TILE_SIZE))
    reduced_gap = (ours(reduced, max_tiles).int() - tiles.int()).abs().max().item()
    return int((tiles.int() - bare.int()).abs().max()), float_gap, int(reduced_gap)


def report(medians: dict[int, dict[str, float]], paths: list[Path]) -> dict[str, Any]:
    """The numbers of the module's docstring."""
    gaps = [differences(path, tiles) for tiles in medians for path in paths]
    total = {side: sum(line[side] for line in medians.values()) for side in SIDES}
    return {
        "speedup": round(total["transformers"] / total["ours"], 3),
        "worst_speedup": round(min(m["transformers"] / m["ours"] for m in medians.values()), 3),
        "speedup_bare": round(total["bare"] / total["ours"], 3),
        "tiling_speedup": round(total["bare, decoded"] / total["ours, decoded"], 3),
        "max_pixel_difference": max(gap[0] for gap in gaps),
        "float_difference": max(gap[1] for gap in gaps),
        "reduced_decode_difference": max(gap[2] for gap in gaps),
        "images_per_second": {
            tiles: {side: round(1 / seconds, 2) for side, seconds in line.items()}
            for tiles, line in medians.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 4, 6, 9, 12])
    parser.add_argument("--images", type=int, default=2, help="photographs (default: 2)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.jpg" for index in range(args.images)]
        for index, path in enumerate(paths):
            draw_photograph(args.seed + index).save(path, quality=90)
        medians = time_sides(paths, args.tiles, args.rounds)
        result = report(medians, paths)
        megabytes = statistics.mean(path.stat().st_size for path in paths) / 1e6
    print(f"{args.images} JPEGs of {SIZE[0]}x{SIZE[1]}, {megabytes:.1f} MB; images a CPU-second")
    print(f"{'max tiles':>9}" + "".join(f"{side:>15}" for side in SIDES))
    for tiles, rates in result["images_per_second"].items():
        print(f"{tiles:>9}" + "".join(f"{rate:>15}" for rate in rates.values()))
    for name, value in result.items():
        if name != "images_per_second":
            print(f"{name:27}{value}")
    if args.json:
        print(json.dumps(result))
    sys.exit(0 if result["max_pixel_difference"] == 0 else 1)


if __name__ == "__main__":
    main()
