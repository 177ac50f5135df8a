"""What a run has drawn: samples and tokens by data set, text and images, and how full packs were.

Every rank counts its own step, and what it counts is summed over the ranks with the loss's counts:
each rank's account is the whole run's, and a checkpoint holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from internvl.data import Row
from internvl.packing import Example
from sft.measuring import PackLimits
from training.metrics import Metrics


class Accounts:
    """Totals since the run began.

    names: of the data sets (none where there is one alone). limits: of a pack, where there are
    packs.
    """

    def __init__(self, names: Sequence[str], limits: PackLimits | None = None):
        self.names = list(names)
        self.limits = limits
        groups = ["text", "images", *(f"data/{name}" for name in names)]
        keys = [f"{group}/{what}" for group in groups for what in ("samples", "tokens")]
        more = ["tiles", "pieces", "split", "dropped", "packs"] if limits is not None else []
        self.totals = dict.fromkeys(keys + more, 0.0)

    def tally(self, rows: Sequence[Row], examples: Sequence[Example]) -> dict[str, float]:
        """The totals of what is in a step; a piece of a sample counts as its part of the tokens."""
        found = dict.fromkeys(self.totals, 0.0)
        for row, example in zip(rows, examples, strict=True):
            part = _part_of_sample(example)
            groups = ["text" if row.is_text else "images"]
            groups += [f"data/{row.data_set}"] if self.names else []
            for group in groups:
                found[f"{group}/samples"] += part
                found[f"{group}/tokens"] += example.num_tokens
            if self.limits is not None:
                found["tiles"] += example.num_tiles
                found["pieces"] += part < 1
                found["split"] += part if part < 1 else 0.0
                found["dropped"] += sum(example.completion_values["dropped"])
        return found

    def note(self, counts: Mapping[str, float], metrics: Metrics) -> None:
        """Take in a step's counts over all ranks, and add them to what is logged."""
        for key in self.totals:
            self.totals[key] += counts[key]
        for name, (part, whole) in self._ratios(counts).items():
            metrics.ratio(name, part, whole)

    def _ratios(self, counts: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        samples = counts["text/samples"] + counts["images/samples"]
        tokens = counts["text/tokens"] + counts["images/tokens"]
        out = {f"mixture/{n}": (counts[f"data/{n}/samples"], samples) for n in self.names}
        out["mixture/text_samples"] = (counts["text/samples"], samples)
        out["mixture/text_tokens"] = (counts["text/tokens"], tokens)
        if self.limits is not None:
            packs = counts["packs"]
            out["packing/token_fill"] = (tokens, packs * self.limits.tokens)
            if self.limits.tiles is not None:
                out["packing/tile_fill"] = (counts["tiles"], packs * self.limits.tiles)
            out["packing/samples"] = (samples, packs)
        return out

    def go_on(self, totals: Mapping[str, float]) -> None:
        """Go on from a checkpoint's totals."""
        self.totals = {key: float(totals[key]) for key in self.totals}

    def describe(self) -> Iterator[str]:
        """The account, line by line."""
        total = self.totals
        ratios = {name: part / (whole or 1) for name, (part, whole) in self._ratios(total).items()}
        samples = total["text/samples"] + total["images/samples"]
        tokens = total["text/tokens"] + total["images/tokens"]
        yield (
            f"drawn: {samples:.0f} samples, {tokens:.0f} tokens; without images "
            f"{ratios['mixture/text_samples']:.1%} of the samples, "
            f"{ratios['mixture/text_tokens']:.1%} of the tokens"
        )
        for name in self.names:
            found = f"{total[f'data/{name}/samples']:.0f} samples ({ratios[f'mixture/{name}']:.1%})"
            yield f"  {name}: {found}, {total[f'data/{name}/tokens']:.0f} tokens"
        if self.limits is not None:
            tiles = ratios.get("packing/tile_fill")
            yield (
                f"packs: {total['packs']:.0f} of {ratios['packing/samples']:.1f} samples; filled "
                f"{ratios['packing/token_fill']:.1%} of their tokens"
                + ("" if tiles is None else f", {tiles:.1%} of their tiles")
            )
            if total["pieces"]:
                yield f"split: {total['split']:.0f} samples in {total['pieces']:.0f} pieces"
            if total["dropped"]:
                yield f"cut: {total['dropped']:.0f} tokens of questions longer than a pack"


def _part_of_sample(example: Example) -> float:
    """1, or of a piece its share of the sample's response tokens."""
    assert example.loss_masks is not None
    (whole,) = example.completion_values["sample_length"]
    return sum(example.loss_masks[0]) / whole
