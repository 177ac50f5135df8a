"""The grid of an image, against the rule stated directly; the tiles, against transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import noise_image
from transformers import GotOcr2ImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from internvl.chat import cut_tiles, load_processor, normalize_tiles, tile_settings
from internvl.errors import UserError
from internvl.sampler import SampleRequest
from internvl.tiling import choose_grid, count_tiles, cut_images, processor_tile_size

BUDGETS = (1, 6, 12, 40)


def random_sizes(number: int, seed: int) -> np.ndarray:
    """[number, 2] widths and heights: any aspect, round sizes (that tie) and sizes of tiles."""
    rng = np.random.default_rng(seed)
    free = np.exp(rng.uniform(0, np.log(10_000), (number // 2, 2))).astype(int)
    round_ones = rng.integers(1, 60, (number // 4, 2)) * rng.choice([1, 8, 50, 100, 112, 448])
    tied = rng.integers(1, 13, (number - len(free) - len(round_ones), 2))
    scale = rng.choice([1, 7, 28, 100, 224, 448, 1000], (len(tied), 1))
    return np.concatenate([free, round_ones, tied * scale])


def brute_force(sizes: np.ndarray, max_tiles: int, tile: int = 448) -> np.ndarray:
    """The rule in one statement: of the grids at the least distance in aspect ratio, the smallest,
    or the largest whose area is less than twice the image's where there is one that is larger.
    """
    width, height = sizes[:, :1], sizes[:, 1:]
    sides = np.arange(1, max_tiles + 1)
    grids = np.array([(i, j) for i in sides for j in sides if i * j <= max_tiles])
    area = grids[:, 0] * grids[:, 1]
    distance = np.abs(width / height - grids[:, 0] / grids[:, 1])
    closest = distance == distance.min(axis=1, keepdims=True)
    small_enough = 2 * width * height > tile * tile * area
    smallest = np.where(closest, area, area.max() + 1).argmin(axis=1)
    largest = np.where(closest & small_enough, area, 0).argmax(axis=1)
    none = ~(closest & small_enough).any(axis=1)
    return grids[np.where(none, smallest, largest)]


@pytest.mark.parametrize("max_tiles", BUDGETS)
def test_the_grid_is_the_rule_s(max_tiles: int) -> None:
    sizes = random_sizes(20_000, seed=max_tiles)
    ours = [choose_grid(w, h, max_tiles=max_tiles) for w, h in sizes.tolist()]
    assert np.array_equal(np.array(ours), brute_force(sizes, max_tiles))


def test_the_grid_is_that_of_transformers() -> None:
    """Other budgets and tiles of other sizes too: what vLLM counts with."""
    rng = np.random.default_rng(5)
    for width, height in random_sizes(3000, seed=9).tolist():
        low, high = sorted(int(n) for n in rng.integers(1, 41, 2))
        tile = int(rng.choice([56, 112, 448]))
        ours = choose_grid(width, height, min_tiles=low, max_tiles=high, tile_size=tile)
        theirs = get_optimal_tiled_canvas.__wrapped__((height, width), (tile, tile), low, high)
        assert ours == theirs, (width, height, low, high, tile)


def test_the_order_of_grids_of_equal_size_decides_nothing() -> None:
    """The published code sorts a set by size alone, so equal sizes come in the set's order.

    That could matter where an aspect ratio lies exactly between two grids of one size, and no grid
    is closer: there is no such pair with min_tiles=1, whatever the budget.
    """
    grids = [(i, j) for i in range(1, 41) for j in range(1, 41) if i * j <= 40]
    for first in grids:
        for second in grids:
            size = first[0] * first[1]
            if first == second or second[0] * second[1] != size:
                continue
            middle = (Fraction(*first) + Fraction(*second)) / 2
            # grids of the pair's own size or less are there at every budget that holds the pair
            others = [Fraction(*grid) for grid in grids if grid[0] * grid[1] <= size]
            closer = abs(Fraction(*first) - middle) - min(abs(other - middle) for other in others)
            assert closer > Fraction(1, 1000), (first, second)


def test_a_tie_of_two_grids_of_one_size_with_min_tiles() -> None:
    """Without a 1x1 grid a ratio of 1.25 lies between 1x2 and 2x1: transformers' order holds."""
    assert choose_grid(50, 40, min_tiles=2, max_tiles=2) == (1, 2)
    assert choose_grid(5000, 4000, min_tiles=2, max_tiles=2) == (2, 1)


