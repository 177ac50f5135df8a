"""Matchers of places in a picture: boxes and points, in 0..1000 of width and height."""

from __future__ import annotations

import re

from rewards.reasons import CannotJudge, Options

BOX_THRESHOLD = 0.5  # RefCOCO's Acc@0.5
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def match_box(prediction: str, gold: str, options: Options = None) -> float:
    """The intersection over union of two boxes."""
    wanted = [float(number) for number in _NUMBER.findall(gold)]
    if len(wanted) != 4:
        raise CannotJudge(f"gold answer {gold!r} is no box [[x1, y1, x2, y2]]")
    given = [float(number) for number in _NUMBER.findall(prediction)]
    if len(given) != 4:
        return 0.0
    width = min(wanted[2], given[2]) - max(wanted[0], given[0])
    height = min(wanted[3], given[3]) - max(wanted[1], given[1])
    common = max(0.0, width) * max(0.0, height)
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (wanted, given))
    return common / (areas - common) if areas > common else 0.0


def match_point(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when the point lies in the gold box."""
    wanted = [float(number) for number in _NUMBER.findall(gold)]
    if len(wanted) != 4:
        raise CannotJudge(f"gold answer {gold!r} is no box [[x1, y1, x2, y2]]")
    given = [float(number) for number in _NUMBER.findall(prediction)]
    if len(given) != 2:
        return 0.0
    return float(wanted[0] <= given[0] <= wanted[2] and wanted[1] <= given[1] <= wanted[3])
