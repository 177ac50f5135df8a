"""What the report of a run shows, as plain data: no files, no HTML, no drawing.

Every rate is in 0..1, every interval holds 95%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from internvl.thumbnails import Thumbnail

# Colours of stages that the page knows, by number; the last is for all that come after.
TONES = 8


@dataclass(frozen=True)
class StageInfo:
    """A stage of the recipe.

    label: the reader's word for it. kind: of the recipe (sft, mpo, rl, pairs, ...). tone: number of
    its colour, from 1. origin: the stage whose model it began with, or, for an evaluation, whose
    model it asks; None where that is no stage. aside: not in the line of results that the recipe
    reports (a control, say).
    """

    name: str
    label: str
    kind: str
    tone: int = TONES
    origin: str | None = None
    aside: bool = False


@dataclass(frozen=True)
class Rate:
    """A share and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measures:
    """One checkpoint on some questions.

    n: questions; k: sampled answers of each. greedy: one answer at temperature 0; sampled: mean
    over the k. passes, majorities: pass@size and majority@size, by size. shares: of the sampled
    answers, by the reader's word (followed the format, ...).
    """

    n: int
    k: int
    greedy: Rate
    sampled: Rate
    mean_tokens: float
    passes: Mapping[int, Rate] = field(default_factory=dict)
    majorities: Mapping[int, Rate] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gap:
    """What one prompt set has over another on the same questions, sampled: value and p."""

    prompt: str
    other: str
    gain: Rate
    p: float


@dataclass(frozen=True)
class StageResult:
    """A stage's checkpoint on the held-out questions: over all, by data set, by prompt set."""

    info: StageInfo
    whole: Measures
    datasets: Mapping[str, Measures] = field(default_factory=dict)
    prompts: Mapping[str, Measures] = field(default_factory=dict)
    gaps: Sequence[Gap] = ()
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def label(self) -> str:
        return self.info.label


@dataclass(frozen=True)
class Step:
    """How far accuracy moved from one result to another.

    paired: whether question by question (else the two are taken as independent, from their
    intervals, and p is None). n: the questions that both answered. sampled: the bootstrap over
    questions; greedy: McNemar's exact test, with the questions that only one of the two has right.
    """

    before: StageInfo
    after: StageInfo
    n: int
    paired: bool
    sampled: Rate
    sampled_p: float | None
    greedy: Rate
    greedy_p: float | None
    only_before: int | None = None
    only_after: int | None = None

    @property
    def verdict(self) -> str:
        """up, down, or unclear where the interval of the sampled difference holds 0."""
        if self.sampled.low > 0:
            return "up"
        return "down" if self.sampled.high < 0 else "unclear"


