"""How full packs are, and how long samples wait: our packer beside the published one.

    python benchmarks/packing.py [--items 30000] [--seed 0] [--json]

Limits as published for InternVL3.5: 32,768 tokens, 96 tiles, a buffer of 20. Sizes only, no model;
ten seconds on one core. Three rules run over the same streams:

    ours        sft/packing.py as it is by default
    paper       the same, set to the papers' rule (hold_tile_full=False, max_wait=None)
    published   the published training code's buffer, written anew here from what it does: sorted by
                tiles alone, the first pack with room is taken, a pack at a limit is emitted, and
                the one with most tiles when the buffer overflows. (There a text-only sample also
                carries an empty tile that counts; not held against it here.)

Where the mix `sft` comes from. InternVL3.5's report (arXiv 2508.18265, section 2.2): 116 M samples
are 250 B tokens, 2,155 a sample; text-only to multimodal 1 : 2.5; up to 32 K tokens. Tiles are what
our tiling gives the images of well-known sizes under a budget of 1, 6 or 12 tiles, which is set a
data set (InternVL 2.5, section 3.1); 256 tokens a tile and 2 marks an image (a video's frame: 8
tokens, "Frame 12: " with them); videos have 8 to 32 frames, one tile each (the published script).
The shares inside text and inside multimodal data, and the lengths of the texts, are ours: no list
of them is published. Texts are log-normal, which is how lengths of chats and of reasoning lie, with
the medians below. What the choice decides is told by the other mixes: `text` has the text-only
samples alone, `images` the multimodal ones alone (there tiles are the scarcer limit), `long` texts
of half a pack and more in the middle, which no stream can pack well.

`fill` is tokens over limit of what was emitted before the stream ended; `tile_fill` the same for
tiles. `best` is the fill that no packing can exceed: the sums over the limits, whichever binds.
`offline` is best-fit-decreasing over the whole stream at once, which no loader can do (and which is
a heuristic: with two limits a stream in its own order may be packed better). `wait` is
how many samples came between a sample and its pack's end; `left` the oldest one still open.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internvl.tiling import count_tiles
from sft.packing import Item, Pack, Packer

MAX_TOKENS, MAX_TILES, BUFFER = 32_768, 96, 20
SWEEP = (10, 20, 50, 100, 200)
TILE_TOKENS, IMAGE_MARKS, FRAME_TOKENS = 256, 2, 8

PHOTOS = [(640, 480), (480, 640), (640, 427), (500, 375), (427, 640), (1024, 683)]
PAGES = [(1240, 1754), (800, 600), (850, 600), (1920, 1080), (600, 900), (1000, 400), (700, 700)]


@dataclass(frozen=True)
class Kind:
    """A kind of sample.

    share: of all samples. median, spread, longest: of its text's log-normal length. images: how
    many, fewest and most. sizes: theirs in pixels. budgets: of tiles; several images share one.
    """

    share: float
    median: int
    spread: float
    longest: int = 30_000
    images: tuple[int, int] = (0, 0)
    sizes: Sequence[tuple[int, int]] = ()
    budgets: Sequence[int] = (1,)
    video: bool = False


SFT = {
    "chat": Kind(0.215, 500, 0.9),
    "reasoning in text": Kind(0.055, 3000, 0.8),
    "long text": Kind(0.016, 10_000, 0.5),
    "short VQA": Kind(0.36, 90, 0.6, images=(1, 1), sizes=PHOTOS, budgets=(1, 6, 6, 12)),
    "charts, documents": Kind(0.17, 180, 0.9, images=(1, 1), sizes=PAGES, budgets=(6, 12, 12)),
    "reasoning on an image": Kind(
        0.11, 1200, 0.8, images=(1, 1), sizes=PHOTOS + PAGES, budgets=(6, 12)
    ),
    "several images": Kind(0.045, 300, 0.8, images=(2, 8), sizes=PHOTOS + PAGES, budgets=(12,)),
    "video": Kind(0.029, 150, 0.7, images=(8, 32), video=True),
}
MIXES = {
    "sft": SFT,
    "text": {name: kind for name, kind in SFT.items() if not kind.images[1]},
    "images": {name: kind for name, kind in SFT.items() if kind.images[1]},
    "long": {"texts of half a pack": Kind(1.0, 16_384, 0.35, longest=MAX_TOKENS)},
}


def draw(kind: Kind, rng: random.Random) -> tuple[int, int]:
    """Tokens and tiles of a sample."""
    text = rng.lognormvariate(math.log(kind.median), kind.spread)
    tokens = max(10, min(kind.longest, round(text)))
    images = rng.randint(*kind.images)
    if kind.video:
        return tokens + images * (TILE_TOKENS + FRAME_TOKENS), images
    tiles = 0
    if images:
        budget = max(1, rng.choice(kind.budgets) // images)
        sizes = rng.choices(kind.sizes, k=images)
        tiles = sum(count_tiles(*size, max_tiles=budget) for size in sizes)
    return tokens + tiles * TILE_TOKENS + images * IMAGE_MARKS, tiles


def stream(mix: dict[str, Kind], count: int, seed: int) -> list[Item]:
    """The first samples of a mix that fit a pack."""
    rng = random.Random(seed)
    names, shares = list(mix), [kind.share for kind in mix.values()]
    items: list[Item] = []
    while len(items) < count:
        tokens, tiles = draw(mix[rng.choices(names, shares)[0]], rng)
        if tokens <= MAX_TOKENS and tiles <= MAX_TILES:
            items.append(Item(len(items), tokens, tiles))
    return items


class Rule(Protocol):
    """What packs a stream: a Packer, or the published buffer."""

    @property
    def open_packs(self) -> Sequence[Pack]:
        """What is not emitted yet."""

    def add(self, item: Item) -> list[Pack]:
        """The next sample; the packs that it finishes."""


@dataclass
class Published:
    """The published code's buffer (see above)."""

    buffer_size: int
    open_packs: list[Pack] = field(default_factory=list)

    def add(self, item: Item) -> list[Pack]:
        """The next sample; the packs that it finishes."""
        pack, buffer = Pack((), 0, 0), self.open_packs
        for place, one in enumerate(buffer):
            fits = one.tokens + item.tokens <= MAX_TOKENS and one.tiles + item.tiles <= MAX_TILES
            if fits:
                pack = buffer.pop(place)
                break
        pack = pack.plus(item)
        out = []
        if pack.tokens == MAX_TOKENS:
            out.append(pack)
        else:
            fewer = (place for place, one in enumerate(buffer) if one.tiles < pack.tiles)
            buffer.insert(next(fewer, len(buffer)), pack)
        while buffer and (buffer[0].tiles == MAX_TILES or len(buffer) > self.buffer_size):
            out.append(buffer.pop(0))
        return out


