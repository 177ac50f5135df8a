"""Frames of a video: a folder of frame images, or a file through PyAV.

    10 frames, 4 segments, (10 - 1) / 4 = 2.25 frames each: frames 1, 3, 5, 8

Which frames: InternVL's own sampling at inference, the middle of `num_frames` equal segments of
the whole video; a video of fewer frames gives some of them twice, so the number is always the one
asked for. A file that ends before its header says so is an error; where the header does not say (a
Matroska cut in the middle), the video is what is there. In a prompt a video is
"Frame1: <image>\\nFrame2: <image>\\n...", one tile a frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.errors import DataError, UserError
from internvl.images import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE, load_image

if TYPE_CHECKING:
    from PIL import Image

_FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Demuxers that are tried: containers of video. Playlists, which name other files, are not in it.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng"


def load_frames(source: Path, num_frames: int) -> list[Image.Image]:
    """`num_frames` RGB frames of a video, in order.

    source: a folder of frame images (sorted as people count: frame_2 before frame_10), or a video
    file. Raises `DataError` with the path and the reason.
    """
    if num_frames < 1:
        raise UserError(f"num_frames is {num_frames}; give 1 or more")
    if source.is_dir():
        names = [path for path in source.iterdir() if path.suffix.lower() in _FRAME_SUFFIXES]
        if not names:
            raise DataError(f"{source}: no frame images in this folder")
        names.sort(key=lambda path: _natural_key(path.name))
        return [load_image(names[index]) for index in frame_indices(len(names), num_frames)]
    if not source.is_file():
        raise DataError(f"{source}: " + ("not a file" if source.exists() else "no such video"))
    return _decode_frames(source, num_frames)


def frame_indices(total: int, num_frames: int) -> list[int]:
    """The frames that are taken of `total`: the middles of equal segments, rounded as published.

    >>> frame_indices(10, 4)
    [1, 3, 5, 8]
    """
    segment = (total - 1) / num_frames
    # round() and int() stand where numpy's stand in the published get_index: halves to even, down
    return [int(segment / 2 + round(segment * index)) for index in range(num_frames)]


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    """A sort key that takes runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts] + [(2, name)]


def _decode_frames(source: Path, num_frames: int) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise UserError(
            f"{source}: video files are read with PyAV, which is not installed: "
            "pip install 'internvl-posttraining[video]'"
        ) from None
    try:
        total = _count_frames(av, source)
        wanted = frame_indices(total, num_frames)
        kept: dict[int, Image.Image] = {}
        decoded = 0
        for frame in _frames(av, source):
            if decoded in wanted:
                kept[decoded] = _picture(frame)
            decoded += 1
            if decoded > wanted[-1]:
                break
    except _Unusable as error:
        raise DataError(f"{source}: {error}") from None
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source}: corrupt or unknown video: {reason}") from None
    if decoded <= wanted[-1]:
        raise DataError(f"{source}: truncated: it ends after {decoded} of {total} frames")
    return [kept[index] for index in wanted]


class _Unusable(ValueError):
    """A reason that needs the video's path in front."""


def _count_frames(av: Any, source: Path) -> int:
    """Frames of the video: as its header says (MP4), else counted by decoding them all."""
    with _opened(av, source) as container:
        total = int(container.streams.video[0].frames)
    total = total or sum(1 for _ in _frames(av, source))
    if not total:
        raise _Unusable("no frame can be decoded from it")
    return total


@contextmanager
def _opened(av: Any, source: Path) -> Iterator[Any]:
    """The container, as a file that may not name other files and of a format that does not."""
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
    with source.open("rb") as file, av.open(file, options=options) as container:
        if not container.streams.video:
            raise _Unusable("there is no video in it")
        if container.streams.video[0].codec_context is None:
            raise _Unusable("no decoder for what is in it")
        yield container


def _frames(av: Any, source: Path) -> Iterator[Any]:
    """Every frame, decoded, in order; what the decoder calls corrupt is an error."""
    with _opened(av, source) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        _check_size(stream.codec_context.width, stream.codec_context.height)
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise _Unusable(f"frame {index} is corrupt")
            yield frame


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise _Unusable(
            f"frames of {width}x{height} pixels, over the limit of {MAX_IMAGE_PIXELS} pixels or "
            f"{MAX_IMAGE_SIDE} a side"
        )


def _picture(frame: Any) -> Image.Image:
    """A frame as RGB, turned as its display matrix says."""
    from PIL.Image import Transpose

    _check_size(frame.width, frame.height)
    turns = {90: Transpose.ROTATE_90, 180: Transpose.ROTATE_180, 270: Transpose.ROTATE_270}
    angle = int(frame.rotation) % 360  # counter-clockwise, as Pillow's
    if angle and angle not in turns:
        raise _Unusable(f"turned by {angle} degrees; only quarter turns are read")
    picture = frame.to_image()
    return picture.transpose(turns[angle]) if angle else picture
