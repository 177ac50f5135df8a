"""Preference pairs from verdicts, as MMPR makes them, in MMPR's format.

    chosen      correct and the format was followed
    rejected    wrong (a correctness pair), or without a final answer (a format pair, kept apart
                and at most a stated share of all pairs: they teach the format, not the answer)

Within one question; at most `max_pairs` of them, each completion used as evenly as possible. A
pair is skipped when the correct answer stands, as whole words, in the rejected answer: "5" in
"5 apples" may be right after all. ("5" in "15" is no such case: the published scripts compare
bare substrings.) What cannot be judged is never in a pair. The same pair of another question (two
ids with one image and text) is written once.

With `balance_length` the pairs that are taken, where there is a choice, are those of like length: a
longer reply is not a better one, and a policy that sees mostly longer ones chosen learns to go on.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

from internvl.errors import UserError
from internvl.hashing import stable_hash
from mmpr.groups import JUDGED, golds

LENGTH_RATIOS = (
    "below 0.5", "0.5-0.67", "0.67-0.8", "0.8-1", "1-1.25", "1.25-1.5", "1.5-2", "2 and more",
)  # fmt: skip
_RATIO_EDGES = (0.5, 2 / 3, 0.8, 1.0, 1.25, 1.5, 2.0)
OF_THE_PROMPT = ("image", "video", "num_frames", "max_tiles", "system")  # besides the question


@dataclass(frozen=True)
class PairConfig:
    """How pairs are made.

    max_pairs: per question (MMPR: 15, or 3 where there is plenty). format_negatives: whether
    format pairs are made; max_format_share: of all pairs, in [0, 1]. balance_length: prefer pairs
    of like length. seed: of the draw.
    """

    max_pairs: int = 15
    format_negatives: bool = True
    max_format_share: float = 0.5
    balance_length: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            raise UserError(f"max pairs per question is {self.max_pairs}; it must be at least 1")
        if not 0 <= self.max_format_share <= 1:
            raise UserError(f"max format share is {self.max_format_share}; it lies in [0, 1]")


@dataclass
class PairReport:
    """What became of the questions and of the candidate pairs.

    without_pairs: questions that gave no pair, by reason. left_out: completions and candidate
    pairs left out, by reason. chosen_chars, rejected_chars: summed over the pairs. differences:
    pairs by the chosen reply's length in that of the rejected one (`LENGTH_RATIOS`).
    """

    questions: int = 0
    questions_with_pairs: int = 0
    correctness: int = 0
    format: int = 0
    without_pairs: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    chosen_chars: int = 0
    rejected_chars: int = 0
    chosen_longer: int = 0
    differences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LENGTH_RATIOS, 0))

    def add(self, pair: dict[str, Any]) -> None:
        """Count one pair that is written."""
        chosen, rejected = len(pair["chosen"]), len(pair["rejected"])
        self.correctness += pair["kind"] == "correctness"
        self.format += pair["kind"] == "format"
        self.chosen_chars += chosen
        self.rejected_chars += rejected
        self.chosen_longer += chosen > rejected
        self.differences[length_ratio(chosen, rejected)] += 1

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.correctness + self.format

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON; mean lengths in characters."""
        pairs = max(1, self.pairs)
        return {
            "questions": self.questions,
            "questions_with_pairs": self.questions_with_pairs,
            "pairs": self.pairs,
            "correctness_pairs": self.correctness,
            "format_pairs": self.format,
            "questions_without_pairs": dict(self.without_pairs),
            "left_out": dict(self.left_out),
            "mean_chosen_chars": self.chosen_chars / pairs,
            "mean_rejected_chars": self.rejected_chars / pairs,
            "share_chosen_longer": self.chosen_longer / pairs,
            "chosen_over_rejected_length": dict(self.differences),
        }


def length_ratio(chosen: int, rejected: int) -> str:
    """The bucket of `LENGTH_RATIOS` for two lengths; a bucket holds its lower edge.

    >>> length_ratio(99, 100), length_ratio(100, 100), length_ratio(300, 100)
    ('0.8-1', '1-1.25', '2 and more')
    """
    return LENGTH_RATIOS[bisect_right(_RATIO_EDGES, chosen / rejected)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("−", "-").split())


