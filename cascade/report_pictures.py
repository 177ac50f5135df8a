"""The images of a report: embedded in the page, with the cuts that the tiling made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.report_data import Picture
from cascade.report_files import get, read_object
from cascade.report_run import TRAINING, RunFolder
from internvl.errors import DataError, UserError
from internvl.thumbnails import Thumbnail, make_thumbnail

# A page stays light: larger images are embedded at this size, small ones as they are.
PICTURE_SIDE = 448
MOST_PICTURES = 4  # of a question (a video has many)


@dataclass(frozen=True)
class Tiling:
    """How a run cut its images: the tile budget of a prompt, and the side of a tile in pixels."""

    max_tiles: int
    tile_size: int


def read_tiling(run: RunFolder) -> Tiling | None:
    """Return the tiling of the first stage that left its options and its model, or None."""
    for name, info in run.stages.items():
        options, config = (
            run.folder(name) / file for file in ("config.resolved.json", "config.json")
        )
        if info.kind not in TRAINING or not (options.exists() and config.exists()):
            continue
        side = get(get(read_object(config), "vision_config", dict, config), "image_size",
                   (int, list), config)  # fmt: skip
        size = int(side[0] if isinstance(side, list) else side)
        return Tiling(get(read_object(options), "max_tiles", int, options), size)
    return None


class ImageFinder:
    """Finds the images of records in the places that a run knows, and makes them small."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.tiling = read_tiling(run)
        roots = [run.path / "world"]
        for name, info in run.stages.items():
            if info.kind in TRAINING and (root := run.options(name).get("image_root")):
                roots.append(Path(str(root)))
            meta = run.folder(name) / "meta.json"
            if info.kind == "pairs" and meta.exists():
                entries = [one for one in read_object(meta).values() if isinstance(one, dict)]
                roots += [meta.parent / str(one["root"]) for one in entries if one.get("root")]
        self.roots = list(dict.fromkeys(roots))

    def pictures(self, row: dict[str, Any], path: Path) -> tuple[Picture, ...]:
        """The images of a record that was read from `path`; one that is not there says so."""
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        tiling = self.tiling
        if tiling is not None:  # several images share the budget
            tiling = Tiling(max(1, tiling.max_tiles // max(1, len(names))), tiling.tile_size)
        return tuple(self._picture(str(name), path, tiling) for name in names[:MOST_PICTURES])

    def _picture(self, name: str, path: Path, tiling: Tiling | None) -> Picture:
        # an absolute name replaces the folder
        tried = [folder / name for folder in (path.parent, *self.roots)]
        found = next((candidate for candidate in tried if candidate.exists()), None)
        if found is None:
            return Picture(None, name, "not found")
        try:
            return Picture(_embed(found, tiling), name)
        except (DataError, UserError, OSError):
            return Picture(None, name, "cannot be read")


def _embed(path: Path, tiling: Tiling | None) -> Thumbnail:
    """Return an image file for the page, scaled down where it is larger than a tile."""
    from internvl.images import load_image

    image = load_image(path)
    if tiling is None:
        return make_thumbnail(image, max_tiles=None, side=PICTURE_SIDE)
    return make_thumbnail(
        image, max_tiles=tiling.max_tiles, tile_size=tiling.tile_size, side=PICTURE_SIDE
    )