RULES: dict[str, Callable[[int], Rule]] = {
    "ours": lambda size: Packer(MAX_TOKENS, MAX_TILES, size),
    "paper": lambda size: Packer(MAX_TOKENS, MAX_TILES, size, hold_tile_full=False, max_wait=None),
    "published": Published,
}


def share(packs: Sequence[Pack]) -> tuple[float, float]:
    """Fill of tokens and of tiles."""
    count = len(packs)
    tokens, tiles = sum(pack.tokens for pack in packs), sum(pack.tiles for pack in packs)
    return tokens / (count * MAX_TOKENS), tiles / (count * MAX_TILES)


def run(rule: Rule, items: Iterable[Item]) -> tuple[list[Pack], list[int]]:
    """The packs before the end, and how long each of their samples waited."""
    packs, waits = [], []
    for number, item in enumerate(items):
        done = rule.add(item)
        packs += done
        waits += [number - one.key for pack in done for one in pack.items]
    return packs, waits


def seconds(make: Callable[[int], Rule], items: Sequence[Item]) -> float:
    """CPU seconds to pack a stream with the published buffer's size."""
    rule = make(BUFFER)
    start = time.process_time()
    for item in items:
        rule.add(item)
    return time.process_time() - start


def figures(rule: Rule, items: Sequence[Item]) -> dict[str, float]:
    """What a rule makes of a stream."""
    packs, waits = run(rule, items)
    fill, tile_fill = share(packs)
    waits.sort()
    still = [len(items) - one.key for pack in rule.open_packs for one in pack.items]
    return {
        "fill": round(fill, 4),
        "tile_fill": round(tile_fill, 4),
        "packs": len(packs),
        "wait_median": waits[len(waits) // 2],
        "wait_p99": waits[len(waits) * 99 // 100],
        "wait_longest": waits[-1],
        "left_longest": max(still),
    }


def best_fill(items: Sequence[Item]) -> tuple[float, str]:
    """The token fill that no packing can exceed, and the limit that sets it."""
    tokens = sum(item.tokens for item in items) / MAX_TOKENS
    tiles = sum(item.tiles for item in items) / MAX_TILES
    return min(1.0, tokens / max(tokens, tiles)), "tokens" if tokens >= tiles else "tiles"


def offline_fill(items: Sequence[Item]) -> float:
    """Token fill of best-fit-decreasing over all items, by their larger share of a limit."""
    order = sorted(items, key=lambda i: -max(i.tokens / MAX_TOKENS, i.tiles / MAX_TILES))
    packs: list[tuple[int, int]] = []  # (room in tokens, tiles), least room first
    for item in order:
        place = bisect_left(packs, (item.tokens, 0))
        while place < len(packs) and packs[place][1] + item.tiles > MAX_TILES:
            place += 1
        room, tiles = packs.pop(place) if place < len(packs) else (MAX_TOKENS, 0)
        insort(packs, (room - item.tokens, tiles + item.tiles))
    return sum(item.tokens for item in items) / (len(packs) * MAX_TOKENS)


def measure(count: int, seed: int) -> dict[str, Any]:
    """Every number: `fill` is ours on the mix `sft`, at the published limits and buffer."""
    streams = {name: stream(mix, count, seed) for name, mix in MIXES.items()}
    mixes: dict[str, Any] = {}
    for name, items in streams.items():
        best, limit = best_fill(items)
        tiles = sum(item.tiles for item in items)
        mixes[name] = {
            "tokens_a_sample": round(sum(item.tokens for item in items) / count),
            "tiles_a_sample": round(tiles / count, 2),
            "scarcer": limit,
            "best": round(best, 4),
            "offline": round(offline_fill(items), 4),
            **{rule: figures(make(BUFFER), items) for rule, make in RULES.items()},
        }
    rounds = [{rule: seconds(make, streams["sft"]) for rule, make in RULES.items()} for _ in "123"]
    sweep = {
        rule: {size: figures(make(size), streams["sft"])["fill"] for size in SWEEP}
        for rule, make in RULES.items()
    }
    return {
        "fill": mixes["sft"]["ours"]["fill"],
        "fill_paper": mixes["sft"]["paper"]["fill"],
        "fill_published": mixes["sft"]["published"]["fill"],
        "best": mixes["sft"]["best"],
        "items_per_second": {
            rule: round(count / sorted(one[rule] for one in rounds)[1]) for rule in RULES
        },
        "mixes": mixes,
        "sweep": sweep,
        "limits": {"max_tokens": MAX_TOKENS, "max_tiles": MAX_TILES, "buffer": BUFFER},
        "items": count,
        "seed": seed,
    }


def show(result: dict[str, Any]) -> None:
    """The numbers as tables."""
    for name, mix in result["mixes"].items():
        print(
            f"{name}: {mix['tokens_a_sample']} tokens and {mix['tiles_a_sample']} tiles a sample; "
            f"scarcer: {mix['scarcer']}; best {mix['best']}, offline {mix['offline']}"
        )
        for rule in RULES:
            print(f"    {rule:<10}", "  ".join(f"{k} {v}" for k, v in mix[rule].items()))
    print("fill by buffer size, mix sft:")
    for rule, fills in result["sweep"].items():
        print(f"    {rule:<10}", "  ".join(f"{size}: {fill}" for size, fill in fills.items()))
    print("items a second:", result["items_per_second"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How full packs are, by rule and buffer size.")
    parser.add_argument("--items", type=int, default=30_000, help="samples of a stream")
    parser.add_argument("--seed", type=int, default=0, help="of the streams")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = measure(args.items, args.seed)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
