"""Weights on disk, read and written by byte ranges: no whole tensor is ever held in memory.

    Weights (safetensors, or a foreign pickle)  --read(segment)-->  blocks of at most 16 MiB
    [Target(name, shape, segments)]             --write_weights-->  model*.safetensors, index

A target's bytes are ranges of source tensors one after the other: renaming, splitting and joining
along the first dimension need no more, in any dtype, without a rounding. So a model of any size
converts within the same few megabytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from internvl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 1 << 24
MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 100_000_000  # what safetensors itself allows
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_TORCH_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (as safetensors spells it) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of one index of the first dimension."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of the source tensor `source`."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Target:
    """A tensor to be written: its bytes are those of `segments`, one after the other."""

    name: str
    info: TensorInfo
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        size = sum(segment.stop - segment.start for segment in self.segments)
        assert size == self.info.nbytes, f"{self.name}: {size} bytes for {self.info}"


class Weights(Protocol):
    """The tensors of a checkpoint folder; `read` gives a segment's bytes in blocks."""

    tensors: dict[str, TensorInfo]

    def read(self, segment: Segment) -> Iterator[memoryview | bytes]:
        """The segment's bytes, in blocks of at most BLOCK_BYTES."""
        ...


def open_weights(folder: Path, *, allow_pickle: bool) -> Weights:
    """The weights of a folder: safetensors, or with allow_pickle also pytorch_model*.bin.

    Raises `UserError` where there are none, where a file is missing, cut or no safetensors, and
    for a pickle that was not allowed.
    """
    if (folder / INDEX).is_file():
        return SafetensorsWeights(_indexed_files(folder, INDEX))
    if (folder / SINGLE).is_file():
        return SafetensorsWeights([folder / SINGLE])
    if (folder / PICKLE_INDEX).is_file():
        files = _indexed_files(folder, PICKLE_INDEX)
    elif (folder / PICKLE_SINGLE).is_file():
        files = [folder / PICKLE_SINGLE]
    else:
        raise UserError(
            f"{folder}: no weights there: neither {SINGLE}, {INDEX} nor {PICKLE_SINGLE}"
        )
    if not allow_pickle:
        raise UserError(
            f"{files[0]} is a pickle, which can run code when it is opened by other tools; it is "
            "read only when asked for (--allow-pickle), and then as tensors only"
        )
    return PickledWeights(files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `UserError` naming the file otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _indexed_files(folder: Path, index: str) -> list[Path]:
    """The files that an index names, in the order of their names; each must be there."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / index}: names {name!r}, a file outside the folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name}, which {index} names, is not there")
    return [folder / name for name in names]


# ---------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


class SafetensorsWeights:
    """Tensors in safetensors files; only headers are read until `read` is called."""

    def __init__(self, files: Sequence[Path]):
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        for file in files:
            for name, info, offset in _read_header(file):
                if name in self.tensors:
                    other = self._places[name].file.name
                    raise UserError(f"{file}: tensor {name!r} is also in {other}")
                self.tensors[name] = info
                self._places[name] = _Place(file, offset)

    def read(self, segment: Segment) -> Iterator[memoryview | bytes]:
        """See `Weights.read`."""
        place = self._places[segment.source]
        with place.file.open("rb") as file:
            file.seek(place.offset + segment.start)
            left = segment.stop - segment.start
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    raise UserError(f"{place.file}: ends within tensor {segment.source!r}")
                left -= len(block)
                yield block


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo, int]]:
    """Name, dtype and shape, and offset in the file of each tensor of a safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{file}: is no safetensors file, or was cut ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{file}: its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: its header is a {type(header).__name__}, expected an object")
    data = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}: tensor {name!r} has a header that says {entry!r}") from None
        if dtype not in DTYPE_BYTES:
            raise UserError(
                f"{file}: tensor {name!r} has dtype {dtype}; quantized weights cannot be "
                f"converted, take the original checkpoint ({', '.join(DTYPE_BYTES)})"
            )
        info = TensorInfo(dtype, shape)
        if begin < 0 or end - begin != info.nbytes:
            raise UserError(f"{file}: tensor {name!r} has {end - begin} bytes for {info}")
        if data + end > size:
            raise UserError(
                f"{file}: was cut: tensor {name!r} ends at byte {data + end}, the file at {size}"
            )
        yield name, info, data + begin


