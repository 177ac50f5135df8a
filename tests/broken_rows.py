"""Two hundred rows that no trainer may see, each with the kind of what is wrong with it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from plain import noise_image

Broken = tuple[bytes, str]  # a line without its line break, and its kind in `mmpr.check`
GOOD = {"id": "g", "image": "good.png", "question": "<image>\nHow many?", "answer_gt": "3"}


def encode(kind: str, size: tuple[int, int] = (30, 20)) -> bytes:
    out = io.BytesIO()
    noise_image(*size, 0).save(out, kind)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return signature + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\x09IDAT" + bytes(13)


def pair(**fields: Any) -> dict[str, Any]:
    number = json.dumps(fields, default=str, sort_keys=True)
    return {**GOOD, "chosen": f"Three. {number}", "rejected": "Four.", **fields}


def line(record: Any) -> bytes:
    return json.dumps(record).encode()


def write_pictures(folder: Path) -> None:
    """good.png, one outside of the folder, and a link to it."""
    folder.mkdir(parents=True, exist_ok=True)
    noise_image(30, 20, 1).save(folder / "good.png")
    noise_image(30, 20, 2).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "folder.png").mkdir()


def corrupt_images(folder: Path) -> Iterator[str]:
    """Names of image files that cannot be decoded, 50 of them."""
    png, jpeg, webp = encode("PNG"), encode("JPEG"), encode("WEBP")
    broken = {f"png-{n}.png": png[: len(png) * n // 20] for n in range(1, 20)}
    broken |= {f"jpeg-{n}.jpg": jpeg[: len(jpeg) * n // 20] for n in range(1, 15)}
    for n in range(10):  # a byte of the pixels changed
        place = len(png) // 3 + n
        broken[f"flipped-{n}.png"] = png[:place] + bytes([png[place] ^ 1]) + png[place + 1 :]
    broken |= {"empty.png": b"", "text.png": b"<html>not found</html>", "zip.png": b"PK\x03\x04"}
    broken |= {"svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "webp.webp": webp[:60]}
    broken |= {"nothing.png": b"\0" * 500, "noise.jpg": jpeg[:20] + b"\xff" * 200}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    return iter(broken)


def broken_images(folder: Path) -> Iterator[tuple[Any, str]]:
    """(the field `image`, kind) of images that cannot be used."""
    for name in corrupt_images(folder):
        yield name, "corrupt image or video"
    for width, height in [(100_000, 100_000), (70_000, 1), (1, 70_000), (20_000, 20_000)]:
        (folder / f"{width}x{height}.png").write_bytes(png_header(width, height))
        yield f"{width}x{height}.png", "image too large"
    Image.new("1", (15_000, 15_000)).save(folder / "bomb.png")
    yield "bomb.png", "image too large"
    for name in ("../outside.png", "link.png", "/etc/hostname", "a/../../outside.png", "../none"):
        yield name, "path outside its root"
    for name in ("http://a.b/c.png", "s3://b/c.png", "data:image/png;base64,AAAA", "a\0b.png"):
        yield name, "not a path"
    for name in ("none.png", "GOOD.PNG", "good.png ", "folder.png", "good.png/x", "é.png"):
        yield name, "missing image or video"
    for value in (5, True, {"name": "x"}, {"bytes": None, "path": None}, ["good.png", 5], [""]):
        yield value, "wrong field"


def broken_texts() -> Iterator[tuple[dict[str, Any], str]]:
    """(fields, kind) of pairs whose texts or placeholders are wrong."""
    for name in ("question", "chosen", "rejected"):
        for value in ("", " ", "\n\t", "\u3000", "\ud83d half"):
            if name != "question" or value.strip():  # a picture alone may be a question
                yield {name: value}, "no text"
        for wrong in (None, 5, 2.5, ["a"], {"a": 1}, True):
            yield {name: wrong}, "wrong field"
        for token in ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"):
            text = f"<image>\nSay {token}" if name == "question" else f"Say {token} {name}"
            yield {name: text}, "control token"
    for text in ("Three.", "三", "🙂", "a b", "5", "\\boxed{5}"):
        yield {"chosen": text, "rejected": text}, "identical pair"
        yield {"chosen": text, "rejected": f" {text}\n"}, "identical pair"
    yield {"chosen": "a b", "rejected": "a  b"}, "identical pair"
    for question, image in [
        ("<image><image>?", "good.png"), ("<image> <image> <image>", ["good.png"] * 2),
        ("How?", ["good.png"] * 2), ("<image>?", ["good.png"] * 3), ("<image>?", None),
        ("<image>?", ""), ("<image>?", []), ("<video>?", "good.png"),
    ]:  # fmt: skip
        yield {"question": question, "image": image}, "placeholders differ from images"
    for name in ("max_tiles", "num_frames"):
        for number in (0, -1, 1.5, "4"):
            yield {name: number}, "wrong field"
    yield {"system": 5}, "wrong field"
    yield {"video": "v.mp4", "question": "<image><video>?"}, "wrong field"
    yield {"images": "good.png"}, "wrong field"
    yield {"video": 5}, "wrong field"


def broken_lines() -> Iterator[bytes]:
    """Lines that hold no record."""
    whole = line(pair(id="torn"))
    yield from (whole[: len(whole) * n // 10] for n in range(1, 10))
    yield from (b"null", b"5", b'"text"', b"[1, 2]", b"true", b"{}}", b"{'id': 1}", b"\xff\xfe{}")
    yield from (b"[" * 100_000, b'{"a": "\x00"}', whole + whole, b"# a comment", b"{,}")


def broken_pairs(folder: Path) -> list[Broken]:
    """All of them; the pictures lie in `folder`, which `write_pictures` has filled."""
    rows = [(raw, "not a record") for raw in broken_lines()]
    rows += [(line(pair(image=image)), kind) for image, kind in broken_images(folder)]
    rows += [(line(pair(**fields)), kind) for fields, kind in broken_texts()]
    for n, name in zip(range(19), ("chosen", "rejected", "question") * 7, strict=False):
        fields = {name: "<image>\n" * (name == "question") + "The red bar is 7. " * (60 + n)}
        rows.append((line(pair(**fields)), "too long"))  # of 300 tokens
    rows += [(line(pair(id=f"d{n % 3}", chosen=f"{n % 3}")), "duplicate") for n in range(3, 9)]
    return rows


def firsts_of_duplicates() -> list[bytes]:
    """The good rows that the duplicates repeat."""
    return [line(pair(id=f"d{n}", chosen=f"{n}")) for n in range(3)]