def test_known_grids_and_token_counts() -> None:
    assert choose_grid(800, 1300) == (2, 3)
    assert choose_grid(448, 448) == (1, 1)
    assert choose_grid(60_000, 1) == (12, 1)
    assert choose_grid(1, 60_000, max_tiles=6) == (1, 6)
    # the tie rule: 2x2 only where the image covers over half of its 896x896 pixels
    assert [choose_grid(side, side, max_tiles=6) for side in (633, 634)] == [(1, 1), (2, 2)]
    counts = [count_tiles(*size, max_tiles=n) for size, n in [((448, 448), 1), ((800, 1300), 12)]]
    counts += [count_tiles(4000, 3000), count_tiles(448 * 8, 448 * 5, max_tiles=40)]
    assert [256 * count for count in counts] == [256, 1792, 3328, 10_496]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match="min_tiles=3, max_tiles=2"):
        choose_grid(10, 10, min_tiles=3, max_tiles=2)
    with pytest.raises(UserError, match="0x5 pixels has no tiles"):
        choose_grid(0, 5)
    with pytest.raises(UserError, match="mode 'L'; expected 'RGB'"):
        cut_images([noise_image(9, 9, 0).convert("L")])
    bilinear = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, resample=2)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: .*resample 2"):
        processor_tile_size(bilinear)


def transformers_tiles(processor: Any, images: Sequence[Any], max_tiles: int) -> torch.Tensor:
    settings = tile_settings(len(images), max_tiles)
    out = processor.image_processor(
        images=list(images), do_rescale=False, do_normalize=False, return_tensors="pt", **settings
    )
    return out["pixel_values"]


def test_tiles_are_bit_equal_to_transformers(tiny_model: Path) -> None:
    """Sizes that grow, shrink or stay, odd shapes, several strips, several images in a prompt."""
    processor = load_processor(str(tiny_model))
    sizes = [(1, 1), (2, 1), (3, 3), (56, 56), (112, 56), (57, 55), (168, 224), (3, 900)]
    rng = np.random.default_rng(3)
    sizes += [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, 6.5, (15, 2)))]
    cases = [(size, max_tiles) for size in sizes for max_tiles in (1, 12, 40)]
    cases += [((1, 60_000), 12), ((60_000, 1), 12), ((2500, 1700), 6)]
    for seed, ((width, height), max_tiles) in enumerate(cases):
        image = noise_image(width, height, seed)
        tiles, counts = cut_tiles(processor, [image], max_tiles)
        assert torch.equal(tiles, transformers_tiles(processor, [image], max_tiles))
        assert counts == [count_tiles(width, height, max_tiles=max_tiles, tile_size=56)]
    images = [noise_image(300, 90, 0), noise_image(56, 56, 1), noise_image(90, 300, 2)]
    tiles, counts = cut_tiles(processor, images, 12)
    assert torch.equal(tiles, transformers_tiles(processor, images, 12))
    assert counts == [4, 1, 4] and tiles.shape == (9, 3, 56, 56) and tiles.dtype == torch.uint8
    assert cut_tiles(processor, [], 12)[0].shape == (0, 3, 56, 56)


@pytest.mark.parametrize("max_tiles", BUDGETS)
def test_tiles_of_448_are_bit_equal_to_transformers(max_tiles: int) -> None:
    processor = GotOcr2ImageProcessor(size={"height": 448, "width": 448})
    image = noise_image(1600, 900, 0)
    theirs = processor(
        images=[image],
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
        crop_to_patches=True,
        min_patches=1,
        max_patches=max_tiles,
    )["pixel_values"]
    assert torch.equal(cut_images([image], max_tiles=max_tiles)[0], theirs)


@pytest.mark.xdist_group("vllm")
@pytest.mark.slow
def test_tiles_of_any_size_are_bit_equal_to_vllm_s(vllm_sampler: Any, tiny_model: Path) -> None:
    """Through the engine's own input processing, normalised: odd shapes, small and large ones."""
    processor = load_processor(str(tiny_model))
    rng = np.random.default_rng(11)
    sizes = [(1, 1), (2, 1), (3, 900), (900, 3), (60_000, 1), (1, 60_000), (2500, 1700)]
    sizes += [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, 6.5, (30, 2)))]
    for seed, (width, height) in enumerate(sizes):
        image = noise_image(width, height, seed)
        for max_tiles in BUDGETS:
            request = SampleRequest("<image>\n?", (image,), seed=0)
            _, pixels = vllm_sampler.engine_inputs(request, max_tiles)
            tiles, _ = cut_tiles(processor, [image], max_tiles)
            assert torch.equal(pixels, normalize_tiles(processor, tiles)), (width, height)