@dataclass(frozen=True)
class Line:
    """One logged number over the optimizer steps; equally long, steps ascending.

    dropped: logged values that were NaN or infinite, and so cannot be drawn. held_out: of an
    evaluation while training.
    """

    key: str
    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    dropped: int = 0
    held_out: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart of one stage's training.

    unit: "", "share" (drawn in percent), or a word. bounds: (option's name, value) of the guards
    that watch it; passed: how many logged values lie past one.
    """

    stage: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    bounds: tuple[tuple[str, float], ...] = ()
    passed: int = 0
    is_time: bool = False

    @property
    def keys(self) -> str:
        """The names under which its lines were logged, in short."""
        names = [line.key for line in self.lines]
        starts = {name.partition("/")[0] if "/" in name else "" for name in names}
        start = starts.pop() if len(starts) == 1 and len(names) > 1 else ""
        return f"{start}/*" if start else ", ".join(names)


@dataclass(frozen=True)
class Training:
    """The charts of a stage: those that are told of, and whatever else was logged."""

    info: StageInfo
    panels: tuple[Panel, ...]
    others: tuple[Panel, ...] = ()


@dataclass(frozen=True)
class Picture:
    """An image of a question; or, where it cannot be shown, its name and why."""

    shown: Thumbnail | None
    name: str = ""
    fault: str = ""


@dataclass(frozen=True)
class StageAnswer:
    """What one stage answered; outcome is a verifier's, "correct" or another."""

    info: StageInfo
    completion: str
    outcome: str
    sampled_right: int
    sampled_total: int


@dataclass(frozen=True)
class ExampleRow:
    """One held-out question answered by each stage; fate says how it went, in words."""

    id: str
    dataset: str
    question: str
    answer: str
    pictures: tuple[Picture, ...]
    fate: str
    answers: tuple[StageAnswer, ...]


@dataclass(frozen=True)
class PairRow:
    """One preference pair; kind: correctness, format or dropout, "" where it is not said."""

    id: str
    question: str
    answer: str
    pictures: tuple[Picture, ...]
    chosen: str
    rejected: str
    kind: str = ""


@dataclass(frozen=True)
class PairSet:
    """The pairs that one stage made: some of them, and how many there are of which kind."""

    info: StageInfo
    rows: tuple[PairRow, ...]
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Rollouts:
    """The judged rollouts of one stage.

    model: the stage that was asked. outcomes: how many had which. right: questions by how many of
    `size` answers were right, 0 to size.
    """

    info: StageInfo
    model: str | None
    outcomes: Mapping[str, int]
    right: tuple[int, ...]
    kept: int | None = None  # by a selection

    @property
    def size(self) -> int:
        return len(self.right) - 1


@dataclass(frozen=True)
class BeforeAfter:
    """The same questions before and after a stage, by the share of their samples that were right.

    source: where the samples are from, in words. before, after: questions with 0 to size right of
    size. up, down: questions of which more, or fewer, were right after.
    """

    info: StageInfo
    start: str
    source: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    up: int
    down: int

    @property
    def n(self) -> int:
        return sum(self.before)


@dataclass(frozen=True)
class Process:
    """One process as it was run.

    stage: the recipe's that it is a part of. tokens: that it sampled or, training, was given; None
    where nothing says so. inputs: {path: hash of its content}.
    """

    name: str
    stage: str
    kind: str
    command: tuple[str, ...]
    done: bool
    seconds: float
    cpu_seconds: float | None = None
    tokens: int | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GateOutcome:
    """A gate: what became of it.

    state: passed, closed, "closed, passed by" (the run went on), or "not reached".
    """

    stage: str
    against: str
    metric: str
    max_drop: float
    before: float | None
    after: float | None
    state: str


@dataclass(frozen=True)
class ReportData:
    """All that the page of one run holds.

    results: of every evaluated stage in the order of the recipe; those with info.aside are beside
    the line that the recipe reports. steps: each result against the one that it began from; others:
    further pairs. fates counts the held-out questions by what became of them. waiting: stages that
    were not begun; stale: whose evaluations are of what has begun anew since, and not shown. An
    empty part is left out of the page.
    """

    title: str
    recipe: str
    seed: int
    seconds: float
    stages: Mapping[str, StageInfo]
    results: Sequence[StageResult]
    steps: Sequence[Step] = ()
    others: Sequence[Step] = ()
    trainings: Sequence[Training] = ()
    examples: Sequence[ExampleRow] = ()
    fates: Sequence[tuple[str, int]] = ()
    changes: Sequence[BeforeAfter] = ()
    pairs: Sequence[PairSet] = ()
    rollouts: Sequence[Rollouts] = ()
    gates: Sequence[GateOutcome] = ()
    processes: Sequence[Process] = ()
    waiting: Sequence[str] = ()
    stale: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    config_files: Sequence[tuple[str, str]] = ()  # (name, text)
    demo_world: bool = False  # whether what is known of the demo's world may be said

    @property
    def line(self) -> list[StageResult]:
        """The results that the recipe reports, in order."""
        return [result for result in self.results if not result.info.aside]

    @property
    def unfinished(self) -> list[Process]:
        """Processes that were begun and have not ended well."""
        return [process for process in self.processes if not process.done]

    def step_of(self, result: StageResult) -> Step | None:
        """A result's step from the one that it began from."""
        return next((step for step in self.steps if step.after.name == result.name), None)
