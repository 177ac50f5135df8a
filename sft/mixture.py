"""Which sample stands at which place of the stream, where data sets are mixed.

    place -> epoch, place in it --keyed permutation--> slot -> data set and its draw number
                                                               -> round of the data set, its place
                                                               --keyed permutation--> row

An epoch has a fixed number of slots for each data set, so its share is met exactly, and the draws
of a data set are counted on from epoch to epoch: all its rows have come before one comes again.
With replacement both the data set and the row are drawn anew at every place. Either way a place
costs the same wherever it lies, and depends on the data, the options and the seed alone.
"""

from __future__ import annotations

import difflib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from internvl.data import Row
from internvl.data.rowsets import RowSequence, Span
from internvl.data.sources import data_set_weights
from internvl.encoding import Encoder
from internvl.errors import DataError, UserError
from sft.config import SFTConfig
from sft.stream_options import changes_order
from training.orders import Permutation, below

_LOOKED_AT = 128  # rows that stand for their data set: is there an image, how many tokens
ALL = "all rows"  # what data without a name are called


@dataclass(frozen=True)
class Part:
    """Rows that are drawn as one: a data set's, or those of them with (or without) images.

    numbers: of the rows. share: of the samples, in proportion to the other parts' shares. text:
    whether they are without images (None: not looked at). tokens: a sample's on average.
    """

    name: str
    numbers: Sequence[int]
    share: float
    text: bool | None = None
    tokens: float = 1.0


class Mixture:
    """The order (training/orders.py) that draws from each part by its share.

    length: samples of an epoch. Raises `UserError` for a part of which nothing would be drawn.

    >>> mixture = Mixture([Part("a", range(3), 2), Part("b", range(3, 5), 1)], 6, seed=0)
    >>> [sorted(mixture[place] for place in range(start, start + 6)) for start in (0, 6)]
    [[0, 1, 2, 2, 3, 4], [0, 0, 1, 2, 3, 4]]
    """

    def __init__(self, parts: Sequence[Part], length: int, *, seed: int, replacement: bool = False):
        self.parts = list(parts)
        self.replacement = replacement
        self._seed = seed
        self.quotas = _quotas([part.share for part in parts], length)
        self._ends = list(accumulate(self.quotas))
        self._kept: dict[int, tuple[int, Permutation]] = {}  # the latest round of each part
        for part, quota in zip(parts, self.quotas, strict=True):
            if not quota:
                raise UserError(
                    f"mixture: the share of {part.name} is less than one of an epoch's {length} "
                    "samples"
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, len(self))
        if self.replacement:
            slot = below(len(self), self._seed, epoch, within, 1)
            numbers = self.parts[bisect_right(self._ends, slot)].numbers
            return numbers[below(len(numbers), self._seed, epoch, within, 2)]
        slot = self._shuffle(-1, epoch, len(self))[within]
        which = bisect_right(self._ends, slot)
        quota, numbers = self.quotas[which], self.parts[which].numbers
        draw = epoch * quota + slot - (self._ends[which] - quota)
        again, number = divmod(draw, len(numbers))
        return numbers[self._shuffle(which, again, len(numbers))[number]]

    def _shuffle(self, which: int, again: int, size: int) -> Permutation:
        kept = self._kept.get(which)
        if kept is None or kept[0] != again:
            kept = (again, Permutation(size, self._seed, which, again))
            self._kept[which] = kept
        return kept[1]

    def describe(self) -> Iterator[str]:
        """What an epoch draws from each part, one line each."""
        how = "with replacement" if self.replacement else "without replacement"
        yield f"mixture: {len(self)} samples an epoch, {how}"
        for part, quota in zip(self.parts, self.quotas, strict=True):
            rows = len(part.numbers)
            yield (
                f"  {part.name}: {quota} samples ({quota / len(self):.1%}) of {rows} rows, "
                f"{quota / rows:.2f} times"
            )


def _quotas(shares: Sequence[float], length: int) -> list[int]:
    """Whole numbers in proportion to the shares that sum to `length` (largest remainders).

    >>> _quotas([1, 1, 1], 10), _quotas([0.5, 0.25, 0.25], 5)
    ([4, 3, 3], [3, 1, 1])
    """
    total = sum(shares)
    exact = [share / total * length for share in shares]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - exact[i], i))
    for index in islice(by_remainder, length - sum(quotas)):
        quotas[index] += 1
    return quotas


# ---------------------------------------------------------------- from rows and options


def spans_of(rows: Sequence[Row]) -> list[Span]:
    """The data sets that rows are of."""
    return rows.spans() if isinstance(rows, RowSequence) else [Span(range(len(rows)))]


