"""A record with its origin, and the pictures that belong to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from internvl.data.records import (
    DEFAULT_FRAMES,
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    list_images,
    video_name,
)
from internvl.errors import DataError
from internvl.images import ImageSource, image_size, load_image

if TYPE_CHECKING:
    from PIL import Image

Default = TypeVar("Default")
Sizes = list[tuple[int, int]]  # (width, height) of images, in pixels
TILE_SIDE = 448  # pixels


@dataclass(frozen=True)
class Row:
    """One record and where it came from.

    data: the (tidy) record. file, line: its origin; line counts from 1 and is the row's number
    where the file has no lines. image_root: the folder that relative paths of images and videos
    start from, and that no path may leave. max_tiles: the tile budget of its data set, if any.
    fault: what is wrong with the record, where it was not looked at before; nothing else may be
    asked of such a row. augment: what its data set says of augmenting its images (None: nothing).
    data_set: what meta.json calls its data set.
    """

    data: dict[str, Any]
    file: Path
    line: int
    image_root: Path
    max_tiles: int | None = None
    fault: str | None = None
    augment: bool | None = None
    data_set: str | None = None

    @property
    def images(self) -> list[str | bytes]:
        """The images as the record has them: paths as written, or encoded bytes."""
        return list_images(self.data)

    @property
    def num_frames(self) -> int:
        """How many frames are taken of the row's video; 0 without one."""
        if video_name(self.data) is None:
            return 0
        frames: int = self.data.get("num_frames") or DEFAULT_FRAMES
        return frames

    @property
    def is_text(self) -> bool:
        """Whether there is no image and no video."""
        return not self.images and not self.num_frames

    def image_sources(self) -> list[ImageSource]:
        """The images on disk or in memory; `load_images` refuses a path that leaves the root."""
        return [
            self.image_root / image if isinstance(image, str) else image for image in self.images
        ]

    def video_source(self) -> Path | None:
        """The video on disk: a file, or a folder of frames."""
        name = video_name(self.data)
        return None if name is None else self.image_root / name

    def load_images(self) -> list[Image.Image]:
        """The decoded images, or the frames of the video, in the order of their placeholders.

        Raises `DataError` with the path and the reason, also for a path that leaves the root.
        """
        self.check_paths()
        video, sources = self.video_source(), self.image_sources()
        if video is None:
            return [load_image(source) for source in sources]
        from internvl.video import load_frames

        frames = load_frames(video, self.num_frames)
        if len(frames) != self.num_frames:
            raise DataError(f"{video}: {len(frames)} frames, expected {self.num_frames}")
        return frames

    def check_paths(self) -> None:
        """Raise `DataError` for a row with a fault, or with a path that leaves its root."""
        if self.fault is not None:
            raise DataError(self.fault)
        video = self.video_source()
        # of a folder of frames each file: one may be a link that leads out
        videos = [] if video is None else [video, *self._video_files()]
        for path in [*videos, *self.image_sources()]:
            if isinstance(path, Path) and (fault := path_fault(path, self.image_root)):
                raise DataError(fault)

    def media_files(self) -> list[Path]:
        """The files that the images and the video are read from, a folder's one by one."""
        files = [source for source in self.image_sources() if isinstance(source, Path)]
        return files + self._video_files()

    def _video_files(self) -> list[Path]:
        video = self.video_source()
        if video is None:
            return []
        try:
            return sorted(video.iterdir()) if video.is_dir() else [video]
        except OSError as error:
            raise DataError(f"{video}: cannot be read: {error.strerror}") from None

    def encoded_media(self) -> Iterator[bytes]:
        """The encoded bytes of every image, or of the video's file or files."""
        for source in [*self.image_sources(), *self._video_files()]:
            if isinstance(source, bytes):
                yield source
            elif source.is_file():
                yield source.read_bytes()

    def prompt_text(self, text: str) -> str:
        r"""A user's text as the model sees it: a video's placeholder becomes one line a frame.

        InternVL's published chat examples write "Frame1: <image>\nFrame2: <image>\n...\n".
        Without a video the text stays as it is.
        """
        if not self.num_frames:
            return text
        frames = "".join(
            f"Frame{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, self.num_frames + 1)
        )
        return re.sub(f"{re.escape(VIDEO_PLACEHOLDER)}\n?", frames, text)

    def tile_budget(self, default: Default) -> int | Default:
        """The tile budget of the whole prompt: the row's own, else its data set's, else `default`.

        A video has one tile a frame.
        """
        if self.num_frames:
            return 1
        own: int | None = self.data.get("max_tiles")
        own = self.max_tiles if own is None else own
        return default if own is None else own

    def image_sizes(self) -> Sizes:
        """(width, height) of what `load_images` gives, in pixels, to count tiles by.

        Of images only headers are read; a video's frames, which are one tile each whatever their
        size, count as one tile's size unread. Raises `DataError` where a header shows that an image
        cannot be used.
        """
        if self.num_frames:
            return [(TILE_SIDE, TILE_SIDE)] * self.num_frames
        return [image_size(source) for source in self.image_sources()]


class RowImages(Sequence["Image.Image"]):
    """What `Row.load_images` gives, decoded each time that it is gone through.

    So a batch of questions that wait for a sampler holds no pixels.
    """

    def __init__(self, row: Row):
        self._row = row

    def __len__(self) -> int:
        return self._row.num_frames or len(self._row.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self._row.load_images())

    def sources(self) -> list[ImageSource]:
        """The file or the encoded bytes of each image; none for a video's frames."""
        return [] if self._row.num_frames else self._row.image_sources()

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self._row.load_images()[index]


def path_fault(path: Path, root: Path) -> str | None:
    """Why a file may not be read from this root, or None; links are followed."""
    try:
        # with the folder that a relative root starts from, which may change
        real, real_root = os.path.realpath(path), _real_path(os.path.join(os.getcwd(), root))
        inside = os.path.commonpath([real, real_root]) == real_root
    except ValueError as error:  # a zero byte, half a surrogate pair
        return f"{str(path)!r}: not a path: {error}"
    return None if inside else f"{path}: outside its root {root}"


@lru_cache(maxsize=64)
def _real_path(path: str) -> str:
    return os.path.realpath(path)


def look_at_images(row: Row) -> tuple[str | None, Sizes]:
    """Why the images or the video of a row cannot be used, or None; decodes all of it.

    And its `image_sizes`, without reading the headers again (none where something is wrong).
    """
    try:
        images = row.load_images()
    except DataError as error:
        return str(error), []
    return None, row.image_sizes() if row.num_frames else [image.size for image in images]


def image_fault(row: Row) -> str | None:
    """Why the images or the video of a row cannot be used, or None; decodes all of it."""
    return look_at_images(row)[0]
