"""Places in a picture as completions write them: tagged boxes and points, or coordinates alone."""

from __future__ import annotations

import re

_PLACE = re.compile(r"<(box|point)>[^<>]{1,400}</\1>", re.IGNORECASE)
_NUMBER = r"[\"']?(-?\d{1,9}(?:\.\d{1,9})?)[\"']?"
_ATTRIBUTES = re.compile(  # <point x="200" y="300" alt="the cup">the cup</point>
    rf"<point\s{{1,3}}x={_NUMBER}\s{{1,3}}y={_NUMBER}(?:\s[^<>]{{0,200}}|/)?>"
    r"(?:[^<>]{0,200}</point>)?",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"(?:[\s,;，；、&|]|and|和|<ref>[^<>]{0,200}</ref>)*", re.IGNORECASE)
_COORDINATES = re.compile(
    r"(?:[-+\d\s.,;:=()\[\]{}\"'|]|\b(?:click|tap|point|box|bbox|bbox_2d|point_2d|start_box|"
    r"coordinates?|left|top|right|bottom|width|height|json|x|y|w|h|[xy][12]|[xy]_?m(?:in|ax))\b)+",
    re.IGNORECASE,
)
_N = r"\s{0,3}-?\d{1,9}(?:\.\d{1,9})?\s{0,3}"
_LONE = re.compile(
    rf"\[{{1,2}}{_N}(?:,{_N}){{3}}\]{{1,2}}|\({_N},{_N}\)(?:\s{{0,3}},?\s{{0,3}}\({_N},{_N}\))?"
    rf"|\({_N}(?:,{_N}){{3}}\)"
)
_MAX_BETWEEN = 300  # characters between two tags of one answer
_MAX_COORDINATES = 2000


def tagged_places(text: str) -> tuple[str, bool] | None:
    """The last run of <box>..</box> or <point>..</point>, and whether it is the only one.

    Tags that stand side by side, with or without <ref>..</ref> between them, are one run; the
    names in <ref> are left out of it. <point x="1" y="2"> is <point>[[1, 2]]</point>.
    None without any.

    >>> tagged_places("a <ref>cup 2</ref><box>[[1, 2, 3, 4]]</box>")
    ('<box>[[1, 2, 3, 4]]</box>', True)
    """
    if "<point " in text:
        text = _ATTRIBUTES.sub(r"<point>[[\1, \2]]</point>", text)
    tags = list(_PLACE.finditer(text))
    if not tags:
        return None
    first = len(tags) - 1
    while first and _adjacent(text[tags[first - 1].end() : tags[first].start()]):
        first -= 1
    return "".join(tag[0] for tag in tags[first:]), first == 0


def _adjacent(between: str) -> bool:
    return len(between) <= _MAX_BETWEEN and _BETWEEN.fullmatch(between) is not None


def lone_place(text: str) -> str | None:
    """The one place in a text that is not tagged, "It is at [1, 2, 3, 4]"; None for several."""
    found = []
    for place in _LONE.finditer(text):
        found.append(place[0])
        if len(found) > 1:
            return None
    return found[0] if found else None


def coordinates_only(text: str) -> bool:
    """Whether a text is nothing but coordinates: "[1, 2, 3, 4]", "(1,2),(3,4)", "click(x=1, y=2)".

    Two numbers are the least.
    """
    if not 3 <= len(text) <= _MAX_COORDINATES or _COORDINATES.fullmatch(text) is None:
        return False
    return len(re.findall(r"(?<![a-z_\d])\d+(?:\.\d+)?", text, re.IGNORECASE)) >= 2
