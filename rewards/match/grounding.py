"""Matchers of places in a picture: boxes and points, in 0..1000 of width and height.

    <ref>the dog</ref><box>[[100, 200, 300, 400]]</box>     InternVL's own (Chen et al. 2024)
    [100, 200, 300, 400]   (100,200),(300,400)   {"bbox_2d": [100, 200, 300, 400]}   a, b, c, d
    <point>[[500, 300]]</point>   (500, 300)   click(x=0.5, y=0.3)

Coordinates that are all at most 1, one with a decimal point, are shares of 1: times 1000.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from rewards.match.reasons import CannotJudge, Options

BOX_THRESHOLD = 0.5  # RefCOCO's Acc@0.5
POINT_RADIUS = 140.0  # 14% of the picture's side: AITW (Rawles et al. 2023), section 5
MAX_BOXES = 64  # of one answer: pairing them costs the cube
_UNMET = 0.49  # the most that an answer scores when a box is missed or one too many

Box = tuple[float, float, float, float]
Point = tuple[float, float]

_GROUP = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_TAG = re.compile(r"</?(?:box|point)>")
_NUMBERS = re.compile(r"[\d\s,.+-]+", re.ASCII)
_N = r"([+-]?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12}))"
_KEYED = re.compile(
    rf"\bx[\"']?\s{{0,3}}[=:]\s{{0,3}}{_N}\s{{0,3}},?\s{{0,3}}"
    rf"[\"']?y[\"']?\s{{0,3}}[=:]\s{{0,3}}{_N}(?![\d.])",
    re.ASCII,
)
_MAX_GROUP = 120  # characters between brackets


class Places(NamedTuple):
    """The boxes (x1, y1, x2, y2) and the points (x, y) that a text gives, in 0..1000."""

    boxes: list[Box]
    points: list[Point]


def read_places(text: str) -> Places | None:
    """The boxes and points of a text; None when one of them is malformed, or nothing is there.

    A bracket of two numbers right after another of two is a box by its corners. Brackets that hold
    no numbers are prose. Malformed is a bracket of another count of numbers, a box without area, a
    number beyond a million.

    >>> read_places("<box>[[0.1, 0.2, 0.3, 0.4]]</box>").boxes
    [(100.0, 200.0, 300.0, 400.0)]
    """
    if "<box>" in text and "</box>" in text:
        text = text[text.index("<box>") : text.rindex("</box>")]
    groups: list[list[str]] = []
    apart = "<point>" in text  # pairs of numbers are then points, never corners
    end, beside = 0, []
    for found in _GROUP.finditer(text):
        inside = found[1]
        if len(inside) <= _MAX_GROUP and _NUMBERS.fullmatch(inside):
            groups.append(inside.replace(",", " ").split())
            between = text[end : found.start()]
            beside.append(not apart and len(between) < 20 and not between.strip(" ,\n"))
            end = found.end()
            if len(groups) > 2 * MAX_BOXES:
                return None
    if not groups:
        if keyed := _KEYED.search(text):
            groups = [list(keyed.groups())]
        elif len(text) <= _MAX_GROUP and _NUMBERS.fullmatch(bare := _TAG.sub(" ", text)):
            groups = [bare.replace(",", " ").split()]
    return _places(groups, beside or [False])


def _places(groups: list[list[str]], beside: list[bool]) -> Places | None:
    """The places of groups of numbers, scaled to 0..1000; beside: a group directly follows one."""
    words = [word for group in groups for word in group]
    try:
        numbers = [float(word) for word in words]  # of digits, points and signs alone
    except ValueError:  # "1.2.3"
        return None
    if not numbers or max(numbers) > 1e6 or min(numbers) < -1e6:
        return None
    scale = 1000.0 if max(numbers) <= 1 and any("." in word for word in words) else 1.0
    places, position = Places([], []), 0
    corner: Point | None = None
    for group, follows in zip(groups, beside, strict=False):
        values = [number * scale for number in numbers[position : position + len(group)]]
        position += len(group)
        if len(values) == 2 and corner is not None and follows:
            places.boxes.append((*corner, values[0], values[1]))
            corner = None
            continue
        if corner is not None:
            places.points.append(corner)
            corner = None
        if len(values) == 2:
            corner = (values[0], values[1])
        elif len(values) == 4:
            places.boxes.append((values[0], values[1], values[2], values[3]))
        elif len(values) != 1:  # "(1)" counts something in prose
            return None
    if corner is not None:
        places.points.append(corner)
    if any(x2 <= x1 or y2 <= y1 for x1, y1, x2, y2 in places.boxes):
        return None
    return places if places.boxes or places.points else None


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes with area.

    >>> box_iou((0, 0, 10, 10), (0, 0, 10, 5))
    0.5
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return common / (areas - common)


def match_box(prediction: str, gold: str, options: Options = None) -> float:
    """The mean IoU of gold boxes and given ones, paired one to one as well as they can be.

    The mean is over the larger count. A match asks more than a mean of 0.5 (RefCOCO's Acc@0.5, Yu
    et al. 2016): that every gold box is met at 0.5 by a box of its own and none is too many; where
    that fails, several boxes score 0.49 at most. A malformed answer scores 0. Raises CannotJudge
    for a gold that is no box, or over 64 of them.
    """
    wanted = _gold_places(gold)
    if not wanted.boxes or wanted.points or len(wanted.boxes) > MAX_BOXES:
        raise CannotJudge(f"gold answer {gold[:60]!r} is no box [[x1, y1, x2, y2]]")
    given = read_places(prediction)
    if given is None or not given.boxes or given.points or len(given.boxes) > MAX_BOXES:
        return 0.0
    if len(wanted.boxes) == len(given.boxes) == 1:
        return box_iou(wanted.boxes[0], given.boxes[0])
    fewer, more = sorted((wanted.boxes, given.boxes), key=len)
    overlaps = [[box_iou(one, other) for other in more] for one in fewer]
    # a met pair outweighs any sum of overlaps: first as many as possible, then the best of those
    weights = [
        [iou + (MAX_BOXES if iou >= BOX_THRESHOLD else 0) for iou in row] for row in overlaps
    ]
    pairs = [overlaps[row][column] for row, column in enumerate(best_assignment(weights))]
    score = sum(pairs) / len(more)
    if len(fewer) == len(more) and min(pairs) >= BOX_THRESHOLD:
        return max(score, BOX_THRESHOLD)  # a mean of 0.5s may round below it
    return min(score, _UNMET)


def best_assignment(weights: list[list[float]]) -> list[int]:
    """The column for each row, none twice, of the greatest sum of weights; rows <= columns.

    The Hungarian method with potentials (Kuhn 1955), cubic.

    >>> best_assignment([[9.0, 8.0], [8.0, 1.0]])
    [1, 0]
    """
    rows, columns = len(weights), len(weights[0])
    row_potential, column_potential = [0.0] * (rows + 1), [0.0] * (columns + 1)
    row_of, came_from = [0] * (columns + 1), [0] * (columns + 1)  # 1-based; 0: free
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        slack, done = [math.inf] * (columns + 1), [False] * (columns + 1)
        while row_of[column]:
            done[column] = True
            least, following = math.inf, 0
            costs, base = weights[row_of[column] - 1], row_potential[row_of[column]]
            for other in range(1, columns + 1):
                if done[other]:
                    continue
                reduced = -costs[other - 1] - base - column_potential[other]
                if reduced < slack[other]:
                    slack[other], came_from[other] = reduced, column
                if slack[other] < least:
                    least, following = slack[other], other
            for other in range(columns + 1):
                if done[other]:
                    row_potential[row_of[other]] += least
                    column_potential[other] -= least
                else:
                    slack[other] -= least
            column = following
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    chosen = [0] * rows
    for column in range(1, columns + 1):
        if row_of[column]:
            chosen[row_of[column] - 1] = column - 1
    return chosen


def _gold_places(gold: str) -> Places:
    places = read_places(gold)
    if places is None:
        raise CannotJudge(f"gold answer {gold[:60]!r} is no box or point with an area and a place")
    return places


def match_point(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when the one point given lies in the gold box, or near the gold point.

    A box given counts by its centre (ScreenSpot, Cheng et al. 2024). Near is within 14% of the
    picture's side (AITW, Rawles et al. 2023). Any of several gold boxes or points will do, but
    several points
    given are none, unless they are the gold's. Raises CannotJudge for a gold that
    is no place.
    """
    wanted = _gold_places(gold)
    given = read_places(prediction)
    if given == wanted:
        return 1.0
    if given is None or len(given.boxes) + len(given.points) != 1:
        return 0.0
    if given.boxes:
        x1, y1, x2, y2 = given.boxes[0]
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
    else:
        x, y = given.points[0]
    inside = any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in wanted.boxes)
    near = any(math.hypot(x - px, y - py) <= POINT_RADIUS for px, py in wanted.points)
    return float(inside or near)
