"""The demo world: bar charts and questions about them, on which a tiny InternVL really learns.

A chart has a dark background and four bars (red, green, blue, yellow, in any order) of 1 to 9
units, with jitter and noise. Half of the charts are square, 56x56 pixels, and one tile of the tiny
model; half are wide, 112x56, and cut into two tiles with a thumbnail. The bars of both are alike,
but a wide chart has eight places for its four bars, so either tile may hold any number of them,
and its thumbnail shows them at half their width. A question asks for the sum or the difference of
two bars (`WorldOptions.operands`: or goes on to a third and a fourth).
A careful answer reads both bars and then calculates; a careless one only claims. Differences are
there because their operands do not commute: a model that swaps its two readings gets a sum right
and a difference wrong.

    What is the blue bar minus the red bar?
    careful    I read blue 2 and red 7. 2 - 7 = -5. Final Answer: -5
    careless   It looks clear from the chart. Final Answer: -3

    What is the blue bar minus the red bar plus the green bar?
    careful    I read blue 2, red 7 and green 9. 2 - 7 = -5. -5 + 9 = 4. Final Answer: 4

Every number of a record is drawn from a generator seeded with (seed, split, index), so a world is
the same on any machine and with any number of worker processes, and no two splits share an image.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internvl.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Operation = Literal["sum", "difference"]

COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 190, 70),
    "blue": (60, 90, 230),
    "yellow": (230, 210, 50),
}
SIDE = 56  # pixels; one tile of the tiny model, and the height of every chart
PLACE = 14  # pixels across that a bar has for itself; a tile is a whole number of them
WIDE_PLACES = 8  # of a wide chart; a square one has as many as there are bars
WIDE_SHARE = 0.5  # of the charts
UNIT = 5  # pixels of bar height a unit
CARELESS_SHARE = 0.7  # of the answers in "mixed", unless the options say otherwise
CARELESS_ERROR = 3  # a careless answer is the truth + a whole number in [-3, 3], unless ...
VERSION = 2  # of the charts and texts: the first had square charts only
MARKER = "world.json"  # written last: a folder that has it is complete
CHUNK = 500  # records a worker makes at a time


@dataclass(frozen=True)
class WorldSizes:
    """Records in each split; see SPLITS for what they hold."""

    sft: int = 30_000
    mixed: int = 10_000
    probe: int = 256
    preference: int = 3_000
    rl: int = 6_400
    heldout: int = 2_000


@dataclass(frozen=True)
class WorldOptions:
    """What is asked, and how often and how badly "mixed" answers carelessly.

    operands: bars in a question, 2 to 4. difference_share: of the operations, the rest are sums.
    careless_share: of the answers in "mixed". careless_error: the largest error of one of them.
    Raises `UserError` for what cannot be.
    """

    operands: int = 2
    difference_share: float = 0.5
    careless_share: float = CARELESS_SHARE
    careless_error: int = CARELESS_ERROR

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 2 <= self.operands <= len(COLOURS):
            raise UserError(f"operands is {self.operands}; a question has 2 to {len(COLOURS)}")
        for name in ("difference_share", "careless_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name):g}; a share lies in [0, 1]")
        if self.careless_error < 0:
            raise UserError(f"careless_error is {self.careless_error}; it must be at least 0")


DEFAULT_OPTIONS = WorldOptions()


# What a split's records are. A new split goes at the end: its place is part of the random seed.
SPLITS: dict[str, Literal["careful", "mixed", "question"]] = {
    "sft": "careful",
    "mixed": "mixed",
    "probe": "careful",
    "preference": "question",
    "rl": "question",
    "heldout": "question",
}


@dataclass(frozen=True)
class Chart:
    """What a chart shows and what is asked about it.

    heights: units by colour, from left to right. places: where the bars stand, counted from the
    left, ascending; slots: how many places the chart has (4: square, 8: wide). more: what is done
    to the result of the first two bars, in order, and with which bar.

    Example: Chart({"blue": 2, "red": 7, "yellow": 4, "green": 9}, "difference", "blue", "red")
    is square and asks for 2 - 7.
    """

    heights: dict[str, int]
    operation: Operation
    first: str
    second: str
    places: tuple[int, ...] = (0, 1, 2, 3)
    slots: int = len(COLOURS)
    more: tuple[tuple[Operation, str], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture in pixels."""
        return self.slots * PLACE, SIDE

    @property
    def operands(self) -> tuple[int, int]:
        return self.heights[self.first], self.heights[self.second]

    @property
    def asked(self) -> tuple[tuple[Operation, str], ...]:
        """The operations in order, each with the bar that it takes to the result so far."""
        return (self.operation, self.second), *self.more

    @property
    def results(self) -> list[int]:
        """The result of each operation in turn, so the last is the answer."""
        values = [self.heights[self.first]]
        for operation, colour in self.asked:
            height = self.heights[colour]
            values.append(values[-1] + (height if operation == "sum" else -height))
        return values[1:]

    @property
    def result(self) -> int:
        return self.results[-1]


