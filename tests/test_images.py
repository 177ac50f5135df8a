"""Pictures of every kind to RGB, exact to the pixel, or the reason why not."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from plain import noise_image

from internvl.data import MAX_IMAGE_PIXELS, Quarantine, check_images, read_rows
from internvl.errors import DataError, UserError
from internvl.images import image_size, load_image

PICTURE = noise_image(23, 17, 0)
PIXELS = np.asarray(PICTURE)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    out = Image.Exif()
    out[0x0112] = orientation
    return out


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *extra: bytes) -> bytes:
    """A PNG by hand: any depth and colour type, chunks before (and, named late, behind) its pixels.

    pixels: the rows, each with its filter byte.
    """
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    late = [part for part in extra if part[4:8] in (b"eXIf", b"tEXt")]
    early = [part for part in extra if part not in late]
    body = chunk(b"IDAT", zlib.compress(pixels))
    parts = [b"\x89PNG\r\n\x1a\n", header, *early, body, *late, chunk(b"IEND", b"")]
    return b"".join(parts)


def rows_of(values: np.ndarray) -> bytes:
    """[H, ...] numbers as PNG rows without a filter, big-endian."""
    return b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)


def decoded(data: bytes) -> np.ndarray:
    image = load_image(data)
    assert image.mode == "RGB" and not image.info and image_size(data) == image.size
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), pixels)  # not turned again
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(image))), pixels)
    return pixels


def gray(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "DIB", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats_come_out_as_they_went_in(kind: str, tmp_path: Path) -> None:
    data = encode(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decoded(data), PIXELS)
    path = tmp_path / "wrong.extension"
    path.write_bytes(data)
    assert np.array_equal(np.asarray(load_image(path)), PIXELS)
    assert image_size(path) == (23, 17)


def test_transparency_is_composited_over_white() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (17, 23), dtype=np.uint8)
    alpha[0, :2] = 0, 255
    rgba = Image.fromarray(np.dstack([PIXELS, alpha]))
    share = alpha[..., None] / 255
    over_white = np.floor(PIXELS * share + 255 * (1 - share) + 0.5 + 1e-9)
    ours = decoded(encode(rgba, "PNG"))
    assert np.abs(ours - over_white).max() <= 1  # Pillow's own rounding
    assert (ours[0, 0] == 255).all() and (ours[0, 1] == PIXELS[0, 1]).all()
    grayish = rgba.convert("LA")
    as_rgba = encode(grayish.convert("RGBA"), "PNG")
    assert np.array_equal(decoded(encode(grayish, "PNG")), decoded(as_rgba))


@pytest.mark.slow
def test_transparency_is_what_vllm_makes_of_it() -> None:
    vllm_image = pytest.importorskip("vllm.multimodal.image")
    alpha = np.random.default_rng(1).integers(0, 256, (17, 23), dtype=np.uint8)
    image = Image.fromarray(np.dstack([PIXELS, alpha]))
    for mode in ("RGBA", "LA"):
        data = encode(image.convert(mode), "PNG")
        theirs = vllm_image.convert_image_mode(Image.open(io.BytesIO(data)), "RGB")
        assert np.array_equal(decoded(data), np.asarray(theirs))


def test_transparent_colours_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    levels = Image.fromarray(np.array([[10, 20]], np.uint8))
    wide = Image.fromarray(np.array([[1000, 40_000]], np.uint16))
    colours = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    white = [255, 255, 255]
    assert decoded(encode(palette, "PNG")).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    assert decoded(encode(palette, "PNG", transparency=0)).tolist() == [[white, [0, 255, 0]]]
    assert decoded(encode(levels, "PNG", transparency=20)).tolist() == [[[10] * 3, white]]
    assert decoded(encode(wide, "PNG", transparency=1000)).tolist() == [[white, [156] * 3]]
    assert decoded(encode(colours, "PNG", transparency=(1, 2, 3))).tolist() == [[white, [4, 5, 6]]]


def test_grayscale_one_bit_and_cmyk() -> None:
    levels = PIXELS[..., 0]
    assert np.array_equal(decoded(encode(Image.fromarray(levels), "PNG")), gray(levels))
    bits = Image.fromarray(levels).point(lambda level: 255 * (level > 99), "1")
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(decoded(encode(bits, kind)), gray(255 * (levels > 99)))
    cmyk = Image.fromarray(np.dstack([255 - PIXELS, np.zeros_like(levels)]), "CMYK")
    assert np.array_equal(decoded(encode(cmyk, "TIFF")), PIXELS)
    flat = Image.new("CMYK", (16, 16), (255, 128, 0, 0))  # Adobe writes a JPEG's CMYK inverted
    assert np.abs(decoded(encode(flat, "JPEG", quality=95)).astype(int) - [0, 127, 255]).max() <= 2


def test_sixteen_bits_give_their_high_byte() -> None:
    values = np.random.default_rng(2).integers(0, 65_536, (17, 23, 3), dtype=np.uint16)
    first = values[..., 0]
    assert np.array_equal(decoded(png(23, 17, 16, 2, rows_of(values))), values >> 8)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        assert np.array_equal(decoded(encode(Image.fromarray(first), kind)), gray(first >> 8))
    big_endian = Image.frombytes("I;16B", (23, 17), first.astype(">u2").tobytes())
    assert np.array_equal(decoded(encode(big_endian, "TIFF")), gray(first >> 8))
    long = Image.fromarray(first.astype(np.int32))
    assert np.array_equal(decoded(encode(long, "TIFF")), gray(first >> 8))
    alpha = np.dstack([values, np.full_like(first, 65_535)])
    assert np.array_equal(decoded(png(23, 17, 16, 6, rows_of(alpha))), values >> 8)


def test_floats_have_two_known_scales() -> None:
    unit = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    for values in (unit, unit * 255):
        assert np.array_equal(
            decoded(encode(Image.fromarray(values), "TIFF")), gray(np.rint(unit * 255))
        )
    for worst, low_high in ((300, "0 to 300"), (-1, "-1 to 1"), (np.nan, "nan to nan")):
        bad = unit.copy()
        bad[1, 1] = worst
        with pytest.raises(DataError, match=rf"image of \d+ bytes: floats from {low_high}"):
            load_image(encode(Image.fromarray(bad), "TIFF"))
    long = Image.fromarray(np.array([[0, 70_000]], np.int32))
    with pytest.raises(DataError, match="32-bit integers from 0 to 70000"):
        load_image(encode(long, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_a_picture_stands_as_a_viewer_shows_it(orientation: int) -> None:
    """EXIF in each format that has it, in a PNG behind the pixels too, where a header says less."""
    image = Image.open(io.BytesIO(encode(PICTURE, "PNG", exif=exif(orientation))))
    upright = np.asarray(ImageOps.exif_transpose(image))
    assert (upright.shape == (23, 17, 3)) == (5 <= orientation <= 8)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(
            decoded(encode(PICTURE, kind, exif=exif(orientation), **options)), upright
        )
    late = chunk(b"eXIf", exif(orientation).tobytes()[6:])
    assert np.array_equal(decoded(png(23, 17, 8, 2, rows_of(PIXELS), late)), upright)
    xmp = b'XML:com.adobe.xmp\0<x tiff:Orientation="%d"/>' % orientation
    for text, wanted in ((xmp, upright), (b"Comment\0" + xmp, PIXELS)):
        data = png(23, 17, 8, 2, rows_of(PIXELS), chunk(b"tEXt", text))
        assert np.array_equal(decoded(data), wanted)
    jpeg = decoded(encode(PICTURE, "JPEG", exif=exif(orientation), quality=95))
    assert jpeg.shape == upright.shape


def test_damaged_exif_says_nothing_of_the_rotation() -> None:
    whole = encode(PICTURE, "JPEG", exif=exif(6), quality=95)
    broken = whole.replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\0\xff").replace(
        b"Exif\0\0II*\0", b"Exif\0\0II\xff\0"
    )
    assert broken != whole and decoded(broken).shape == (17, 23, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    colours = [(250, 10, 20), (10, 250, 20), (20, 10, 250)]
    frames = [Image.new("RGB", (9, 7), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decoded(data) == colours[0]).all()


def bmp_header(width: int, height: int) -> bytes:
    data = encode(PICTURE, "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def gif_header(width: int, height: int) -> bytes:
    data = encode(PICTURE, "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def tiff_header(width: int, height: int) -> bytes:
    data = encode(PICTURE, "TIFF")
    for tag, value in ((256, width), (257, height)):
        data = re.sub(
            re.escape(struct.pack("<HHI", tag, 4, 1)) + b"....",
            lambda found, value=value: found[0][:8] + struct.pack("<I", value),
            data,
            flags=re.DOTALL,
        )
    return data


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(encode(PICTURE, "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_header(width: int, height: int) -> bytes:
    return png(width, height, 8, 0, b"")


HEADERS: list[Callable[[int, int], bytes]] = [
    *(bmp_header, gif_header, tiff_header, jpeg_header, png_header)
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("read", [image_size, load_image])
def test_bombs_are_refused_by_their_header(
    header: Callable[[int, int], bytes], read: Callable[[bytes], object]
) -> None:
    for width, height in ((20_000, 20_000), (13_400, 13_400)):
        assert width * height > MAX_IMAGE_PIXELS
        with pytest.raises(DataError, match=r"image of \d+ bytes: .*decompression bomb"):
            read(header(width, height))


def test_text_bombs_and_pixel_bombs() -> None:
    """Compressed text of 100 MB is refused; pixels beyond the picture's are never unpacked."""
    bomb = zlib.compress(b"x" * 100_000_000)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        data = png(1, 1, 8, 0, b"\0\7", chunk(kind, head + bomb))
        with pytest.raises(DataError, match="corrupt image: Decompressed data too large"):
            load_image(data)
    assert decoded(png(1, 1, 8, 0, b"\0\7" + bytes(100_000_000))).tolist() == [[[7, 7, 7]]]


