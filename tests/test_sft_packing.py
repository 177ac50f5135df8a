"""The stream packer of SFT: its rule by hand and against a slow twin, and what always holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import packing as benchmark
from internvl.errors import DataError, UserError
from sft.packing import Fill, Item, Pack, Packer

SIZES = st.tuples(st.integers(1, 12), st.integers(0, 4))
STREAMS = st.lists(SIZES, max_size=40).map(
    lambda sizes: [Item(key, *size) for key, size in enumerate(sizes)]
)
SETTINGS = st.fixed_dictionaries(
    {
        "max_tokens": st.just(12),
        "max_tiles": st.sampled_from([None, 4]),
        "buffer_size": st.integers(1, 4),
        "hold_tile_full": st.booleans(),
        "max_wait": st.sampled_from([None, 1, 2]),
    }
)


def keys(packs: Sequence[Pack]) -> list[list[int]]:
    return [[item.key for item in pack.items] for pack in packs]


def add_all(packer: Packer, sizes: Sequence[tuple[int, int]]) -> list[list[list[int]]]:
    """What each of some items finishes; their keys are 0, 1, ..."""
    return [keys(packer.add(Item(key, *size))) for key, size in enumerate(sizes)]


@dataclass
class Slow:
    """The rule again, with a plain list in the order of change and a search through all of it."""

    max_tokens: int
    max_tiles: int | None
    buffer_size: int
    hold_tile_full: bool
    max_wait: int | None
    open: list[dict] = field(default_factory=list)
    out: list[list[int]] = field(default_factory=list)
    seen: list[Item] = field(default_factory=list)

    def add(self, item: Item) -> None:
        self.seen.append(item)
        tiles = float("inf") if self.max_tiles is None else self.max_tiles
        fits = [
            pack
            for pack in self.open
            if pack["tokens"] + item.tokens <= self.max_tokens
            and pack["tiles"] + item.tiles <= tiles
        ]
        if fits:  # max() takes the first of equals: that which has been so long the longest
            pack = max(fits, key=lambda pack: (pack["tokens"], pack["tiles"]))
            self.open.remove(pack)
        else:
            pack = {"tokens": 0, "tiles": 0, "keys": [], "opened": len(self.out)}
        pack["tokens"] += item.tokens
        pack["tiles"] += item.tiles
        pack["keys"].append(item.key)
        needs_more_for_tiles = sum(i.tiles for i in self.seen) / tiles > (
            sum(i.tokens for i in self.seen) / self.max_tokens
        )
        wait_for_text = self.hold_tile_full and not needs_more_for_tiles
        if pack["tokens"] == self.max_tokens or (pack["tiles"] == tiles and not wait_for_text):
            self.out.append(pack["keys"])
        else:
            self.open.append(pack)
            if len(self.open) > self.buffer_size:
                self.emit(self.by_length()[0])
        while self.max_wait is not None and self.open:
            oldest = min(self.by_length(), key=lambda pack: pack["opened"])
            if len(self.out) < oldest["opened"] + self.max_wait * self.buffer_size:
                break
            self.emit(oldest)

    def by_length(self) -> list[dict]:
        return sorted(self.open, key=lambda pack: (-pack["tokens"], -pack["tiles"]))

    def emit(self, pack: dict) -> None:
        self.open.remove(pack)
        self.out.append(pack["keys"])


# --- by hand ---------------------------------------------------------------------------------


def test_the_longest_pack_with_room_is_taken() -> None:
    packer = Packer(10, None, 5)
    assert add_all(packer, [(6, 0), (7, 0), (8, 0), (3, 0)]) == [[], [], [], [[1, 3]]]
    assert keys(packer.open_packs) == [[2], [0]]


def test_of_equally_long_packs_the_one_with_most_tiles_is_taken() -> None:
    packer = Packer(20, 8, 5)
    assert add_all(packer, [(11, 1), (11, 3), (11, 2), (2, 1)]) == [[], [], [], []]
    assert keys(packer.open_packs) == [[1, 3], [2], [0]]


def test_a_pack_without_room_for_the_tiles_is_passed_over() -> None:
    packer = Packer(20, 4, 5)
    add_all(packer, [(15, 3), (14, 1), (13, 0), (4, 2)])
    assert keys(packer.open_packs) == [[1, 3], [0], [2]]


def test_an_overflow_emits_the_longest() -> None:
    packer = Packer(10, None, 2)
    assert add_all(packer, [(7, 0), (6, 0), (8, 0)]) == [[], [], [[2]]]
    assert keys(packer.open_packs) == [[0], [1]]
    assert packer.fill == Fill(10, None, packs=1, items=1, tokens=8, overflow=1)


def test_a_pack_with_all_its_tiles_waits_for_text_while_tokens_are_scarcer() -> None:
    # items 1 and 2 have 8 of 10 tokens and all 4 tiles; item 3 is text
    sizes = [(7, 0), (4, 2), (4, 2), (2, 0)]
    assert add_all(Packer(10, 4, 5), sizes)[2:] == [[], [[1, 2, 3]]]
    published = Packer(10, 4, 5, hold_tile_full=False, max_wait=None)
    assert add_all(published, sizes)[2:] == [[[1, 2]], []]
    assert published.fill == Fill(10, 4, packs=1, items=2, tokens=8, tiles=4, full=1)


def test_a_pack_with_all_its_tiles_is_emitted_while_tiles_are_scarcer() -> None:
    # 8 of 10 tokens against 4 of 4 tiles: the stream needs its packs for the tiles
    assert add_all(Packer(10, 4, 5), [(4, 2), (4, 2)]) == [[], [[0, 1]]]
    # 19 tokens and 8 tiles; with 20 the one is as scarce as the other
    assert add_all(Packer(10, 4, 5), [(7, 0), (6, 4), (6, 4)]) == [[], [], [[2]]]
    assert add_all(Packer(10, 4, 5), [(7, 0), (6, 4), (7, 4)]) == [[], [], []]


def test_no_pack_waits_for_more_than_max_wait_buffers() -> None:
    sizes = [(2, 0), *[(9, 0)] * 6]
    unbounded = Packer(10, None, 2, max_wait=None)
    assert add_all(unbounded, sizes) == [[], [], [[1]], [[2]], [[3]], [[4]], [[5]]]
    # 2 x 2 packs are emitted after item 0 came: it goes behind the fourth
    waiting = Packer(10, None, 2, max_wait=2)
    assert add_all(waiting, sizes) == [[], [], [[1]], [[2]], [[3]], [[4], [0]], []]
    assert waiting.fill.waited == 1 and waiting.fill.overflow == 4
    # the default is 5: here the fifth pack behind it
    assert add_all(Packer(10, None, 1), sizes)[1:] == [[[1]], [[2]], [[3]], [[4]], [[5], [0]], []]


def test_the_end_of_the_data_gives_what_is_open_longest_first() -> None:
    packer = Packer(10, 4, 5)
    add_all(packer, [(6, 1), (8, 0), (7, 2)])
    assert keys(packer.flush()) == [[1], [2], [0]]
    assert packer.open_packs == () and packer.flush() == []
    assert packer.fill == Fill(10, 4, packs=3, items=3, tokens=21, tiles=3, flushed=3)
    assert packer.fill.token_fill == 0.7 and packer.fill.tile_fill == 0.25


def test_fill_before_the_first_pack_and_without_tiles() -> None:
    assert Packer(10, 4).fill.token_fill == 0.0 and Packer(10, 4).fill.tile_fill == 0.0
    assert Packer(10).fill.tile_fill is None


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "tiles", "reason"),
    [
        (11, 0, "11 tokens, over the 10 of a pack"),
        (3, 5, "5 tiles, over the 4 of a pack"),
        (0, 1, "0 tokens and 1 tiles are no size of a sample"),
        (3, -1, "3 tokens and -1 tiles are no size of a sample"),
    ],
)
def test_an_item_that_fits_no_pack_is_refused_by_name(tokens: int, tiles: int, reason: str) -> None:
    packer = Packer(10, 4)
    packer.add(Item("first", 2, 1))
    before = packer.state()
    item = Item(["charts", 7], tokens, tiles)
    assert packer.refusal(item) == reason
    with pytest.raises(DataError) as error:
        packer.add(item)
    assert str(error.value) == f"sample ['charts', 7]: {reason}"
    assert packer.state() == before
    assert packer.refusal(Item(0, 10, 4)) is None
    assert Packer(10).refusal(Item(0, 10, 1000)) is None


@pytest.mark.parametrize("name", ["max_tokens", "max_tiles", "buffer_size", "max_wait"])
def test_settings_below_one_are_refused(name: str) -> None:
    settings = {"max_tokens": 5, name: 0}
    with pytest.raises(UserError, match=f"packing: {name} is 0, at least 1 is needed"):
        Packer(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 11),
        ("max_tiles", None),
        ("buffer_size", 3),
        ("hold_tile_full", False),
        ("max_wait", None),
    ],
)
def test_a_state_of_other_settings_is_refused(name: str, value: object) -> None:
    settings = {"max_tokens": 10, "max_tiles": 4, "buffer_size": 2, "max_wait": 2}
    state = Packer(**settings).state()
    with pytest.raises(UserError, match=f"packing: {name} is {value}, but the stream was begun"):
        Packer(**{**settings, name: value}).restore(state)


# --- what always holds -----------------------------------------------------------------------


@given(STREAMS, SETTINGS)
def test_the_rule_is_that_of_a_search_through_everything(items: list[Item], settings: dict) -> None:
    packer, slow = Packer(**settings), Slow(**settings)
    out = []
    for item in items:
        out += keys(packer.add(item))
        slow.add(item)
        assert out == slow.out
    assert keys(packer.flush()) == [pack["keys"] for pack in slow.by_length()]


@given(STREAMS, SETTINGS)
def test_every_item_once_within_the_limits_and_the_account_is_true(
    items: list[Item], settings: dict
) -> None:
    packer = Packer(**settings)
    out: list[Pack] = []
    for item in items:
        out += packer.add(item)
        assert len(packer.open_packs) <= settings["buffer_size"]
        if settings["max_wait"] is not None:
            bound = settings["max_wait"] * settings["buffer_size"]
            assert all(packer.fill.packs - pack.opened < bound for pack in packer.open_packs)
    out += packer.flush()
    assert packer.open_packs == ()
    assert sorted(key for pack in keys(out) for key in pack) == list(range(len(items)))
    for pack in out:
        assert list(pack.items) == [items[item.key] for item in pack.items]
        assert [item.key for item in pack.items] == sorted(item.key for item in pack.items)
        assert pack.tokens == sum(item.tokens for item in pack.items) <= 12
        assert pack.tiles == sum(item.tiles for item in pack.items)
        assert settings["max_tiles"] is None or pack.tiles <= settings["max_tiles"]
    fill = packer.fill
    assert fill.packs == len(out) == fill.full + fill.overflow + fill.waited + fill.flushed
    assert fill.items == len(items)
    assert fill.tokens == sum(item.tokens for item in items)
    assert fill.tiles == sum(item.tiles for item in items)


@given(STREAMS, SETTINGS, st.data())
def test_resumed_anywhere_is_uninterrupted(
    items: list[Item], settings: dict, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(items)))
    whole, before = Packer(**settings), Packer(**settings)
    expected = [whole.add(item) for item in items]
    out = [before.add(item) for item in items[:cut]]
    saved = json.dumps(before.state())
    state = json.loads(saved)
    after = Packer(**settings)
    after.add(Item("of another stream", 1, 0))  # what was there is replaced
    after.restore(state)
    assert after.open_packs == before.open_packs and after.fill == before.fill
    before.flush()  # a state is a copy, not a view
    assert after.state() == state
    out += [after.add(item) for item in items[cut:]]
    assert out == expected
    assert after.state() == whole.state()
    assert after.flush() == whole.flush() and after.fill == whole.fill
    assert json.dumps(state) == saved  # what it was restored from is not written to


# --- the benchmark ---------------------------------------------------------------------------


def test_the_published_buffer_of_the_benchmark_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MAX_TOKENS", 10)
    monkeypatch.setattr(benchmark, "MAX_TILES", 4)
    rule = benchmark.Published(2)
    # by tiles: [1], [0]; 2 tokens go to the first of them although the second is longer
    assert add_all(rule, [(7, 0), (5, 1), (2, 0)]) == [[], [], []]
    assert keys(rule.open_packs) == [[1, 2], [0]]
    # all tiles: emitted with 8 of 10 tokens; then an overflow emits what has most tiles
    assert add_all(rule, [(1, 3)]) == [[[1, 2, 0]]]
    assert add_all(rule, [(9, 2), (8, 1)]) == [[], [[0]]]


def test_packs_are_fuller_than_the_published_ones_at_the_published_limits() -> None:
    items = benchmark.stream(benchmark.SFT, 3000, seed=7)
    assert benchmark.best_fill(items) == (1.0, "tokens")
    fill = {rule: benchmark.figures(make(20), items) for rule, make in benchmark.RULES.items()}
    assert fill["ours"]["fill"] >= 0.98
    assert fill["ours"]["fill"] > fill["paper"]["fill"] > fill["published"]["fill"] + 0.03