def contains_answer(inside: str, answer: str) -> bool:
    """Whether `answer` stands in `inside` as whole words and numbers, and is not negated there.

    >>> contains_answer("5 apples", "5"), contains_answer("15", "5"), contains_answer("-5", "5")
    (True, False, False)
    >>> contains_answer("not possible", "possible"), contains_answer("不是", "是")
    (False, False)
    """
    answer = re.escape(_plain(answer))
    if not answer:
        return False
    before, after = r"(?<![a-z0-9])(?<!\d[.,])(?<![-+])", r"(?![a-z0-9]|[.,]\d)"
    before += r"(?<!\bno )(?<!\bnot )(?<![不没非无])"
    return re.search(before + answer + after, _plain(inside)) is not None


def _distinct(verdicts: Iterable[dict[str, Any]], report: PairReport) -> list[dict[str, Any]]:
    """The verdicts with distinct completions, the first of each kept."""
    kept: dict[str, dict[str, Any]] = {}
    for verdict in verdicts:
        text = verdict["completion"].strip()
        if not text:
            report.left_out["empty completion"] += 1
        elif text in kept:
            report.left_out["duplicate completion"] += 1
        else:
            kept[text] = verdict
    return list(kept.values())


@dataclass(frozen=True)
class _Candidates:
    """One question's distinct completions by what they can be used for."""

    positives: list[dict[str, Any]]
    wrong: list[dict[str, Any]]
    unanswered: list[dict[str, Any]]

    def why_no_pair(self, verdicts: list[dict[str, Any]], config: PairConfig) -> str | None:
        """Why this question can give no pair, or None."""
        outcomes = {verdict["outcome"] for verdict in verdicts}
        if outcomes.isdisjoint(JUDGED):
            return "nothing could be judged"
        if not self.positives:
            if "correct" in outcomes:
                return "correct only with a broken format"
            return "none correct"
        if not self.wrong and not (self.unanswered and config.format_negatives):
            return "only format negatives" if self.unanswered else "none wrong"
        return None


def _candidates(verdicts: list[dict[str, Any]], report: PairReport) -> _Candidates:
    correct = [item for item in verdicts if item["outcome"] == "correct" and item["format_ok"]]
    # A completion cut off at max_tokens is a format negative: "Final answer: 1" may have been 12.
    wrong, unanswered = [], []
    for item in verdicts:
        if item["outcome"] == "wrong" and item.get("finish_reason") != "length":
            wrong.append(item)
        elif item["outcome"] in ("wrong", "no_answer"):
            unanswered.append(item)
    return _Candidates(
        _distinct(correct, report), _distinct(wrong, report), _distinct(unanswered, report)
    )


