"""A self-contained HTML page of a set: numbers, histograms, and the records with their pictures.

    columns of all rows (mmpr.columns) -> numbers at the top, histograms
                                       `-> items drawn evenly (mmpr.view_draw) -> cards -> page

The page asks no network for anything (its own content policy forbids that) and runs one script,
named by its hash; every text of a record is escaped, so it is shown and never run.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.errors import UserError
from internvl.thumbnails import Thumbnail
from mmpr.columns import Columns
from mmpr.listing import Listing
from mmpr.stats import summarise
from mmpr.view_cards import ONLY, Broken, Card, PictureSettings, make_card
from mmpr.view_charts import HEIGHT, WIDTH, Chart, categories, histogram
from mmpr.view_draw import draw_evenly, item_rows, item_sorts
from mmpr.view_marks import visible

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup
    from numpy.typing import NDArray

KIND_LABELS = {
    "pair": "kind", "verdict": "outcome", "rollout": "finish reason", "question": "matcher",
}  # fmt: skip


@dataclass(frozen=True)
class ViewConfig:
    """What a page shows. max_rows: of items (pairs, or questions with all their completions)."""

    max_rows: int = 300
    seed: int = 0
    pictures: PictureSettings = field(default_factory=PictureSettings)

    def __post_init__(self) -> None:
        sizes = {
            "max rows": self.max_rows, "max tiles": self.pictures.max_tiles,
            "tile size": self.pictures.tile_size, "image side": self.pictures.side,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")


def refuse_kind(listing: Listing) -> None:
    """Raise UserError for conversations, which have nothing to compare."""
    if listing.kind not in KIND_LABELS:
        raise UserError(
            f"{listing.path}: {listing.kind}s; a page shows {', '.join(KIND_LABELS)}s "
            "(`mmpr stats` gives numbers of this file)"
        )


def write_page(
    listing: Listing, columns: Columns, output: Path, config: ViewConfig
) -> tuple[int, str]:
    """Write the page of a set; the same set, the same bytes.

    Returns how many items it shows, and why the first picture of it that cannot be shown cannot be
    (or ""). columns: of the whole listing, of a kind that `refuse_kind` lets pass.
    """
    sorts = item_sorts(columns)
    items = draw_evenly(sorts, config.max_rows, config.seed)
    cards = _make_cards(listing, item_rows(columns, items), config.pictures)
    page = (
        _environment()
        .get_template("view.html.j2")
        .stream(_page_facts(listing, columns, cards, len(sorts), config))
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        # a data set's name, say, may hold half a surrogate pair, which no file can
        file.writelines(part.encode("utf-8", "backslashreplace").decode() for part in page)
    partial.replace(output)
    broken = (one.reason for card in cards for one in card.pictures if isinstance(one, Broken))
    return len(cards), next(broken, "")


def _make_cards(
    listing: Listing, numbers: Sequence[Sequence[int]], settings: PictureSettings
) -> list[Card]:
    from tqdm import tqdm

    def one(rows: Sequence[int]) -> Card:
        return make_card([listing.row(number) for number in rows], listing.kind, settings)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(one, numbers), total=len(numbers), desc="drawing", unit="row", delay=1)
        return list(bar)


def _page_facts(
    listing: Listing, columns: Columns, cards: Sequence[Card], items: int, config: ViewConfig
) -> dict[str, Any]:
    facts = summarise(columns)
    script = _template_text("view.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    grouped = listing.kind in ("rollout", "verdict")
    return {
        "title": listing.path.name,
        "kind": listing.kind,
        "noun": "questions" if grouped else f"{listing.kind}s",
        "facts": facts["all"],
        "data_sets": facts["data_sets"],
        "repeats": listing.repeats(),
        "bad_rows": columns.bad_rows,
        "bad_reasons": columns.bad_reasons,
        "items": items,
        "cards": cards,
        "config": config,
        "charts": _charts(columns, facts["all"], cards),
        "chart_width": WIDTH,
        "chart_height": HEIGHT,
        "sets": _choices(card.data_set for card in cards),
        "kinds": _choices(kind for card in cards for kind in card.kinds),
        "only": [
            (name, ONLY[name], count)
            for name, count in _choices(name for card in cards for name in card.only)
        ],
        "kind_label": KIND_LABELS[listing.kind],
        "script": script,
        "script_hash": digest,
        "style": _template_text("view.css"),
    }


def _choices(values: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))


def _charts(columns: Columns, facts: dict[str, Any], cards: Sequence[Card]) -> list[Chart]:
    charts: list[Chart | None] = []
    if columns.kind == "pair":
        chosen, rejected = columns.get("chosen_chars"), columns.get("rejected_chars")
        charts += [
            histogram("Characters", {"chosen": chosen, "rejected": rejected}),
            histogram("Characters, chosen less rejected", {"": chosen - rejected}, signed=True),
        ]
    if columns.kind == "verdict":
        lengths, outcomes = columns.get("completion_chars"), columns.get("outcome")
        names = columns.names["outcome"]
        by_outcome: dict[str, NDArray[np.int64]] = {
            str(name): lengths[outcomes == names.index(name)]
            for name in ("correct", "wrong")
            if name in names
        }
        charts += [
            categories("Accuracy of a question", facts["accuracy"]["histogram"]),
            histogram("Characters of a completion", by_outcome),
        ]
    if columns.kind == "rollout":
        charts.append(
            histogram("Characters of a completion", {"": columns.get("completion_chars")})
        )
    if columns.kind == "question":
        charts.append(histogram("Characters of a question", {"": columns.get("question_chars")}))
    tiles = Counter(
        picture.tiles
        for card in cards
        for picture in card.pictures
        if isinstance(picture, Thumbnail)
    )
    counts = {str(number): tiles[number] for number in sorted(tiles)}
    charts.append(categories("Tiles a picture", counts, "of those shown"))
    return [chart for chart in charts if chart is not None]


def _template_text(name: str) -> str:
    from importlib.resources import files

    return (files("mmpr") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mmpr", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def shown(text: str) -> Markup:
        """Text escaped, its invisible characters named."""
        code, plain = Markup('<b class="code">{}</b>'), Markup("{}")
        return Markup("").join(
            (code if hidden else plain).format(piece) for piece, hidden in visible(text)
        )

    environment.filters.update(shown=shown, number=lambda value: f"{value:,}")
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": True}
    return environment