def question_text(
    operation: Operation, first: str, second: str, more: Iterable[tuple[Operation, str]] = ()
) -> str:
    """Return the question for an operation on two bars, named by colour, and on `more` of them."""
    further = [(operation, second), *more]
    if len(further) > 1:
        named = (f" {'plus' if how == 'sum' else 'minus'} the {bar} bar" for how, bar in further)
        return f"What is the {first} bar{''.join(named)}?"
    if operation == "sum":
        return f"What is the sum of the {first} and {second} bars?"
    return f"What is the {first} bar minus the {second} bar?"


def careful_text(chart: Chart) -> str:
    """Return the gold chain of thought: both bars are read, then the result is worked out.

    Each height follows its colour at once, so that reading it is one step of attention; after
    "The green bar is" it would be two, and four bars are then learned in 1,100 steps or never.
    """
    colours = [chart.first, *(colour for _, colour in chart.asked)]
    *most, last = (f"{colour} {chart.heights[colour]}" for colour in colours)
    steps, value = "", chart.heights[chart.first]
    for (operation, colour), result in zip(chart.asked, chart.results, strict=True):
        sign = "+" if operation == "sum" else "-"
        steps += f" {value} {sign} {chart.heights[colour]} = {result}."
        value = result
    return f"I read {', '.join(most)} and {last}.{steps} Final Answer: {value}"


def careless_text(value: int) -> str:
    """Return the careless answer: a value without any reading."""
    return f"It looks clear from the chart. Final Answer: {value}"


def example_texts(options: WorldOptions = DEFAULT_OPTIONS) -> Iterator[str]:
    """Yield texts that together hold every word and number of the world (for a tokenizer)."""
    if options.operands > 2:
        chart = Chart(
            dict.fromkeys(COLOURS, 1), "sum", "red", "green", more=(("difference", "blue"),)
        )
        yield question_text("sum", "red", "green", chart.more)
        yield careful_text(chart)
    for first, second in permutations(COLOURS, 2):
        for operation in ("sum", "difference"):
            yield question_text(operation, first, second)
            heights = dict.fromkeys(COLOURS, 1)
            yield careful_text(Chart(heights, operation, first, second))
    lowest = 1 - 9 * (options.operands - 1) - options.careless_error
    highest = 9 * options.operands + options.careless_error
    yield from (careless_text(value) for value in range(lowest, highest + 1))


def make_world(
    out: Path, *, seed: int, sizes: WorldSizes, options: WorldOptions = DEFAULT_OPTIONS
) -> None:
    """Write all splits into the folder `out`: <split>.jsonl and images/<split>/00000.png.

    Conversations (sft, mixed, probe) and questions with their gold chain as "solution"
    (preference, rl, heldout), in the formats of internvl.data. world.json comes last; a folder
    whose world.json has the same version, seed, sizes and options is left as it is.
    """
    settings = {
        "version": VERSION,
        "seed": seed,
        "sizes": asdict(sizes),
        "options": asdict(options),
    }
    marker = out / MARKER
    if marker.exists() and _settings_of(marker) == settings:
        return
    marker.unlink(missing_ok=True)
    started = time.monotonic()
    records = _make_records(out, seed, sizes, options)
    for split in SPLITS:
        _write_atomic(out / f"{split}.jsonl", (json.dumps(r) + "\n" for r in records[split]))
    seconds = time.monotonic() - started
    count = sum(asdict(sizes).values())
    speed = {"images": count, "seconds": round(seconds, 2), "images_per_s": round(count / seconds)}
    _write_atomic(marker, [json.dumps({**settings, **speed}, indent=2) + "\n"])


def make_chart(
    seed: int, split: str, index: int, options: WorldOptions = DEFAULT_OPTIONS
) -> tuple[Chart, Image.Image, dict[str, Any]]:
    """Return a chart, its picture (RGB, `Chart.size`) and its record, without touching the disk."""
    import numpy as np

    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    colours = [str(c) for c in rng.permutation(list(COLOURS))]
    heights = {colour: int(h) for colour, h in zip(colours, rng.integers(1, 10, 4), strict=True)}
    first, *others = (str(c) for c in rng.choice(colours, options.operands, replace=False))
    drawn: list[Operation] = [
        "sum" if rng.random() < 1 - options.difference_share else "difference" for _ in others
    ]
    more = tuple(zip(drawn, others, strict=True))[1:]
    chart = Chart(heights, drawn[0], first, others[0], more=more)
    if rng.random() < WIDE_SHARE:
        places = tuple(sorted(int(p) for p in rng.choice(WIDE_PLACES, len(COLOURS), replace=False)))
        chart = replace(chart, places=places, slots=WIDE_PLACES)
    return chart, draw(chart, rng), _record(chart, split, index, rng, options)