def test_a_line_of_pixels() -> None:
    line = np.random.default_rng(0).integers(0, 256, (1, 60_000, 3), dtype=np.uint8)
    assert np.array_equal(decoded(encode(Image.fromarray(line), "PNG")), line)
    with pytest.raises(DataError, match="65536x1 pixels, over the limit of 65500 a side"):
        load_image(png(65_536, 1, 8, 0, b"\0" + bytes(65_536)))


def test_files_that_are_no_images(tmp_path: Path) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>Not found</html>")
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, reason in (
        (page, r"not an image that is read here \(JPEG, PNG, .*first bytes are b'<html>Not found"),
        (empty, "empty file"),
        (tmp_path / "none.png", "no such image"),
        (tmp_path, "not a file"),
    ):
        for read in (load_image, image_size):
            with pytest.raises(DataError, match=re.escape(str(path)) + ": " + reason):
                read(path)
    with pytest.raises(DataError, match=r"image of 0 bytes: empty file"):
        load_image(b"")
    with pytest.raises(DataError, match="begins as a GIF, but its header cannot be read"):
        load_image(encode(PICTURE, "GIF")[:9])
    with pytest.raises(DataError, match="not an image that is read here"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start a program


def test_half_pictures_are_never_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    half = encode(PICTURE, "JPEG")[:-200]
    limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(DataError, match="corrupt image: image file is truncated"):
        load_image(half)
    assert (limit, truncated) == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some libraries do
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES is set in this process"):
        load_image(half)


# ---------------------------------------------------------------- 500 images


Case = tuple[bytes, np.ndarray | str]  # (file, its pixels or a pattern of its reason)


def good_images(rng: np.random.Generator) -> list[Case]:
    """165 files that are odd but right."""
    cases: list[Case] = []
    for number in range(15):
        image = noise_image(*(int(n) for n in rng.integers(1, 60, 2)), seed=number)
        pixels = np.asarray(image)
        wide = rng.integers(0, 65_536, pixels.shape, dtype=np.uint16)
        height, width = pixels.shape[:2]
        cmyk = Image.fromarray(
            np.dstack([255 - pixels, np.zeros((height, width), np.uint8)]), "CMYK"
        )
        flat = tuple(int(n) for n in rng.integers(0, 256, 3))
        moving = [Image.new("RGB", (9, 7), flat), Image.new("RGB", (9, 7), (1, 2, 3))]
        orientation = number % 8 + 1
        turned = encode(image, "PNG", exif=exif(orientation))
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
        long = rng.integers(0, 256, [(1, 60_000, 3), (60_000, 1, 3)][number % 2], dtype=np.uint8)
        one_colour = np.full((7, 9, 3), flat, np.uint8)
        cases += [
            (encode(image, "PNG"), pixels),
            (encode(image, "WEBP", lossless=True), pixels),
            (encode(image, "TIFF", compression="tiff_lzw"), pixels),
            (encode(image.convert("L"), "PNG"), gray(np.asarray(image.convert("L")))),
            (encode(cmyk, "TIFF"), pixels),
            (png(width, height, 16, 2, rows_of(wide)), (wide >> 8).astype(np.uint8)),
            (encode(Image.fromarray(wide[..., 0]), "TIFF"), gray(wide[..., 0] >> 8)),
            (encode(moving[0], "GIF", save_all=True, append_images=moving[1:]), one_colour),
            (encode(moving[0], "PNG", save_all=True, append_images=moving[1:]), one_colour),
            (turned, upright),
            (encode(Image.fromarray(long), "PNG"), long),
        ]
    return cases


def bad_images(rng: np.random.Generator) -> list[Case]:
    """335 files that cannot be used, with a pattern of the reason."""
    whole = {kind: encode(PICTURE, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM")}
    whole |= {"WEBP": encode(PICTURE, "WEBP"), "AVIF": encode(PICTURE, "AVIF")}
    cut = r"corrupt image|empty file|not an image that is read here"
    cases: list[Case] = []
    for data in whole.values():  # cut off at any place
        places = [0, *rng.integers(1, len(data) - 16, 19)]
        cases += [(data[:place], "empty file" if not place else cut) for place in places]
    for _ in range(70):  # a byte of a PNG changed: every one is under a checksum
        data = bytearray(whole["PNG"])
        data[rng.integers(0, len(data))] ^= int(rng.integers(1, 256))
        cases.append((bytes(data), r"corrupt image|not an image that is read here|bomb|a side"))
    for number in range(20):
        noise = rng.integers(0, 256, int(rng.integers(1, 500)), dtype=np.uint8).tobytes()
        side = int(rng.integers(13_400, 60_000))
        cases += [
            (bytes(number + 1), "not an image that is read here"),
            (b"\xfe" + noise, "not an image that is read here"),
            (HEADERS[number % 5](side, side), "decompression bomb"),
            (png_header(65_536 + number, 1), "over the limit of 65500 a side"),
        ]
    for number in range(25):
        floats = Image.fromarray(np.full((3, 4), 256 + number, np.float32))
        cases.append((encode(floats, "TIFF"), "only 0 to 1 and 0 to 255 are known"))
    return cases


def test_five_hundred_images(tmp_path: Path) -> None:
    """Each is decoded to the right pixels or put aside with the right reason; none is lost."""
    rng = np.random.default_rng(0)
    cases = [*good_images(rng), *bad_images(rng)]
    assert (len(cases), sum(isinstance(wanted, str) for _, wanted in cases)) == (500, 335)
    order = rng.permutation(500)
    suffixes = ["jpg", "png", "gif", "webp", "txt"]  # right or wrong: content decides
    with (tmp_path / "rows.jsonl").open("w") as out:
        for place in order:
            name = f"{place}.{suffixes[place % 5]}"
            (tmp_path / name).write_bytes(cases[place][0])
            row = {"id": str(place), "image": name, "question": "<image>\n?", "answer": "1"}
            out.write(json.dumps(row) + "\n")
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_bad=335)
    rows = read_rows(tmp_path / "rows.jsonl", kind="question", quarantine=quarantine)
    good = check_images(rows, quarantine=quarantine)
    wanted = {str(place) for place in order if not isinstance(cases[place][1], str)}
    assert [row.data["id"] for row in good] == [str(p) for p in order if str(p) in wanted]
    for row in good:
        (image,) = row.load_images()
        assert np.array_equal(np.asarray(image), cases[int(row.data["id"])][1]), row.data
        assert row.image_sizes() == [image.size]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert (len(good), len(lines), quarantine.count) == (165, 335, 335)
    for line in map(json.loads, lines):
        pattern = cases[int(line["row"]["id"])][1]
        assert isinstance(pattern, str) and re.search(pattern, line["reason"]), line
        assert line["row"]["image"] in line["reason"], line
