"""A stream of samples into packs: select, search, pack, maintain (InternVL 2.5, section 3.2).

    item -> select: within both limits by itself? (split_long cuts text; nothing else is cut)
         -> search: the longest open pack that has room for it; of equally long ones, most tiles
         -> pack:   put it there, or open a pack with it
         -> maintain: emit packs that are full, and one when more than buffer_size are open

The packer sees sizes and never samples: a caller may hold rows' numbers and encode them when their
pack comes out. It is deterministic, and what it holds is a few numbers that can be saved, so that a
stream goes on to the sample.

`Packer(..., hold_tile_full=False, max_wait=None)` is the published rule. By default two things
differ. (1) The published rule emits a pack when either limit is reached. One with all its tiles,
96 of 256 tokens, has a quarter of its 32,768 tokens free, which samples without an image can use:
it stays open while tokens are the scarcer limit of the stream so far, and is emitted at once while
tiles are, since nothing would ever fill it then. (2) When the buffer overflows the longest pack is
emitted, so a short one may wait for the rest of the epoch (25,000 samples of 30,000, seen on a
stream of images): after `max_wait` times buffer_size further packs it is emitted as it is.

The published code (InternVL's dataset_packed.py) does something else than the papers say: its
buffer is sorted by tiles alone and the first pack that fits is taken. That leaves 8 % of the tokens
empty where the papers' rule leaves 1 % and this one 0.1 %; see benchmarks/packing.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from internvl.errors import DataError, UserError


@dataclass(frozen=True)
class Item:
    """The size of a sample, and the caller's name for it.

    key: any value that JSON holds; the packer hands it on and shows it in errors. tokens, tiles:
    what the sample takes of a pack.
    """

    key: Any
    tokens: int
    tiles: int = 0


@dataclass(frozen=True)
class Pack:
    """Samples that share a row, in the order in which they came.

    opened: how many packs had been emitted when the first of them came.
    """

    items: tuple[Item, ...]
    tokens: int
    tiles: int
    opened: int = 0

    def plus(self, item: Item) -> Pack:
        """This pack with one sample more."""
        items = (*self.items, item)
        return Pack(items, self.tokens + item.tokens, self.tiles + item.tiles, self.opened)


@dataclass(frozen=True)
class Fill:
    """The account of what was emitted since the stream began, over interruptions.

    full, overflow, waited, flushed: the packs by what ended them: a limit reached, a buffer with
    too many open, `max_wait`, the end of the data.
    """

    max_tokens: int
    max_tiles: int | None
    packs: int = 0
    items: int = 0
    tokens: int = 0
    tiles: int = 0
    full: int = 0
    overflow: int = 0
    waited: int = 0
    flushed: int = 0

    @property
    def token_fill(self) -> float:
        """Tokens of the emitted packs over what they could hold (0.0 before the first)."""
        return self.tokens / (self.packs * self.max_tokens) if self.packs else 0.0

    @property
    def tile_fill(self) -> float | None:
        """The same for tiles; None without a limit of tiles."""
        if self.max_tiles is None:
            return None
        return self.tiles / (self.packs * self.max_tiles) if self.packs else 0.0


@dataclass
class _Counts:
    """What the packer counts; field by field in its state."""

    tokens_seen: int = 0
    tiles_seen: int = 0
    packs: int = 0
    items: int = 0
    tokens: int = 0
    tiles: int = 0
    ends: dict[str, int] = field(
        default_factory=lambda: {"full": 0, "overflow": 0, "waited": 0, "flushed": 0}
    )


class Packer:
    """Packs a stream of items under a limit of tokens and one of tiles, with a bounded buffer.

    max_tokens, max_tiles: of a pack (published for 3.5: 32,768 and 96; None: no limit of tiles).
    buffer_size: how many packs stay open (published: 20). hold_tile_full: a pack with all its tiles
    waits for text while tokens are scarcer. max_wait: how often as many packs as the buffer holds
    may be emitted after an item came, before its own is (None: no bound).

    >>> packer = Packer(max_tokens=10, max_tiles=4, buffer_size=2)
    >>> [packer.add(Item(key, tokens, tiles)) for key, tokens, tiles in [(0, 6, 3), (1, 7, 0)]]
    [[], []]
    >>> [[item.key for item in pack.items] for pack in packer.add(Item(2, 4, 0))]
    [[0, 2]]
    >>> [pack.tokens for pack in packer.flush()], packer.fill.token_fill
    ([7], 0.85)
    """

    def __init__(
        self,
        max_tokens: int,
        max_tiles: int | None = None,
        buffer_size: int = 20,
        *,
        hold_tile_full: bool = True,
        max_wait: int | None = 5,
    ):
        limits = {"max_tokens": max_tokens, "buffer_size": buffer_size}
        limits |= {} if max_tiles is None else {"max_tiles": max_tiles}
        limits |= {} if max_wait is None else {"max_wait": max_wait}
        for name, value in limits.items():
            if value < 1:
                raise UserError(f"packing: {name} is {value}, at least 1 is needed")
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.buffer_size = buffer_size
        self.hold_tile_full = hold_tile_full
        self.max_wait = max_wait
        self._buffer: list[Pack] = []  # descending by (tokens, tiles), the earlier first of equals
        self._counts = _Counts()

    def refusal(self, item: Item) -> str | None:
        """Why an item fits no pack, or None where it does."""
        if item.tokens < 1 or item.tiles < 0:
            return f"{item.tokens} tokens and {item.tiles} tiles are no size of a sample"
        if item.tokens > self.max_tokens:
            return f"{item.tokens} tokens, over the {self.max_tokens} of a pack"
        if self.max_tiles is not None and item.tiles > self.max_tiles:
            return f"{item.tiles} tiles, over the {self.max_tiles} of a pack"
        return None

    def add(self, item: Item) -> list[Pack]:
        """Take the next item of the stream; returns the packs that are finished by it.

        Raises DataError with the item's key where it fits no pack; nothing is changed then.
        """
        reason = self.refusal(item)
        if reason is not None:
            raise DataError(f"sample {item.key!r}: {reason}")
        self._counts.tokens_seen += item.tokens
        self._counts.tiles_seen += item.tiles
        place = self._search(item)
        opened = Pack((), 0, 0, self._counts.packs)
        pack = (opened if place is None else self._buffer.pop(place)).plus(item)
        if self._is_full(pack):
            return [self._emit(pack, "full"), *self._emit_waiting()]
        self._buffer.insert(bisect_right(self._buffer, _order(pack), key=_order), pack)
        out = []
        if len(self._buffer) > self.buffer_size:
            out.append(self._emit(self._buffer.pop(0), "overflow"))
        return out + self._emit_waiting()

    def flush(self) -> list[Pack]:
        """The packs that are still open, longest first: the data has ended."""
        out = [self._emit(pack, "flushed") for pack in self._buffer]
        self._buffer = []
        return out

    @property
    def open_packs(self) -> tuple[Pack, ...]:
        """What waits, longest first."""
        return tuple(self._buffer)

    @property
    def fill(self) -> Fill:
        """The account of the packs emitted so far."""
        counts = self._counts
        sums = (counts.packs, counts.items, counts.tokens, counts.tiles)
        return Fill(self.max_tokens, self.max_tiles, *sums, **counts.ends)

    def state(self) -> dict[str, Any]:
        """Everything that the next `add` depends on, as JSON holds it."""
        packs = [
            {"opened": pack.opened, "items": [[i.key, i.tokens, i.tiles] for i in pack.items]}
            for pack in self._buffer
        ]
        return {"settings": self._settings(), "packs": packs, "counts": asdict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`; raises UserError where the packer is set otherwise.

        Keys come back as JSON gives them: a tuple is a list afterwards.
        """
        for name, value in self._settings().items():
            saved = state["settings"][name]
            if saved != value:
                raise UserError(
                    f"packing: {name} is {value}, but the stream was begun with {saved}; "
                    "go on with that one or begin anew"
                )
        self._buffer = [
            _pack((Item(*item) for item in pack["items"]), pack["opened"])
            for pack in state["packs"]
        ]
        counts = dict(state["counts"])
        self._counts = _Counts(**{**counts, "ends": dict(counts["ends"])})

    def _settings(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "max_tiles": self.max_tiles,
            "buffer_size": self.buffer_size,
            "hold_tile_full": self.hold_tile_full,
            "max_wait": self.max_wait,
        }

    def _search(self, item: Item) -> int | None:
        """The place of the longest pack with room, of equals the one with most tiles."""
        room = self.max_tokens - item.tokens
        first = bisect_left(self._buffer, -room, key=lambda pack: -pack.tokens)
        for place in range(first, len(self._buffer)):
            tiles = self._buffer[place].tiles + item.tiles
            if self.max_tiles is None or tiles <= self.max_tiles:
                return place
        return None

    def _is_full(self, pack: Pack) -> bool:
        if pack.tokens == self.max_tokens:
            return True
        if self.max_tiles is None or pack.tiles < self.max_tiles:
            return False
        return not self.hold_tile_full or self._tiles_are_scarcer(self.max_tiles)

    def _tiles_are_scarcer(self, max_tiles: int) -> bool:
        """Whether the stream so far needs more packs for its tiles than for its tokens."""
        counts = self._counts
        return counts.tiles_seen * self.max_tokens > counts.tokens_seen * max_tiles

    def _emit_waiting(self) -> list[Pack]:
        """Emit what has waited for too many packs, the oldest first."""
        out = []
        while self.max_wait is not None and self._buffer:
            oldest = min(self._buffer, key=lambda pack: pack.opened)
            if self._counts.packs - oldest.opened < self.max_wait * self.buffer_size:
                break
            self._buffer = [pack for pack in self._buffer if pack is not oldest]
            out.append(self._emit(oldest, "waited"))
        return out

    def _emit(self, pack: Pack, end: str) -> Pack:
        counts = self._counts
        counts.packs += 1
        counts.items += len(pack.items)
        counts.tokens += pack.tokens
        counts.tiles += pack.tiles
        counts.ends[end] += 1
        return pack


def _order(pack: Pack) -> tuple[int, int]:
    return -pack.tokens, -pack.tiles


def _pack(items: Iterable[Item], opened: int) -> Pack:
    items = tuple(items)
    return Pack(items, sum(i.tokens for i in items), sum(i.tiles for i in items), opened)
