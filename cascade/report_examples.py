"""The questions and pairs that a report shows, read once for the choice and once for the texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.report_choose import choose_examples, choose_pairs, fate, fate_words
from cascade.report_data import ExampleRow, PairRow, PairSet, StageAnswer, StageInfo
from cascade.report_files import get, read_lines
from cascade.report_pictures import ImageFinder
from cascade.report_results import Answered, Key, key_of
from cascade.report_run import RunFolder

EXAMPLES, PAIRS = 8, 6
PAIR_FILES = ("pairs.jsonl", "dropout.jsonl")


def read_examples(
    run: RunFolder, line: Sequence[str], answered: Mapping[str, Answered], finder: ImageFinder
) -> tuple[list[ExampleRow], list[tuple[str, int]]]:
    """The chosen questions, and how many questions had which fate on the way to the last stage."""
    names = [name for name in line if name in answered]
    if not names:
        return [], []
    way = _way(run, names)
    labels = [run.stages[name].label for name in way]
    words = fate_words(labels)
    fates: dict[Key, str] = {}
    for key in answered[names[0]].place:
        if all(key in answered[name].place for name in names):
            right = [bool(answered[name].greedy[answered[name].place[key]]) for name in way]
            fates[key] = fate(right, labels)
    chosen = choose_examples(fates, words, EXAMPLES)
    rows = {name: _rows_of(run, name, chosen) for name in names}
    several = len({dataset for dataset, _ in fates}) > 1
    counts = Counter(fates.values())
    examples = [
        _example(run, key, fates[key], {name: rows[name][key] for name in names}, finder, several)
        for key in chosen
    ]
    return examples, [(word, counts[word]) for word in words if counts[word]]


def _way(run: RunFolder, names: Sequence[str]) -> list[str]:
    """Those of the stages through which the last one came to be, in order."""
    way = [names[-1]]
    while (before := run.before(way[0], names)) is not None and before not in way:
        way.insert(0, before)
    return way


def _predictions(run: RunFolder, name: str) -> Path:
    return run.path / "eval" / name / "predictions.jsonl"


def _rows_of(run: RunFolder, name: str, keys: Iterable[Key]) -> dict[Key, dict[str, Any]]:
    wanted, path = set(keys), _predictions(run, name)
    found = {}
    for row in read_lines(path):
        key = key_of(row, path)
        if key in wanted:
            found[key] = row
            if len(found) == len(wanted):
                break
    return found


def _example(
    run: RunFolder,
    key: Key,
    fate_: str,
    rows: Mapping[str, dict[str, Any]],
    finder: ImageFinder,
    several: bool,
) -> ExampleRow:
    first = next(iter(rows))
    path, row = _predictions(run, first), rows[first]
    return ExampleRow(
        id=key[1],
        dataset=key[0] if several else "",
        question=_question(row, path),
        answer=_gold(row.get("answer", "")),
        pictures=finder.pictures(row, path),
        fate=fate_,
        answers=tuple(
            _answer(run.stages[name], one, _predictions(run, name)) for name, one in rows.items()
        ),
    )


def _answer(info: StageInfo, row: dict[str, Any], path: Path) -> StageAnswer:
    greedy, sampled = get(row, "greedy", dict, path), get(row, "sampled", list, path)
    right = sum(get(one, "outcome", str, path) == "correct" for one in sampled)
    text, outcome = (get(greedy, field, str, path) for field in ("completion", "outcome"))
    return StageAnswer(info, text, outcome, right, len(sampled))


# -- preference pairs --------------------------------------------------------------------------


def read_pairs(run: RunFolder, finder: ImageFinder) -> list[PairSet]:
    """Some of the pairs of every stage that made some."""
    sets = []
    for name, info in run.stages.items():
        if info.kind != "pairs":
            continue
        paths = [run.folder(name) / file for file in PAIR_FILES]
        found = [(row, path) for path in paths if path.exists() for row in read_lines(path)]
        if not found:
            continue
        kinds = Counter(str(row.get("kind", "")) for row, _ in found)
        chosen = choose_pairs([row for row, _ in found], PAIRS)
        source = {id(row): path for row, path in found}
        rows = tuple(_pair(row, source[id(row)], finder) for row in chosen)
        sets.append(PairSet(info, rows, dict(kinds.most_common())))
    return sets


def _pair(row: dict[str, Any], path: Path, finder: ImageFinder) -> PairRow:
    return PairRow(
        id=str(row.get("id", "")),
        question=_question(row, path),
        answer=_gold(row.get("answer_gt", "")),
        pictures=finder.pictures(row, path),
        chosen=get(row, "chosen", str, path),
        rejected=get(row, "rejected", str, path),
        kind=str(row.get("kind", "")),
    )


def _question(row: dict[str, Any], path: Path) -> str:
    return str(get(row, "question", str, path)).replace("<image>", "").strip()


def _gold(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and value else value)
