"""Held-out questions that are trained on, and gold answers that no completion could match."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade.doctor.data import Scanned, questions_of, spread
from cascade.doctor.findings import Finding, error, ok, some, warning
from internvl.data import Row
from rewards.judging import JUDGE, Verifier, names_judge
from rewards.verdict import GROUNDING, Outcome, gold_answers, matcher_names

HELD_OUT = 2000  # questions that are looked for
_PART = 1 << 16  # bytes of a file's beginning and end that stand for it
_JUDGED = 100  # questions whose gold answers are judged


def picture_key(row: Row) -> tuple[object, ...]:
    """What tells a row's pictures from others: each one's size in bytes and a hash of its ends."""
    return tuple(_source_key(source) for source in [*row.image_sources(), *_videos(row)])


def _videos(row: Row) -> list[Path]:
    video = row.video_source()
    return [] if video is None or video.is_dir() else [video]


def _source_key(source: Path | bytes) -> tuple[int, bytes]:
    if isinstance(source, bytes):
        return len(source), _digest(source[:_PART] + source[-_PART:])
    size = source.stat().st_size
    with source.open("rb") as file:
        head = file.read(_PART)
        file.seek(max(len(head), size - _PART))
        return size, _digest(head + file.read())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _keys(row: Row) -> Iterator[tuple[str, tuple[object, ...]]]:
    """(question, pictures) of each of a row's questions; none where a picture is not there."""
    try:
        pictures = picture_key(row)
    except OSError:
        return  # told as data.images
    for question in questions_of(row):
        yield question, pictures


def check_leak(held_out: Scanned, training: Sequence[Scanned]) -> list[Finding]:
    """Held-out questions that stand, with the same pictures, in what is trained on.

    Pictures are the same where their files are, byte for byte; one that was saved anew in another
    quality is another one here.
    """
    numbers = spread([n for n in held_out.numbers if n not in held_out.faults], HELD_OUT)
    own = {key: n for n in numbers for key in _keys(held_out.rows[n])}
    questions = {key[0] for key in own}
    where = str(held_out.file.path)
    found = []
    for scanned in training:
        if scanned.file.path == held_out.file.path:
            told = f"the stages {', '.join(scanned.file.stages)} train on the held-out file itself"
            found.append(error("data.leak", told, where, cure=_CURE))
            continue
        same: dict[int, int] = {}  # held-out row -> row that is trained on
        candidates = (
            n for q in questions & scanned.by_question.keys() for n in scanned.by_question[q]
        )
        for number in candidates:
            for key in _keys(scanned.rows[number]):
                if key in own:
                    same.setdefault(own[key], number)
        if same:
            file = scanned.file.path
            lines = [
                f"line {held_out.rows[a].line} is line {scanned.rows[b].line} of {file}"
                for a, b in sorted(same.items())
            ]
            told = f"{len(same):,} of {len(numbers):,} held-out questions are trained on: "
            told += some(lines, 2)
            found.append(error("data.leak", told, where, cure=_CURE))
    if found or not training:
        return found
    files = ", ".join(str(scanned.file.path) for scanned in training)
    told = f"none of {len(numbers):,} held-out questions is in what is trained on ({files})"
    return [ok("data.leak", told, where)]


_CURE = "take these lines out of the training file, or hold others out; accuracy would say nothing"


# ---------------------------------------------------------------- gold answers


def check_gold(scanned: Scanned, verifier: Verifier) -> list[Finding]:
    """Whether a completion that gives the gold answer is judged right, on a sample of a file.

    Where it is not, every reward is 0 and every sample "wrong", whatever the model says. Boxes and
    points are written in forms of their own, and what a judge decides is not asked here.
    """
    rows = [scanned.rows[n] for n in scanned.sample(_JUDGED)]
    asked: list[tuple[Row, str]] = []
    for row in rows:
        if verifier.fault(row.data) is not None or names_judge(row.data):
            continue  # told as data.answers; the judge's affair
        names = matcher_names(row.data.get("matcher"))
        if not set(names) & {*GROUNDING, JUDGE}:
            golds = Counter(gold_answers(row.data["answer"], names))
            gold = golds.most_common(1)[0][0]  # of several people's the one that most gave
            asked += [(row, f"Final Answer: {gold}"), (row, f"\\boxed{{{gold}}}")]
    if not asked:
        return []
    verdicts = list(verifier.verdicts((row.data, text) for row, text in asked))
    outcomes: Counter[str] = Counter()
    bad: list[tuple[Row, Any]] = []
    for place in range(0, len(asked), 2):
        both = verdicts[place : place + 2]
        if not any(verdict.outcome == Outcome.CORRECT for verdict in both):
            outcomes[str(both[0].outcome)] += 1
            bad.append((asked[place][0], both[0]))
    number = len(asked) // 2
    if not bad:
        told = f"the gold answers of {number} questions are judged right when they are given"
        return [ok("data.gold", told, scanned.file.where)]
    row, verdict = bad[0]
    told = (
        f"{len(bad)} of {number} gold answers are judged "
        f"{some([f'{name} ({n})' for name, n in outcomes.most_common()])} when they are given as "
        f"the answer; line {row.line}: {row.data['answer']!r} by {verdict.matcher}"
    )
    told += f" ({verdict.reason})" if verdict.reason else ""
    cure = 'give another "matcher", or an answer that it reads (docs/rewards.md)'
    report = error if len(bad) > 0.2 * number else warning
    return [report("data.gold", told, scanned.file.where, cure=cure)]