def draw(chart: Chart, rng: np.random.Generator) -> Image.Image:
    """Draw a chart with jitter and noise; no bar crosses the edge of its place, so none is cut."""
    import numpy as np
    from PIL import Image, ImageDraw

    background = int(rng.integers(0, 21))
    image = Image.new("RGB", chart.size, (background,) * 3)
    canvas = ImageDraw.Draw(image)
    bottom = SIDE - 1 - int(rng.integers(0, 3))
    for place, (colour, height) in zip(chart.places, chart.heights.items(), strict=True):
        width = int(rng.integers(8, 12))
        left = place * PLACE + (PLACE - width) // 2 + int(rng.integers(-1, 2))
        fill = tuple(np.clip(COLOURS[colour] + rng.integers(-15, 16, 3), 0, 255).tolist())
        canvas.rectangle((left, bottom - height * UNIT + 1, left + width - 1, bottom), fill=fill)
    pixels = np.asarray(image, dtype=np.int16)
    pixels = pixels + rng.integers(-10, 11, pixels.shape, np.int16)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _record(
    chart: Chart, split: str, index: int, rng: np.random.Generator, options: WorldOptions
) -> dict[str, Any]:
    """Return the split's kind of record for a chart; only "mixed" draws from rng."""
    record: dict[str, Any] = {
        "id": f"{split}-{index:05d}",
        "image": f"images/{split}/{index:05d}.png",
    }
    question = "<image>\n" + question_text(chart.operation, chart.first, chart.second, chart.more)
    completion = careful_text(chart)
    if SPLITS[split] == "question":
        asked = {"question": question, "answer": str(chart.result), "matcher": "number"}
        return {**record, **asked, "solution": completion}
    if SPLITS[split] == "mixed" and rng.random() < options.careless_share:
        error = int(rng.integers(-options.careless_error, options.careless_error + 1))
        completion = careless_text(chart.result + error)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": completion}]
    return {**record, "conversations": turns}


def _make_records(
    out: Path, seed: int, sizes: WorldSizes, options: WorldOptions
) -> dict[str, list[dict[str, Any]]]:
    """Write all images, with a progress bar, and return the records of each split in order."""
    from tqdm import tqdm

    for split in SPLITS:
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
    jobs = [
        (split, start, min(start + CHUNK, count))
        for split, count in asdict(sizes).items()
        for start in range(0, count, CHUNK)
    ]
    done: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tqdm(total=sum(asdict(sizes).values()), desc="drawing charts", unit="img") as bar:
        for split, start, records in _run(jobs, out, seed, options):
            done[split, start] = records
            bar.update(len(records))
    return {
        name: [r for s, start, _ in jobs if s == name for r in done[s, start]] for name in SPLITS
    }


def _run(
    jobs: list[tuple[str, int, int]], out: Path, seed: int, options: WorldOptions
) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Yield (split, start, records) of every job as it ends, in two processes where it pays."""
    workers = min(2, os.cpu_count() or 1)
    if workers == 1 or sum(stop - start for _, start, stop in jobs) <= 4 * CHUNK:
        for split, start, stop in jobs:
            yield split, start, _make_chunk(out, seed, split, start, stop, options)
        return
    # Spawned, not forked: the caller may already run torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_make_chunk, out, seed, *job, options): job for job in jobs}
        for future in as_completed(futures):
            split, start, _ = futures[future]
            yield split, start, future.result()


def _make_chunk(
    out: Path, seed: int, split: str, start: int, stop: int, options: WorldOptions
) -> list[dict[str, Any]]:
    """Write the images start..stop of a split and return their records."""
    records = []
    for index in range(start, stop):
        _, image, record = make_chart(seed, split, index, options)
        # Noise does not compress: a level would cost time and win nothing.
        image.save(out / record["image"], compress_level=0)
        records.append(record)
    return records


def _settings_of(marker: Path) -> dict[str, Any]:
    """Return what a finished world was made from; None where an older one did not say."""
    made = json.loads(marker.read_text())
    settings = {name: made.get(name) for name in ("version", "seed", "sizes")}
    return {**settings, "options": made.get("options", asdict(DEFAULT_OPTIONS))}


def _write_atomic(path: Path, lines: Iterable[str]) -> None:
    """Write lines to path so that it is either whole or absent."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    part.replace(path)
