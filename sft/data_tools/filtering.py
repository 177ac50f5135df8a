"""What becomes of a conversation: kept, rejected for reasons, or undecided.

accepted in a review? -> kept
rules -> rejected            (the model is not asked about what a rule has hit)
domain -> quality below 7 -> rejected      no reply -> undecided
          repetition below 3 -> rejected   no reply -> undecided
kept
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl.data import Row
from rewards.endpoint import Answer, Endpoint, Failures
from sft.data_tools.asking import tell_fault
from sft.data_tools.inputs import Part, row_key
from sft.data_tools.rules import RULES, Finding, find_findings
from sft.data_tools.scores import (
    CLASSIFY_PROMPT,
    DOMAINS,
    QUALITY,
    REPETITION,
    REPETITION_PROMPT,
    Score,
    messages,
    quality_prompt,
    read_domain,
    read_score,
)
from sft.data_tools.working import Decision

_AGAIN = tell_fault("Reply with the JSON object alone.")
REPETITION_RULES = [rule.name for rule in RULES if rule.repetition]


@dataclass(frozen=True)
class FilterConfig:
    """What decides. thresholds: by rule. skip: rules left out. exempt: data sets whose repetition
    is not looked at. asked: the scores that a model gives. quality, repetition: the least scores
    that are kept. domains: by data set. domain: of all rows that name none (None: classified).
    images_too: whether rows with images get a score for quality, which the model gives unseen.
    """

    thresholds: Mapping[str, float]
    skip: Collection[str] = ()
    exempt: Collection[str] = ()
    asked: Collection[str] = ()
    quality: float = 7
    repetition: float = 3
    domains: Mapping[str, str] = field(default_factory=dict)
    domain: str | None = None
    images_too: bool = False
    accepted: Collection[str] = ()


class RowFilter:
    """Decides on rows, from any thread. endpoint: None where no score is asked for.

    accepted: the keys of a review that were met. data_sets: the names that were met.
    """

    def __init__(self, config: FilterConfig, endpoint: Endpoint | None):
        self.config = config
        self.endpoint = endpoint
        self.accepted: set[str] = set()
        self.data_sets: set[str] = set()
        self.failures = None if endpoint is None else endpoint.failures()

    def decide(self, part: Part, row: Row) -> Decision:
        """What becomes of a row."""
        name = str(row.data.get("dataset") or part.name or "")
        self.data_sets.add(name)
        if self.config.accepted and (key := row_key(row)) in self.config.accepted:
            self.accepted.add(key)
            return Decision("kept", reasons=["kept:accepted"])
        turns = row.data["conversations"]
        exempt = name in self.config.exempt
        skip = {*self.config.skip, *(REPETITION_RULES if exempt else ())}
        if findings := find_findings(turns, dict(self.config.thresholds), skip=skip):
            return _rejected(findings, {})
        if self.endpoint is None:
            return Decision("kept")
        asked = _Asked(self.endpoint, self.failures, turns)
        return self._by_scores(row, name, exempt, asked)

    def _by_scores(self, row: Row, name: str, exempt: bool, asked: _Asked) -> Decision:
        """The decision of a row that no rule has hit; each score is asked for only if needed."""
        config = self.config
        pictured = bool(row.images or row.num_frames)
        if QUALITY in config.asked and (config.images_too or not pictured):
            domain = self._named_domain(row, name) or asked.domain()
            if domain is None:
                return asked.undecided("domain")
            asked.told["domain"] = domain
            if (score := asked.score(QUALITY, quality_prompt(domain))) is None:
                return asked.undecided(QUALITY)
            if score.score < config.quality:
                return _rejected([_of_score(QUALITY, score, config.quality)], asked.told)
        if REPETITION in config.asked and not exempt:
            if (score := asked.score(REPETITION, REPETITION_PROMPT)) is None:
                return asked.undecided(REPETITION)
            if score.score < config.repetition:
                return _rejected([_of_score(REPETITION, score, config.repetition)], asked.told)
        return Decision("kept")

    def _named_domain(self, row: Row, name: str) -> str | None:
        own = row.data.get("domain")
        if isinstance(own, str) and own.lower() in DOMAINS:
            return own.lower()
        return self.config.domains.get(name, self.config.domain)


class _Asked:
    """What a model is asked about one conversation. told: the domain and the scores so far."""

    def __init__(
        self, endpoint: Endpoint, failures: Failures | None, turns: Sequence[dict[str, Any]]
    ):
        self._endpoint, self._failures, self._turns = endpoint, failures, turns
        self.told: dict[str, Any] = {}
        self._last: Answer[Any] | None = None

    def domain(self) -> str | None:
        """The domain that the model names, None where it does not."""
        request = self._endpoint.request(messages(CLASSIFY_PROMPT, self._turns))
        answer = self._endpoint.ask_one(request, read_domain, again=_AGAIN, failures=self._failures)
        self._last = answer
        return answer.value

    def score(self, name: str, prompt: str) -> Score | None:
        """A score, None where there is none."""
        request = self._endpoint.request(messages(prompt, self._turns))
        answer = self._endpoint.ask_one(request, read_score, again=_AGAIN, failures=self._failures)
        self._last = answer
        if answer.value is not None:
            self.told.setdefault("scores", {})[name] = answer.value.score
        return answer.value

    def undecided(self, what: str) -> Decision:
        """The decision where the model did not answer."""
        assert self._last is not None
        said = "" if self._last.detail is None else f" ({self._last.detail})"
        told = {"reason": f"{what}: {self._last.reason}{said}", **self.told}
        return Decision("undecided", told, reasons=[f"undecided:{what}"])


def _of_score(name: str, score: Score, least: float) -> Finding:
    told = score.reason or "the model gave no reason"
    return Finding(name, told, score.score, least)


def _rejected(findings: Sequence[Finding], told: Mapping[str, Any]) -> Decision:
    reasons = [finding.as_dict() for finding in findings]
    names = [f"rejected:{finding.rule}" for finding in findings]
    return Decision("rejected", {"reasons": reasons, **told}, reasons=names)