def even_pairs(
    positives: list[dict[str, Any]], negatives: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every (positive, negative) once, in an order whose every beginning uses each evenly.

    Both lists go round side by side; when they come back to where they began (after lcm pairs),
    the negatives move on by one.
    """
    if not positives or not negatives:
        return
    around = math.lcm(len(positives), len(negatives))
    for step in range(len(positives) * len(negatives)):
        shift = step // around
        yield positives[step % len(positives)], negatives[(step + shift) % len(negatives)]


def like_pairs(
    positives: list[dict[str, Any]], negatives: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every (positive, negative) once: first those least used so far, then those of like length.

    Of two lengths the ratio counts; where that is equal too, the order of the lists.
    """
    uses = [[0] * len(positives), [0] * len(negatives)]

    def rank(p: int, n: int) -> tuple[int, int, float]:
        lengths = [len(item["completion"]) for item in (positives[p], negatives[n])]
        used = (uses[0][p], uses[1][n])
        return max(used), sum(used), max(lengths) / min(lengths)

    waiting = [(rank(p, n), p, n) for p in range(len(positives)) for n in range(len(negatives))]
    heapify(waiting)
    while waiting:
        found, p, n = heappop(waiting)
        if (now := rank(p, n)) != found:  # used since it was laid down
            heappush(waiting, (now, p, n))
            continue
        uses[0][p] += 1
        uses[1][n] += 1
        yield positives[p], negatives[n]


def _pair(
    chosen: dict[str, Any], rejected: dict[str, Any], number: int, kind: str
) -> dict[str, Any]:
    """One line of MMPR; `kind` (correctness or format) is ours, and readers pass it through."""
    names = (*OF_THE_PROMPT, "dataset")
    shared = {name: chosen[name] for name in names if chosen.get(name) is not None}
    return {
        "id": f"{chosen['id']}-{number}",
        **shared,
        "question": chosen["question"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "answer_gt": golds(chosen)[0],
        "kind": kind,
    }


def question_pairs(
    verdicts: list[dict[str, Any]], config: PairConfig, report: PairReport
) -> list[dict[str, Any]]:
    """The pairs of one question, before the share of format pairs is held down."""
    found = _candidates(verdicts, report)
    if reason := found.why_no_pair(verdicts, config):
        report.without_pairs[reason] += 1
        return []
    rng = random.Random(stable_hash(config.seed, verdicts[0]["id"]))
    for group in (found.positives, found.wrong, found.unanswered):
        rng.shuffle(group)
    combine = like_pairs if config.balance_length else even_pairs
    pairs: list[dict[str, Any]] = []
    for chosen, rejected in combine(found.positives, found.wrong):
        # a wrong option is wrong, whatever words it has in common with the right one
        options = chosen.get("matcher") == rejected.get("matcher") == "choice"
        answers = [] if options else [chosen["extracted"], *golds(chosen)]
        if any(contains_answer(rejected["extracted"], answer) for answer in answers):
            report.left_out["the correct answer stands in the wrong one"] += 1
        elif len(pairs) == config.max_pairs:
            report.left_out["over the pairs per question"] += 1
        else:
            pairs.append(_pair(chosen, rejected, len(pairs), "correctness"))
    if config.format_negatives:
        for chosen, rejected in combine(found.positives, found.unanswered):
            if len(pairs) == config.max_pairs:
                report.left_out["over the pairs per question"] += 1
            else:
                pairs.append(_pair(chosen, rejected, len(pairs), "format"))
    if not pairs:
        report.without_pairs["every correct answer stands in the wrong ones"] += 1
    return pairs


def _hold_format_share(
    pairs: list[dict[str, Any]], config: PairConfig, report: PairReport
) -> list[dict[str, Any]]:
    """All correctness pairs, and a draw of the format pairs so that they keep to their share."""
    format_ids = [pair["id"] for pair in pairs if pair["kind"] == "format"]
    correctness = len(pairs) - len(format_ids)
    if config.max_format_share == 1:
        allowed = len(format_ids)
    else:
        share = config.max_format_share
        allowed = int(share * correctness / (1 - share) + 1e-9)
    ranked = sorted(format_ids, key=lambda pair_id: stable_hash(config.seed, "format", pair_id))
    dropped = set(ranked[allowed:])
    if dropped:
        report.left_out["over the share of format pairs"] += len(dropped)
    return [pair for pair in pairs if pair["id"] not in dropped]


def _drop_repeated(pairs: list[dict[str, Any]], report: PairReport) -> list[dict[str, Any]]:
    """The pairs without those that say what one before them says, under another id."""
    seen: set[int] = set()
    kept = []
    for pair in pairs:
        parts = [pair.get(name) for name in (*OF_THE_PROMPT, "question", "chosen", "rejected")]
        text = stable_hash(*parts)
        if text in seen:
            report.left_out["the same pair as another question's"] += 1
            continue
        seen.add(text)
        kept.append(pair)
    return kept


def build_pairs(
    groups: Iterable[list[dict[str, Any]]], config: PairConfig
) -> tuple[list[dict[str, Any]], PairReport]:
    """Preference pairs (MMPR records) from the verdict records of each question, and the report.

    The same verdicts and seed give the same pairs; a question's correctness pairs do not depend on
    the other questions, but for pairs that another one gives as well.
    """
    report = PairReport()
    drawn = []
    for group in groups:
        report.questions += 1
        drawn += question_pairs(group, config, report)
    before = {pair["id"].rpartition("-")[0] for pair in drawn}
    drawn = _drop_repeated(drawn, report)
    repeated = len(before) - len({pair["id"].rpartition("-")[0] for pair in drawn})
    if repeated:
        report.without_pairs["only pairs that another question gives"] += repeated
    pairs = _hold_format_share(drawn, config, report)
    report.questions_with_pairs = len({pair["id"].rpartition("-")[0] for pair in pairs})
    only_dropped = report.questions - report.questions_with_pairs - report.without_pairs.total()
    if only_dropped:
        report.without_pairs["only format pairs, over their share"] += only_dropped
    for pair in pairs:
        report.add(pair)
    return pairs, report
