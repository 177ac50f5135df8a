"""Inline SVG by matplotlib whose colours follow the page's theme.

matplotlib draws with placeholder colours; in the SVG each becomes a CSS variable of the page, so
that one drawing is right in light and dark. Text stays text and takes the page's font. The output
depends on the data alone: no date, no random ids, no user's matplotlibrc.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from cascade.report_data import TONES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colour -> CSS variable (defined, for light and dark, in templates/report.css).
_NAMES = ("ink", "muted", "grid", "card", "good", "bad", "band",
          *(f"tone{number}" for number in range(1, TONES + 1)))  # fmt: skip
_COLOURS = {name: f"#01fe{16 + place:02x}" for place, name in enumerate(_NAMES)}
INK, MUTED, GRID, CARD, GOOD, BAD, BAND = (_COLOURS[name] for name in _NAMES[:7])
_VARIABLES = {colour: name for name, colour in _COLOURS.items()}


def tone(number: int) -> str:
    """The placeholder of a stage's colour, 1 to 8."""
    return _COLOURS[f"tone{number}"]


class Canvas:
    """Draws the charts of one page; each gets ids of its own, so that they can share the page."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def draw(
        self,
        width: int,
        height: int,
        name: str,
        draw: Callable[[Axes], None],
        left: float,
        bottom: float = 10,
        top: float = 8,
        right: float = 14,
    ) -> str:
        """Return the chart as an <svg>; sizes and margins in CSS pixels at natural size."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_style())
            figure = Figure(figsize=(width / 72, height / 72))
            axes = figure.add_axes(
                (
                    left / width,
                    bottom / height,
                    1 - (left + right) / width,
                    1 - (bottom + top) / height,
                )
            )
            draw(axes)
            return _as_svg(figure, f"chart{next(self._numbers)}", name)


def _style() -> dict[str, object]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "cascade",
        "font.size": 11,
        "text.color": INK,
        "text.parse_math": False,  # a name with dollars in it is no formula
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
    }


def _as_svg(figure: Figure, prefix: str, name: str) -> str:
    """Return the figure as inline SVG: unique ids, theme colours, no fixed size, no header."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    opening, body = body.split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-")
    # `font: [weight] 10px 'DejaVu Sans', ...` -> the page's own font in that size.
    body = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _page_font, body)
    body = re.sub("#01fe[12][0-9a-f]", lambda match: f"var(--{_VARIABLES[match.group()]})", body)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    assert view is not None, "matplotlib wrote an SVG without a viewBox"
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    width, height = view.groups()
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escaped}">{body}'
    )


def _page_font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def variable(colour: str) -> str:
    """The CSS variable of a placeholder colour."""
    return _VARIABLES[colour]
