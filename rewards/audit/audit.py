"""What a file of rollouts says of its verdicts: likely mistakes, and outcomes by data set.

    report = audit([Path("rollouts.jsonl")])

Memory is bounded however long the files are: of a group (one pattern in one data set) a count and
a few examples are kept, and data sets and groups beyond a number are counted together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewards.audit.findings import KINDS, Finding, find, math_finding, wants_math
from rewards.audit.rollouts import BadLine, Request, Rollout, read_rollouts
from rewards.datasets import DatasetTable
from rewards.display import visible
from rewards.pool import VerifierPool
from rewards.verdict import Outcome, Task, Verdict

BATCH_ROWS, BATCH_SIZE = 2000, 2**24  # rollouts judged at a time, and the characters of their texts
MOST_EXAMPLES = 6  # of a group
MOST_GROUPS, MOST_DATASETS, MOST_BAD = 5000, 500, 100
NO_DATASET, OTHER_DATASETS = "(no data set)", "(other data sets)"
_LONGEST_TAIL, _LONGEST_QUESTION = 700, 500  # characters that an example keeps


@dataclass
class Example:
    """A rollout of a group, and how many have the same gold and final answer."""

    file: str
    line: int
    question: str
    gold: str
    extracted: str | None
    tail: str
    images: tuple[str, ...]
    outcome: str
    matcher: str
    likelihood: float
    count: int = 1


@dataclass
class Group:
    """The findings of one pattern in one data set."""

    kind: str
    pattern: str
    dataset: str
    count: int = 0
    likely: float = 0.0  # summed
    examples: dict[tuple[str, str | None], Example] = field(default_factory=dict)

    @property
    def likelihood(self) -> float:
        """The mean over the group."""
        return self.likely / self.count

    def add(self, finding: Finding, rollout: Rollout, verdict: Verdict) -> None:
        """Count one finding; the likeliest distinct ones stay as examples."""
        self.count += 1
        self.likely += finding.likelihood
        key = (finding.gold[:200], None if verdict.extracted is None else verdict.extracted[:200])
        if known := self.examples.get(key):
            known.count += 1
            return
        if len(self.examples) >= MOST_EXAMPLES:
            least = min(self.examples, key=lambda one: self.examples[one].likelihood)
            if self.examples[least].likelihood >= finding.likelihood:
                return
            del self.examples[least]
        self.examples[key] = _example(finding, rollout, verdict)


@dataclass
class AuditReport:
    """What was found in some files."""

    files: tuple[str, ...]
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)  # by data set
    matchers: dict[str, Counter[str]] = field(default_factory=dict)
    format_ok: Counter[str] = field(default_factory=Counter)  # by data set
    groups: dict[tuple[str, str, str], Group] = field(default_factory=dict)
    stored: int = 0  # rollouts that came with a verdict
    bad: list[BadLine] = field(default_factory=list)  # the first of them
    bad_lines: int = 0

    @property
    def rows(self) -> int:
        """The number of rollouts that were judged."""
        return sum(counts.total() for counts in self.outcomes.values())

    @property
    def totals(self) -> Counter[str]:
        """The rollouts by outcome."""
        return sum(self.outcomes.values(), Counter())

    def add_bad(self, bad: BadLine) -> None:
        """Count a line that cannot be judged."""
        self.bad_lines += 1
        if len(self.bad) < MOST_BAD:
            self.bad.append(bad)

    def add(self, rollout: Rollout, verdict: Verdict, findings: Iterable[Finding]) -> None:
        """Count one rollout and what is to be said of it."""
        name = visible(rollout.dataset or NO_DATASET)[:120]
        if name not in self.outcomes and len(self.outcomes) >= MOST_DATASETS:
            name = OTHER_DATASETS
        self.outcomes.setdefault(name, Counter())[str(verdict.outcome)] += 1
        self.matchers.setdefault(verdict.matcher, Counter())[str(verdict.outcome)] += 1
        # a completion that was cut off kept to no format, as in `mmpr verify`
        cut_off = rollout.record.get("finish_reason") == "length"
        self.format_ok[name] += verdict.format_ok and not cut_off
        self.stored += rollout.stored is not None
        for finding in findings:
            self._group(finding, name).add(finding, rollout, verdict)

    def _group(self, finding: Finding, dataset: str) -> Group:
        key = (finding.kind, finding.pattern, dataset)
        if key not in self.groups and len(self.groups) >= MOST_GROUPS:
            key = (finding.kind, "other patterns", OTHER_DATASETS)
        return self.groups.setdefault(key, Group(*key))

    def ranked(self, kind: str) -> list[Group]:
        """The groups of a kind: the likeliest mistakes first, then the largest groups."""
        groups = [group for group in self.groups.values() if group.kind == kind]
        return sorted(groups, key=lambda one: (-round(one.likelihood, 1), -one.count, one.pattern))

    def counts(self) -> dict[str, int]:
        """The number of findings by kind."""
        return {kind: sum(group.count for group in self.ranked(kind)) for kind in KINDS}


def audit(
    files: Sequence[Path],
    *,
    table: DatasetTable | None = None,
    matcher: str | None = None,
    style: str = "auto",
    workers: int = 1,
    limit: float = 5.0,
    on_bytes: Callable[[int], object] = lambda size: None,
) -> AuditReport:
    """Judge the rollouts of JSONL files and look for verdicts that are likely mistakes.

    Rollouts with a verdict are judged again and compared with it. table, matcher: what to judge by
    instead of the built-in table, and instead of everything. workers, limit: of `VerifierPool`.
    Raises OSError for a file that cannot be read, ValueError for an unknown style.
    """
    report = AuditReport(tuple(map(str, files)))
    request = Request(style, table, matcher)

    def rollouts() -> Iterator[Rollout]:
        for file in files:
            yield from read_rollouts(file, report.add_bad, on_bytes, request)

    with VerifierPool(workers, limit=limit) as pool:
        for batch in batches(rollouts()):
            _audit_batch(batch, pool, report)
    return report


def batches(rollouts: Iterable[Rollout]) -> Iterator[list[Rollout]]:
    """Rollouts by the batch, bounded in number and in the size of their texts."""
    batch: list[Rollout] = []
    size = 0
    for rollout in rollouts:
        batch.append(rollout)
        size += len(rollout.task.completion) + len(str(rollout.record.get("question")))
        if len(batch) >= BATCH_ROWS or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _audit_batch(batch: Sequence[Rollout], pool: VerifierPool, report: AuditReport) -> None:
    """Judge a batch, and ask mathematics where it alone may object to the verdict."""
    tasks = [one.task for one in batch]
    verdicts = list(pool.map(tasks))
    found = [
        find(one.record, task, verdict, one.stored)
        for one, task, verdict in zip(batch, tasks, verdicts, strict=True)
    ]
    doubtful = [
        index
        for index, (task, verdict) in enumerate(zip(tasks, verdicts, strict=True))
        if wants_math(task, verdict) and not _is_doubted(found[index])
    ]
    asked = (
        Task(tasks[index].completion, tasks[index].answers, ("math",), style=tasks[index].style)
        for index in doubtful
    )
    for index, told in zip(doubtful, pool.map(asked), strict=True):
        if told.outcome == Outcome.CORRECT:
            found[index] = [one for one in found[index] if one.kind != "false negative"]
            found[index].append(math_finding(tasks[index], verdicts[index]))
    for one, verdict, findings in zip(batch, verdicts, found, strict=True):
        report.add(one, verdict, findings)


def _is_doubted(findings: Iterable[Finding]) -> bool:
    """Whether another matcher accepts already, so that mathematics need not be asked."""
    return any(one.kind == "false negative" and one.likelihood > 0.7 for one in findings)


def _example(finding: Finding, rollout: Rollout, verdict: Verdict) -> Example:
    record = rollout.record
    question = record.get("question")
    images = record.get("image")
    images = [images] if isinstance(images, str) else images
    usable = isinstance(images, list) and all(isinstance(name, str) for name in images)
    tail = record["completion"]
    return Example(
        file=rollout.file,
        line=rollout.line,
        question=_question(question) if isinstance(question, str) else "",
        gold=finding.gold[:_LONGEST_QUESTION],
        extracted=None if verdict.extracted is None else verdict.extracted[:_LONGEST_QUESTION],
        tail=tail if len(tail) <= _LONGEST_TAIL else f"…{tail[-_LONGEST_TAIL:]}",
        images=tuple(images[:4]) if usable and images else (),
        outcome=str(verdict.outcome),
        matcher=verdict.matcher,
        likelihood=finding.likelihood,
    )


def _question(text: str) -> str:
    """A question without the marks where its images stand, cut where it is long."""
    text = text[: 2 * _LONGEST_QUESTION].replace("<image>", "").strip()
    return text if len(text) <= _LONGEST_QUESTION else f"{text[:_LONGEST_QUESTION]}…"
