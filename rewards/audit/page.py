"""An audit as one HTML file that needs nothing else.

Completions are untrusted text: jinja2 escapes everything, and the page's content policy allows
images in the page itself, its own script by its hash, and no request to a network.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rewards.audit.audit import MOST_EXAMPLES, AuditReport, Example, Group
from rewards.audit.findings import KINDS
from rewards.display import number, share, visible
from rewards.verdict import Outcome

THUMBNAIL = 160  # pixels of an image's longer side
MOST_GROUPS = 400  # on a page


@dataclass(frozen=True)
class Shown:
    """An example with its images: (data URI or None, name), and its place as a shell's word."""

    example: Example
    images: tuple[tuple[str | None, str], ...]
    place: str


@dataclass(frozen=True)
class Section:
    """The groups of one kind, each with the examples that are shown; left: groups that are not."""

    kind: str
    title: str
    count: int
    groups: list[tuple[Group, list[Shown]]]
    left: int


def write_page(
    report: AuditReport,
    path: Path,
    *,
    max_rows: int = 200,
    image_root: Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """Write the page of a report; at most `max_rows` rollouts are shown, the likeliest first.

    image_root: where image paths start, in place of the folder of the rollouts' file. options: of
    `explain`, with which it judges as the audit did.
    """
    page = render(report, max_rows=max_rows, image_root=image_root, options=options)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def render(
    report: AuditReport,
    *,
    max_rows: int = 200,
    image_root: Path | None = None,
    options: Sequence[str] = (),
) -> str:
    """The page as HTML (`write_page`); the same report gives the same bytes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rewards.audit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    environment.filters.update(number=number, hash=_policy_hash)
    return environment.get_template("audit.html.j2").render(
        report=report,
        sections=sections(report, max_rows, image_root),
        options=shlex.join(options),
        outcomes=[str(outcome) for outcome in Outcome],
        datasets=sorted(report.outcomes, key=lambda name: (-report.outcomes[name].total(), name)),
        matchers=sorted(report.matchers, key=lambda name: (-report.matchers[name].total(), name)),
        share=share,
    )


def _seen(value: object) -> object:
    """What the template prints: texts with their invisible characters written out."""
    return visible(value) if type(value) is str else value


def sections(report: AuditReport, max_rows: int, image_root: Path | None) -> list[Section]:
    """The findings by kind, `max_rows` examples in all: each group gets one before any gets two."""
    ranked = {kind: report.ranked(kind) for kind in KINDS}
    shown = {kind: groups[:MOST_GROUPS] for kind, groups in ranked.items()}
    everyone = [group for groups in shown.values() for group in groups]
    listed = {id(group): list(group.examples.values()) for group in everyone}
    order = (
        (id(group), at)
        for at in range(MOST_EXAMPLES)
        for group in everyone
        if at < len(listed[id(group)])
    )
    chosen = set(islice(order, max_rows))
    return [
        Section(
            kind,
            KINDS[kind],
            sum(group.count for group in ranked[kind]),
            [
                (group, [_show(one, image_root) for at, one in enumerate(listed[id(group)])
                         if (id(group), at) in chosen])
                for group in shown[kind]
            ],
            len(ranked[kind]) - len(shown[kind]),
        )
        for kind in KINDS
        if ranked[kind]
    ]  # fmt: skip


def _show(example: Example, image_root: Path | None) -> Shown:
    root = image_root or Path(example.file).parent
    images = tuple((thumbnail(root / name), name) for name in example.images)
    return Shown(example, images, shlex.quote(f"{example.file}:{example.line}"))


def thumbnail(path: Path) -> str | None:
    """An image file as a small JPEG in a data URI; None where there is none that can be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # the page names the file that could not be shown
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _policy_hash(script: str) -> str:
    """The hash by which the content policy allows a script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