def check_weights(found: Mapping[str, float | None], args: SFTConfig) -> dict[str, float]:
    """The weight of each data set by its name, or none where the options do not ask for weights.

    found: what meta.json gives, for every data set. Raises `UserError` for a name that is not
    there, a data set without a weight, or weights that would not be read.
    """
    asked = args.mixture_weights or {}
    assert isinstance(asked, dict)
    for name in asked:
        if name not in found:
            near = difflib.get_close_matches(str(name), found, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(found) or ALL}"
            raise UserError(
                f"mixture_weights names {name!r}, no data set of {args.train_file}; {known}"
            )
    own = {name: weight for name, weight in found.items() if weight is not None}
    if args.mixture != "weights":
        if own:
            raise UserError(
                f"{args.train_file} gives a weight to {', '.join(own)}, but mixture is "
                f'"{args.mixture}": give mixture: weights, or take the weights out'
            )
        return {}
    if not found:
        raise UserError("mixture: weights mixes the data sets of a meta.json; this is one data set")
    weights = {**own, **asked}
    if missing := [name for name in found if name not in weights]:
        raise UserError(
            f"mixture: weights, but no weight of {', '.join(missing)} in {args.train_file} or "
            "mixture_weights"
        )
    return weights


def check_names(args: SFTConfig) -> None:
    """Raise `UserError` for weights that do not fit the data sets, before anything is loaded."""
    check_weights(data_set_weights(Path(args.train_file)), args)


def make_mixture(rows: Sequence[Row], args: SFTConfig, encoder: Encoder) -> Mixture | None:
    """The order that the options ask for; None: every row once an epoch, as it is without them.

    An epoch has as many samples as there are rows, repetitions counted.
    """
    spans = spans_of(rows)
    weights = check_weights({s.name: s.weight for s in spans if s.name is not None}, args)
    if not changes_order(args):
        return None
    parts = [
        Part(span.name or ALL, span.numbers, weights.get(span.name or ALL, len(span.numbers)))
        for span in spans
        if len(span.numbers)  # repeat_time 0 leaves one out
    ]
    if args.text_ratio is not None:
        parts = _by_ratio(rows, parts, args, encoder)
    seed = args.seed if args.data_seed is None else args.data_seed
    return Mixture(parts, len(rows), seed=seed, replacement=args.mixture_replacement)


def _by_ratio(
    rows: Sequence[Row], parts: Sequence[Part], args: SFTConfig, encoder: Encoder
) -> list[Part]:
    """The parts with or without images, their shares such that text has its ratio."""
    every_row = args.check_rows == "before"
    parts = [half for part in parts for half in _by_kind(rows, part, every_row=every_row)]
    for text in (True, False):
        if not any(part.text is text for part in parts):
            what = "without an image" if text else "with an image"
            raise UserError(f"text_ratio: there is no data set with rows {what}")
    if args.text_ratio_by == "tokens":
        parts = [_measured(rows, part, encoder) for part in parts]
    share = {kind: sum(p.share for p in parts if p.text is kind) for kind in (True, False)}
    mean = {
        kind: sum(p.share * p.tokens for p in parts if p.text is kind) / share[kind]
        for kind in (True, False)
    }
    ratio = args.text_ratio
    assert ratio is not None
    # samples s of text give s * mean[text] of its tokens; they are to be `ratio` of all
    samples = {True: ratio * mean[False], False: (1 - ratio) * mean[True]}
    return [
        Part(p.name, p.numbers, p.share / share[p.text] * samples[p.text], p.text, p.tokens)
        for p in parts
        if p.text is not None
    ]


def _some(rows: Sequence[Row], part: Part) -> Iterator[Row]:
    """A few rows of a part, drawn by chance (always the same), that are not known to be bad."""
    order = Permutation(len(part.numbers), len(part.numbers))
    for place in range(min(_LOOKED_AT, len(part.numbers))):
        row = rows[part.numbers[order[place]]]
        if row.fault is None:
            yield row


def _by_kind(rows: Sequence[Row], part: Part, *, every_row: bool) -> list[Part]:
    """A part as one of text or of images, going by some rows; one that holds both as two.

    every_row: whether all rows may be read to tell them apart; else such a part is an error.
    """
    kinds = {row.is_text for row in _some(rows, part)}
    if len(kinds) < 2:
        return [Part(part.name, part.numbers, part.share, kinds.pop() if kinds else False)]
    if not every_row:
        raise UserError(
            f"text_ratio: {part.name} holds rows with and without images, which check_rows: "
            "when_used does not tell apart beforehand: put them into files of their own"
        )
    halves = {True: array("q"), False: array("q")}
    for number in part.numbers:
        halves[rows[number].is_text].append(number)
    return [
        Part(
            f"{part.name} ({'text' if text else 'images'})",
            numbers,
            part.share * len(numbers) / len(part.numbers),
            text,
        )
        for text, numbers in halves.items()
    ]


def _measured(rows: Sequence[Row], part: Part, encoder: Encoder) -> Part:
    """A part with its tokens a sample, as far as some rows tell."""
    found = []
    for row in _some(rows, part):
        try:
            row.check_paths()
            found.append(encoder.length(row, "conversation"))
        except DataError:  # it is put aside when its turn comes
            continue
    if not found:
        raise UserError(f"text_ratio: none of the rows of {part.name} that were tried can be used")
    return Part(part.name, part.numbers, part.share, part.text, sum(found) / len(found))
