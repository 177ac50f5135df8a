"""Random JPEG compression of training images, as InternVL 2.5 has it (arXiv 2412.05271).

    decoded picture -> JPEG of a quality drawn for it, 75 to 100 -> decoded again -> tiles

It stands for what pictures go through on the internet; a video's frames are left alone. Which rows
are augmented is said by their data set (`data_augment` in meta.json), else by the option. The
quality is drawn by the sample's text, the image's number and the seed, so that it is the same in
every process and run, and MPO's policy and reference see one picture.

The published code compresses each tile after it was cut, with a quality of its own; here a picture
is compressed whole, once, so that its tiles and its thumbnail show the same damage.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

PUBLISHED = (75, 100)


@dataclass(frozen=True)
class JpegAugmentation:
    """Which training images are compressed, and how strongly.

    quality: lowest and highest, both drawn. unless_said: also the rows whose data set says nothing
    of it. epoch: draws are others in each (MPO, whose reference is computed once, keeps 0).
    """

    quality: tuple[int, int] = PUBLISHED
    unless_said: bool = False
    epoch: int = 0

    def takes(self, said: bool | None) -> bool:
        """Whether a row is augmented; said: its data set's `data_augment` (None: nothing)."""
        return self.unless_said if said is None else said

    def draw(self, images: int, *, key: str, seed: int) -> list[int]:
        """A quality for each image of a sample.

        >>> JpegAugmentation((80, 80)).draw(2, key="text", seed=0)
        [80, 80]
        """
        low, high = self.quality
        words = [f"jpeg/{seed}/{self.epoch}/{number}/{key}" for number in range(images)]
        digests = [hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest() for word in words]
        return [low + int.from_bytes(digest[:8], "big") % (high - low + 1) for digest in digests]


def recompress(image: Image.Image, quality: int) -> Image.Image:
    """An RGB picture as its JPEG of this quality shows it (4:2:0, Pillow's own default)."""
    from PIL import Image

    encoded = io.BytesIO()
    image.save(encoded, format="JPEG", quality=quality)
    with Image.open(encoded, formats=("JPEG",)) as opened:
        opened.load()
        return opened


def check_qualities(qualities: Sequence[int]) -> tuple[int, int]:
    """The two as they are, or `UserError`: Pillow's scale goes from 1 to 100."""
    if len(qualities) == 2 and 1 <= qualities[0] <= qualities[1] <= 100:
        return qualities[0], qualities[1]
    raise UserError(
        f"jpeg_quality is {list(qualities)}; give the lowest and the highest quality, from 1 to "
        "100, as in: 75 100"
    )
