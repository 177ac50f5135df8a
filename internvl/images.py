"""Any image file to the RGB picture that a viewer shows, or the reason why not.

    file or bytes -> header: format, size limit -> decode -> RGB -> EXIF rotation -> picture

What is done to which kind (8 bits a channel come out, always RGB):

    transparency (RGBA, LA, palette, a key colour)   composited over white, as vLLM does
    grayscale, 1-bit, palette, YCbCr, Lab            converted
    CMYK (Adobe's inverted JPEG too)                 converted without its colour profile
    16 bits a channel                                the high byte
    32-bit integers                                  within 0..65535 the high byte, else an error
    float                                            0..1 times 255, 0..255 as it is, else an error
    animation, several pages                         the first frame
    EXIF or XMP rotation                             applied; damaged EXIF says nothing of it

Size limits are held against the header, before anything is decoded. Checksums are checked where the
format has them (PNG); a JPEG, GIF or WebP whose bytes were changed but that still decodes cannot be
told from another picture.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from internvl.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFile

ImageSource = Path | bytes  # a file, or the encoded bytes of one

MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own limit: above it an image is taken for a bomb
# Above it a line of pixels is blown up to gigabytes before the tiles are cut (libjpeg's own limit:
# every picture that is read here can be compressed again)
MAX_IMAGE_SIDE = 65_500

# What is tried on a file, whatever its extension says. Not in it: formats that start a program
# (EPS), and those without a signature, which would make a picture of any bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")

_SIGNATURES = (
    *((b"\x89PNG", "PNG"), (b"\xff\xd8", "JPEG"), (b"RIFF", "WebP"), (b"GIF8", "GIF")),
    *((b"BM", "BMP"), (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF"), (b"P5", "PGM"), (b"P6", "PPM")),
)
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 exchange width and height
_PNG_SIGNATURE = 8
# text of a PNG in which a rotation may be written
_PNG_ROTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


class _Unusable(ValueError):
    """A reason that needs the image's name in front."""


# What Pillow's decoders raise on bytes that were changed is not documented: these were seen.
_PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, MemoryError, RuntimeError),
    *(LookupError, ArithmeticError, AttributeError, struct.error, zlib.error),
)


def load_image(source: ImageSource) -> Image.Image:
    """Decode one image to the RGB picture that a viewer shows.

    source: a file, or the encoded bytes of one. The result has no metadata left, so nobody turns it
    a second time. Raises `DataError` with the name and the reason; never returns another picture.
    """
    with _opened(source) as (image, stream):
        if image.format == "PNG":
            _check_png(stream)
        image.load()
        picture = _to_rgb(image)
        turn = _turns().get(_orientation(image))
        if turn is not None:
            picture = picture.transpose(turn)
        if picture is image and image.format != "JPEG":
            picture = image.copy()  # free of its file; a JPEG already is, and is large
    picture.info = {}
    return picture


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of what `load_image` would return; only the header is read.

    Raises `DataError` where already the header shows that the image cannot be used.
    """
    with _opened(source) as (image, stream):
        if image.format == "PNG" and _png_has_late_rotation(stream):
            image.load()  # only so does Pillow get there
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def plain_jpeg(source: ImageSource) -> bytes | None:
    """The bytes of a JPEG that any decoder shows as `load_image` does: in colour, not rotated.

    None for every other image. Raises `DataError` where the header cannot be used.
    """
    with _opened(source) as (image, stream):
        if image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1:
            return None
        stream.seek(0)
        return stream.read()


@contextmanager
def _opened(source: ImageSource) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """The image, its header read and its size within the limit, and the stream that it reads."""
    from PIL import Image, ImageFile, UnidentifiedImageError

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process: half an image would be "
            "filled up with grey and trained on. Take it out of the code that sets it."
        )
    name = _name(source)
    try:
        with _stream(source) as stream:
            try:
                with Image.open(stream, formats=FORMATS) as image:
                    _check_pixels(image.size)
                    yield image, stream
            except UnidentifiedImageError:
                raise _Unusable(_what_it_is(stream)) from None
    except DataError:
        raise
    except _Unusable as error:
        raise DataError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: taken for a decompression bomb: {error}") from None
    except _PILLOW_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: corrupt image: {reason}") from None


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, Path) else f"image of {len(source)} bytes"


def _stream(source: ImageSource) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        if source.is_file():
            return source.open("rb")
        found = source.exists()
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
    raise _Unusable("not a file" if found else "no such image")


def _check_pixels(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise _Unusable(
            f"{width}x{height} pixels, over the limit of {MAX_IMAGE_PIXELS} (decompression bomb)"
        )
    if max(width, height) > MAX_IMAGE_SIDE:
        raise _Unusable(f"{width}x{height} pixels, over the limit of {MAX_IMAGE_SIDE} a side")
    if width < 1 or height < 1:
        raise _Unusable(f"{width}x{height} pixels: there is nothing in it")


def _what_it_is(stream: BinaryIO) -> str:
    """Why Pillow could not tell the format, for somebody who looks for the file's origin."""
    stream.seek(0)
    start = stream.read(24)
    if not start:
        return "empty file"
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            return f"corrupt image: it begins as a {kind}, but its header cannot be read"
    known = ", ".join(FORMATS)
    return f"not an image that is read here ({known}); its first bytes are {start!r}"


