"""The images of a report: embedded in the page, with the cuts that the tiling made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.report_files import get, read_object
from internvl.errors import UserError
from internvl.thumbnails import Thumbnail, make_thumbnail

# A page stays light: larger images are embedded at this size, small ones as they are.
PICTURE_SIDE = 448


@dataclass(frozen=True)
class Tiling:
    """How a run cut its images: the tile budget of a prompt, and the side of a tile in pixels."""

    max_tiles: int
    tile_size: int


def read_tiling(run: Path, names: Sequence[str]) -> Tiling | None:
    """Return the tiling of the first stage that left its options and its model, or None."""
    for name in names:
        options, config = (
            run / "stages" / name / file for file in ("config.resolved.json", "config.json")
        )
        if not (options.exists() and config.exists()):
            continue
        side = get(get(read_object(config), "vision_config", dict, config), "image_size",
                   (int, list), config)  # fmt: skip
        size = int(side[0] if isinstance(side, list) else side)
        return Tiling(get(read_object(options), "max_tiles", int, options), size)
    return None


def pictures(
    run: Path, row: dict[str, Any], path: Path, tiling: Tiling | None
) -> tuple[Thumbnail, ...]:
    """Return the images of a record that was read from `path`."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if tiling is not None:  # several images share the budget
        tiling = Tiling(max(1, tiling.max_tiles // max(1, len(names))), tiling.tile_size)
    return tuple(_embed(_find_image(run, str(name), path), tiling) for name in names)


def _find_image(run: Path, name: str, path: Path) -> Path:
    """Return an image's file: absolute, or relative to the run's world/ or to the JSONL file."""
    tried = [run / "world" / name, path.parent / name]  # an absolute name replaces the folder
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: image {name!r} not found; tried {tried[0]} and {tried[1]}")


def _embed(path: Path, tiling: Tiling | None) -> Thumbnail:
    """Return an image file for the page, scaled down where it is larger than a tile."""
    from internvl.images import load_image

    image = load_image(path)
    if tiling is None:
        return make_thumbnail(image, max_tiles=None, side=PICTURE_SIDE)
    return make_thumbnail(
        image, max_tiles=tiling.max_tiles, tile_size=tiling.tile_size, side=PICTURE_SIDE
    )