class HeldWeights:
    """Tensors that are in memory (or mapped into it)."""

    def __init__(self, held: Mapping[str, Tensor]):
        self._held = dict(held)
        self.tensors = {
            name: TensorInfo(_TORCH_DTYPES[str(tensor.dtype)], tuple(tensor.shape))
            for name, tensor in held.items()
        }

    def read(self, segment: Segment) -> Iterator[memoryview | bytes]:
        """See `Weights.read`."""
        import torch

        flat = self._held[segment.source].contiguous().flatten().view(torch.uint8).numpy()
        for start in range(segment.start, segment.stop, BLOCK_BYTES):
            yield flat[start : min(start + BLOCK_BYTES, segment.stop)].data


class PickledWeights(HeldWeights):
    """Tensors in pytorch_model*.bin, opened with weights_only=True and mapped, not loaded."""

    def __init__(self, files: Sequence[Path]):
        held: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _unpickle(file).items():
                if str(tensor.dtype) not in _TORCH_DTYPES:
                    raise UserError(f"{file}: tensor {name!r} has dtype {tensor.dtype}")
                if name in held:
                    raise UserError(f"{file}: tensor {name!r} is in another file too")
                held[name] = tensor
        super().__init__(held)


class JoinedWeights:
    """Tensors of several checkpoints, by new names: {name: (weights, its name there)}."""

    def __init__(self, places: Mapping[str, tuple[Weights, str]]):
        self._places = dict(places)
        self.tensors = {name: weights.tensors[there] for name, (weights, there) in places.items()}

    def without(self, name: str) -> JoinedWeights:
        """The same but for one tensor."""
        return JoinedWeights({key: place for key, place in self._places.items() if key != name})

    def read(self, segment: Segment) -> Iterator[memoryview | bytes]:
        """See `Weights.read`."""
        weights, there = self._places[segment.source]
        return weights.read(Segment(there, segment.start, segment.stop))


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, mapped into memory where its format allows."""
    import pickle

    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read as tensors only: {reason}") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise UserError(f"{file}: is no mapping of names to tensors")
    return content


# ---------------------------------------------------------------------------------- writing


def write_weights(
    folder: Path,
    targets: Sequence[Target],
    weights: Weights,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write targets in their order as safetensors: one file, or shards with an index.

    A shard holds at most max_shard_bytes, or one larger tensor. The bar counts bytes.
    """
    from tqdm import tqdm

    total = sum(target.info.nbytes for target in targets)
    shards = _split(targets, max_shard_bytes)
    weight_map = {}
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / name, shard, weights, bar)
            weight_map.update(dict.fromkeys((target.name for target in shard), name))
    if len(shards) > 1:
        parameters = sum(math.prod(target.info.shape) for target in targets)
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": weight_map,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _split(targets: Sequence[Target], max_shard_bytes: int) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    room = max_shard_bytes
    for target in targets:
        if shards[-1] and target.info.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(target)
        room -= target.info.nbytes
    return shards


def _write_shard(path: Path, targets: Sequence[Target], weights: Weights, bar: Any) -> None:
    """One safetensors file: header length, header, then the tensors' bytes without gaps."""
    # wide dtypes first, so that every tensor is aligned to its own width
    ordered = sorted(targets, key=lambda target: -DTYPE_BYTES[target.info.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in ordered:
        info = target.info
        header[target.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for target in ordered:
            for segment in target.segments:
                for block in weights.read(segment):
                    file.write(block)
                    bar.update(len(block))