def _turns() -> dict[int, Image.Transpose]:
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _orientation(image: ImageFile.ImageFile) -> int:
    """The orientation that is still to be applied, 1 to 8 (1: none)."""
    from PIL import Image

    if image.format == "TIFF":
        return 1  # Pillow itself turns a TIFF, and its size too
    try:
        # not image.getexif(): for a PNG that would decode the picture
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except _PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_to_rgb(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        raise _Unusable("a transparent colour of 16 bits a channel is not supported")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or key is not None:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """Grayscale of 16 or 32 bits a pixel as RGB; a transparent level becomes white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    levels = _float_levels(values) if image.mode == "F" else _integer_levels(values)
    key = image.info.get("transparency")
    if key is not None:
        levels = np.where(values == key, np.uint8(255), levels)
    return Image.fromarray(levels, "L").convert("RGB")


def _integer_levels(values: np.ndarray) -> np.ndarray:
    import numpy as np

    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _Unusable(f"32-bit integers from {low} to {high}: only 0 to 65535 has a known scale")
    return (values >> 8).astype(np.uint8)


def _float_levels(values: np.ndarray) -> np.ndarray:
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # NaN fails both
        raise _Unusable(f"floats from {low:g} to {high:g}: only 0 to 1 and 0 to 255 are known")
    scaled = values * 255 if high <= 1 else values
    return np.rint(scaled).astype(np.uint8)


def _png_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(kind, length) of each chunk of a PNG; the stream then stands at the chunk's content."""
    position = _PNG_SIGNATURE
    while True:
        stream.seek(position)
        head = stream.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        if kind == b"IEND":
            return
        position += length + 12


def _check_png(stream: BinaryIO) -> None:
    """Compare every chunk with its checksum: Pillow leaves out those of the pixels."""
    position = stream.tell()
    kind = b"none"
    for kind, length in _png_chunks(stream):
        content = stream.read(length + 4)
        if len(content) < length + 4:
            raise SyntaxError(f"truncated in its {kind!r} chunk")
        (written,) = struct.unpack(">I", content[-4:])
        if zlib.crc32(content[:-4], zlib.crc32(kind)) != written:
            raise SyntaxError(f"its {kind!r} chunk does not match its checksum")
    if kind != b"IEND":
        raise SyntaxError(f"truncated after its {kind!r} chunk")
    stream.seek(position)


def _png_has_late_rotation(stream: BinaryIO) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels."""
    position = stream.tell()
    pixels = late = False
    for kind, _ in _png_chunks(stream):
        if pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
            late = late or stream.read(24).startswith(_PNG_ROTATIONS)
        late = late or (pixels and kind == b"eXIf")
        pixels = pixels or kind == b"IDAT"
    stream.seek(position)
    return late
