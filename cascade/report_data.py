"""What the report of a cascade run shows, as plain data: no files, no HTML, no drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from internvl.thumbnails import Thumbnail

LABELS = {
    "sft-careful": "Careful SFT",
    "sft": "SFT",
    "mpo": "MPO",
    "control": "Control",
    "rl": "GSPO",
    "pairs": "Sample, verify, pair",
    "select": "Select",
}


def label(name: str) -> str:
    """Return the reader's word for a stage, or the name itself for a stage we do not know."""
    return LABELS.get(name, name)


@dataclass(frozen=True)
class StageResult:
    """One checkpoint on the held-out questions; every rate is in 0..1.

    greedy: one answer a question at temperature 0; sampled: mean over k answers at temperature 1;
    greedy_se, sampled_se: their standard errors. format: share of sampled answers that state a
    final answer as asked. careless: share that skips the reading; chain_correct: share whose
    reading and result are right (both None where they were not measured). seconds: of training.
    """

    name: str
    n: int
    k: int
    greedy: float
    greedy_se: float
    sampled: float
    sampled_se: float
    format: float
    mean_tokens: float
    careless: float | None = None
    chain_correct: float | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        return label(self.name)


@dataclass(frozen=True)
class Difference:
    """How far sampled accuracy moved from one result to another.

    gain is in 0..1 and sigmas is gain in standard errors of the difference, the two results
    taken as independent. They answer the same questions, so the true error is, if anything,
    smaller.
    """

    gain: float
    sigmas: float

    @property
    def proven(self) -> bool:
        """True when the gain is positive and more than 3 standard errors."""
        return self.gain > 0 and self.sigmas > 3


def difference(before: StageResult, after: StageResult) -> Difference:
    """Return the sampled accuracy of `after` minus that of `before`, with its certainty."""
    gain = after.sampled - before.sampled
    error = math.hypot(before.sampled_se, after.sampled_se)
    if error == 0:  # both exact (all right, or all wrong): any difference is certain
        return Difference(gain, 0.0 if gain == 0 else math.copysign(math.inf, gain))
    return Difference(gain, gain / error)


@dataclass(frozen=True)
class Curve:
    """One logged number of one stage over its optimizer steps; equally long, steps ascending."""

    stage: str
    key: str
    title: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    dropped: int = 0  # logged values that were NaN or infinite, and so cannot be drawn


@dataclass(frozen=True)
class StageAnswer:
    """What one stage answered to a question; outcome is a verifier's, "correct" or another."""

    stage: str
    completion: str
    outcome: str
    sampled_right: int
    sampled_total: int


@dataclass(frozen=True)
class ExampleRow:
    """One held-out question answered by each stage; fate says how it went, in words."""

    id: str
    question: str
    answer: str
    pictures: tuple[Thumbnail, ...]
    fate: str
    answers: tuple[StageAnswer, ...]


@dataclass(frozen=True)
class PairRow:
    """One preference pair."""

    id: str
    question: str
    answer: str
    pictures: tuple[Thumbnail, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Histogram:
    """Counts by bin; band is the range of bin indices (both in) to bring out, if any."""

    title: str
    note: str
    bins: tuple[str, ...]
    counts: tuple[int, ...]
    band: tuple[int, int] | None = None


@dataclass(frozen=True)
class ManifestRow:
    """One stage as it was run."""

    stage: str
    seconds: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class ReportData:
    """All that the page holds. stages are in the order in which they were trained.

    careful is the model before careless data was mixed in, control is SFT continued on the chosen
    completions alone for MPO's steps; both are None where they were not evaluated. fates counts
    the held-out questions by what became of them. An empty part is left out of the page.
    """

    title: str
    seed: int
    preset: str
    seconds: float
    stages: Sequence[StageResult]
    careful: StageResult | None = None
    control: StageResult | None = None
    curves: Sequence[Curve] = ()
    examples: Sequence[ExampleRow] = ()
    fates: Sequence[tuple[str, int]] = ()
    pairs: Sequence[PairRow] = ()
    pairs_total: int = 0
    histograms: Sequence[Histogram] = ()
    manifest: Sequence[ManifestRow] = ()
    config_files: Sequence[tuple[str, str]] = ()  # (name, text)
    demo_world: bool = False  # whether what is known of the demo's world may be said

    @property
    def shown(self) -> list[StageResult]:
        """Every result in reading order: careful SFT first, the control right after MPO."""
        rows = [self.careful, *self.stages] if self.careful else list(self.stages)
        if self.control is None:
            return [row for row in rows if row is not None]
        names = [row.name for row in rows if row is not None]
        place = names.index("mpo") + 1 if "mpo" in names else len(rows)
        return [row for row in [*rows[:place], self.control, *rows[place:]] if row is not None]
