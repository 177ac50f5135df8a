"""What a sample takes of a pack, found without decoding an image; and over-long text in pieces.

row --text's tokens, images' headers--> (tokens, tiles) --PackLimits--> one sample | pieces | bad
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist
from tqdm import tqdm

from internvl.data import Kind, Row
from internvl.data.checks import settings_digest
from internvl.data.fingerprint import fingerprint
from internvl.data.rows import Sizes
from internvl.encoding import Encoder
from internvl.errors import DataError
from internvl.packing import Example
from sft.config import SFTConfig
from sft.splitting import split_long

RowSizes = NDArray[np.int32]  # [rows, 2]: tokens, tiles


@dataclass(frozen=True)
class PackLimits:
    """What a pack holds, and what a sample of it may be.

    tokens, tiles: of a pack (tiles None: no limit). longest: tokens of a sample.
    """

    tokens: int
    tiles: int | None
    longest: int

    def fault(self, tokens: int, tiles: int, *, text: bool) -> str | None:
        """Why a sample of this size goes in no pack, or None; over-long text is split instead."""
        if self.tiles is not None and tiles > self.tiles:
            return (
                f"{tiles} tiles, over max_tiles_per_microbatch {self.tiles}: more than a pack "
                "holds (never cut; see max_tiles)"
            )
        if tokens > self.longest and not text:
            return (
                f"{tokens} tokens, over the {self.longest} of a sample in a pack (with images "
                "it is never cut; see max_tiles)"
            )
        return None


def with_length(example: Example) -> Example:
    """The sample with the number of its response tokens, the averaging's x, as a value."""
    assert example.loss_masks is not None
    lengths = [float(sum(mask)) for mask in example.loss_masks]
    return _with_values(example, lengths, [0.0] * len(lengths))


def _with_values(example: Example, lengths: list[float], dropped: list[float]) -> Example:
    return replace(example, completion_values={"sample_length": lengths, "dropped": dropped})


def split_example(example: Example, longest: int) -> list[Example]:
    """A sample without images as several of at most `longest` tokens; see sft/splitting.py."""
    assert example.loss_masks is not None and not len(example.tiles)
    (completion,), (mask,) = example.completions, example.loss_masks
    ids = [*example.prompt_ids, *completion]
    split = split_long(ids, [*(False for _ in example.prompt_ids), *mask], longest)
    return [
        _with_values(
            replace(
                example,
                prompt_ids=piece.ids[: piece.prompt_length],
                completions=[piece.ids[piece.prompt_length :]],
                loss_masks=[piece.mask[piece.prompt_length :]],
            ),
            [float(piece.sample_length)],
            [float(piece.dropped)],
        )
        for piece in split.pieces
    ]


class Measure:
    """What each row takes of a pack, by reading its text and its images' headers.

    encode: a row to its Example, for text that is to be split. known: sizes that were measured
    before.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: Encoder,
        limits: PackLimits,
        encode: Callable[[Row], Example],
        known: RowSizes | None = None,
    ):
        self.rows = rows
        self.limits = limits
        self.known = known
        self._encoder = encoder
        self._encode = encode

    def size(self, number: int) -> tuple[int, int]:
        """Tokens and tiles of a row; raises `DataError` where it cannot be used."""
        if self.known is not None:
            tokens, tiles = self.known[number].tolist()
            return tokens, tiles
        row = self.rows[number]
        row.check_paths()
        return self._encoder.size(row, "conversation")

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """The sizes of what a row gives: itself, or the pieces of over-long text.

        Raises `DataError` where it cannot be used.
        """
        tokens, tiles = self.size(number)
        if tokens <= self.limits.longest and self.limits.fault(tokens, tiles, text=False) is None:
            return [(tokens, tiles)]
        row = self.rows[number]
        if fault := self.limits.fault(tokens, tiles, text=row.is_text):
            raise DataError(fault)
        return [(e.num_tokens, 0) for e in split_example(self._encode(row), self.limits.longest)]


@dataclass
class PackingEncoder(Encoder):
    """An Encoder that finds a row at fault by what goes into a pack; see `PackLimits.fault`."""

    pack_tokens: int = 2**31
    pack_tiles: int | None = None

    def limits(self) -> list[object]:
        """The Encoder's, and those of a pack."""
        return [*super().limits(), self.pack_tokens, self.pack_tiles]

    def length_fault(
        self, row: Row, kind: Kind, room: int = 0, sizes: Sizes | None = None
    ) -> str | None:
        """Why a row whose images are good goes in no pack, or None."""
        try:
            tokens, tiles = self.size(row, kind, sizes)
        except DataError as error:
            return str(error)
        longest = min(self.max_length, self.pack_tokens)
        limits = PackLimits(self.pack_tokens, self.pack_tiles, longest)
        return limits.fault(tokens, tiles, text=row.is_text)


def pack_limits(args: SFTConfig, encoder: Encoder) -> PackLimits:
    """The limits that the options and the model set."""
    tokens = args.max_tokens_per_microbatch
    longest = min(tokens, encoder.max_length)
    return PackLimits(tokens, args.max_tiles_per_microbatch, longest)


def checking_encoder(args: SFTConfig, encoder: Encoder) -> Encoder:
    """What the rows that are trained on are checked by: without packing the encoder itself."""
    if not args.packing:
        return encoder
    return PackingEncoder(
        **vars(encoder),
        pack_tokens=args.max_tokens_per_microbatch,
        pack_tiles=args.max_tiles_per_microbatch,
    )


def _on_every_rank(here: bool) -> bool:
    """Whether something is so on all ranks; the same answer on each."""
    if not dist.is_initialized():
        return here
    found = [here] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return all(found)


def measure_all(measure: Measure, encoder: Encoder, args: SFTConfig) -> RowSizes:
    """The sizes of every row: each rank measures its share, and the first keeps them for a restart.

    Raises `DataError` for a row that cannot be used.
    """
    rows, what = measure.rows, fingerprint(measure.rows)
    file = None
    if what is not None:
        name = f"sizes-{what}-{settings_digest(encoder, 'conversation', 0)[:16]}.npy"
        file = Path(args.output_dir or "") / "checked_rows" / name
        if _on_every_rank(file.is_file()):  # where nodes have disks of their own, the first's alone
            return np.load(file, mmap_mode="r", allow_pickle=False)
    found = np.zeros((len(rows), 2), np.int32)
    mine = range(args.process_index, len(rows), args.world_size)
    quiet = bool(args.disable_tqdm) or args.process_index > 0
    for number in tqdm(mine, desc="measuring rows", unit="row", delay=2, disable=quiet):
        try:
            found[number] = measure.size(number)
        except DataError as error:
            row = rows[number]
            raise DataError(f"{row.file}:{row.line}: {error}") from None
    if dist.is_initialized():
        shares: list[RowSizes] = [found[:0]] * dist.get_world_size()
        dist.all_gather_object(shares, found[mine.start :: mine.step])
        for rank, share in enumerate(shares):
            found[rank :: mine.step] = share
    if file is not None and args.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".half")
        with half.open("wb") as out:
            np.save(out, found, allow_pickle=False)
        os.replace(half, file)
    return found
