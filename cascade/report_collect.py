"""Reading a run folder for its report (the folder's layout is told in cascade/report.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.report_choose import choose_examples, choose_pairs, fate, fate_words
from cascade.report_data import (
    Curve,
    ExampleRow,
    Histogram,
    ManifestRow,
    PairRow,
    ReportData,
    StageAnswer,
    StageResult,
    label,
)
from cascade.report_files import get, number, read_lines, read_object
from cascade.report_pictures import Tiling, pictures, read_tiling
from internvl.errors import UserError
from internvl.thumbnails import Thumbnail

EXAMPLES, PAIRS = 8, 6

_SFT_CURVES = {
    "loss": "Loss",
    "eval_gold_probability": "Gold answer's probability",
    "learning_rate": "Learning rate",
}
_MPO_CURVES = {
    "loss": "MPO loss",
    "loss/sigmoid": "Preference loss (DPO)",
    "loss/bco_pair": "Quality loss (BCO)",
    "loss/sft": "Generation loss (SFT)",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Chosen above rejected",
    "bco/delta": "BCO's reward shift",
    "grad_norm": "Gradient norm",
}
_RL_CURVES = {
    "loss": "GSPO loss",
    "reward": "Reward",
    "reward_std": "Reward spread in a group",
    "clip_ratio/region_mean": "Sequences clipped",
    "sampling/logprob_gap_max": "Log-prob gap to the sampler",
    "frac_reward_zero_std": "Groups without spread",
    "completions/mean_length": "Tokens a completion",
    "entropy": "Entropy",
}
CURVES = {
    "sft-careful": _SFT_CURVES,
    "sft": _SFT_CURVES,
    "mpo": _MPO_CURVES,
    "control": {"loss": "Loss", "loss/sft": "Generation loss (SFT)", "grad_norm": "Gradient norm"},
    "rl": _RL_CURVES,
}
OUTCOMES = ("correct", "wrong", "no_answer", "cannot_judge", "timeout")


def collect(run: Path) -> ReportData:
    """Read a run folder into the data of its report.

    Required: summary.json, manifest.json and eval/<stage>/metrics.json of every stage that the
    summary names; a missing or malformed one raises UserError. Everything else is optional, and
    what is not there is not on the page; a part that is there must be readable.
    """
    summary = read_object(run / "summary.json")
    manifest = read_object(run / "manifest.json")
    rows = _manifest_rows(manifest, run / "manifest.json")
    seconds = {row.stage: row.seconds for row in rows}
    names = [
        get(stage, "name", str, run / "summary.json")
        for stage in get(summary, "stages", list, run / "summary.json")
    ]
    if not names:
        raise UserError(f"{run / 'summary.json'}: no stages; run the cascade to its end first")
    tiling = read_tiling(run, names)
    examples, fates = _examples(run, names, tiling)
    pairs, pairs_total = _pairs(run, tiling)
    return ReportData(
        title=f"Cascade: {', '.join(label(name) for name in names)}",
        seed=get(summary, "seed", int, run / "summary.json"),
        preset=get(manifest, "preset", str, run / "manifest.json"),
        seconds=number(summary, "seconds", run / "summary.json"),
        stages=[_stage_result(run, name, seconds) for name in names],
        careful=_optional_result(run, "sft-careful", seconds, skip=names),
        control=_optional_result(run, "control", seconds, skip=names),
        curves=_curves(run),
        examples=examples,
        fates=fates,
        pairs=pairs,
        pairs_total=pairs_total,
        histograms=_histograms(run),
        manifest=rows,
        config_files=_config_files(run),
        demo_world=(run / "world").is_dir(),
    )


# -- results ---------------------------------------------------------------------------------


def _stage_result(run: Path, name: str, seconds: dict[str, float]) -> StageResult:
    path = run / "eval" / name / "metrics.json"
    metrics = read_object(path)
    optional = {
        key: number(metrics, key, path)
        for key in ("careless", "chain_correct")
        if metrics.get(key) is not None
    }
    return StageResult(
        name=name,
        n=get(metrics, "n", int, path),
        k=get(metrics, "k", int, path),
        greedy=number(metrics, "greedy", path),
        greedy_se=number(metrics, "greedy_se", path),
        sampled=number(metrics, "sampled", path),
        sampled_se=number(metrics, "sampled_se", path),
        format=number(metrics, "format", path),
        mean_tokens=number(metrics, "mean_tokens", path),
        careless=optional.get("careless"),
        chain_correct=optional.get("chain_correct"),
        seconds=seconds.get(name),
    )


def _optional_result(
    run: Path, name: str, seconds: dict[str, float], *, skip: Sequence[str]
) -> StageResult | None:
    if name in skip or not (run / "eval" / name / "metrics.json").exists():
        return None
    return _stage_result(run, name, seconds)


def _manifest_rows(manifest: dict[str, Any], path: Path) -> list[ManifestRow]:
    return [
        ManifestRow(
            stage=get(stage, "name", str, path),
            seconds=number(stage, "seconds", path),
            command=tuple(str(part) for part in get(stage, "command", list, path)),
        )
        for stage in get(manifest, "stages", list, path)
    ]


def _config_files(run: Path) -> list[tuple[str, str]]:
    paths = [*run.glob("*.yaml"), *run.glob("stages/*/config.resolved.json")]
    return [
        (path.relative_to(run).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(paths, key=lambda path: (len(path.parts), path))
    ]


# -- training curves -------------------------------------------------------------------------


def _curves(run: Path) -> list[Curve]:
    curves = []
    for stage, titles in CURVES.items():
        path = run / "stages" / stage / "trainer_state.json"
        if not path.exists():
            continue
        log = get(read_object(path), "log_history", list, path)
        for key, title in titles.items():
            points = [
                (number(entry, "step", path), number(entry, key, path, finite=False))
                for entry in log
                if key in entry
            ]
            drawn = sorted(point for point in points if math.isfinite(point[1]))
            if len(drawn) >= 2:  # one point is no curve
                steps, values = zip(*drawn, strict=True)
                curves.append(Curve(stage, key, title, steps, values, len(points) - len(drawn)))
    return curves


# -- the same questions, answered by each stage ------------------------------------------------


def _examples(
    run: Path, names: Sequence[str], tiling: Tiling | None
) -> tuple[list[ExampleRow], list[tuple[str, int]]]:
    """Return the chosen examples, and how many questions had which fate."""
    paths = {name: run / "eval" / name / "predictions.jsonl" for name in names}
    answered: dict[str, dict[str, dict[str, Any]]] = {
        name: {str(get(row, "id", (str, int), path)): row for row in read_lines(path)}
        for name, path in paths.items()
        if path.exists()
    }
    if not answered:
        return [], []
    stages = list(answered)
    first = answered[stages[0]]
    fates = {
        id_: fate(
            [_outcome(answered[name][id_], paths[name]) == "correct" for name in stages], stages
        )
        for id_ in first
        if all(id_ in rows for rows in answered.values())
    }
    words = fate_words(stages)
    counts = Counter(fates.values())
    rows = []
    for id_ in choose_examples(fates, words, EXAMPLES):
        row = {name: answered[name][id_] for name in stages}
        shown = pictures(run, row[stages[0]], paths[stages[0]], tiling)
        rows.append(_example_row(id_, fates[id_], row, paths, shown))
    return rows, [(word, counts[word]) for word in words if counts[word]]


def _outcome(row: dict[str, Any], path: Path) -> str:
    return str(get(get(row, "greedy", dict, path), "outcome", str, path))


def _example_row(
    id_: str,
    fate_: str,
    rows: dict[str, dict[str, Any]],
    paths: dict[str, Path],
    shown: tuple[Thumbnail, ...],
) -> ExampleRow:
    answers = []
    for name, row in rows.items():
        sampled = get(row, "sampled", list, paths[name])
        right = sum(get(one, "outcome", str, paths[name]) == "correct" for one in sampled)
        greedy = get(row, "greedy", dict, paths[name])
        text = get(greedy, "completion", str, paths[name])
        answers.append(StageAnswer(name, text, _outcome(row, paths[name]), right, len(sampled)))
    name, row = next(iter(rows.items()))
    return ExampleRow(
        id=id_,
        question=_question(row, paths[name]),
        answer=_answer(row["answer"]) if "answer" in row else "",
        pictures=shown,
        fate=fate_,
        answers=tuple(answers),
    )


# -- preference pairs and offline rollouts -----------------------------------------------------


def _pairs(run: Path, tiling: Tiling | None) -> tuple[list[PairRow], int]:
    path = run / "stages" / "pairs" / "pairs.jsonl"
    if not path.exists():
        return [], 0
    rows = list(read_lines(path))
    return [
        PairRow(
            id=str(row.get("id", "")),
            question=_question(row, path),
            answer=_answer(row.get("answer_gt", "")),
            pictures=pictures(run, row, path, tiling),
            chosen=get(row, "chosen", str, path),
            rejected=get(row, "rejected", str, path),
        )
        for row in choose_pairs(rows, PAIRS)
    ], len(rows)


def _histograms(run: Path) -> list[Histogram]:
    histograms: list[Histogram] = []
    for stage in ("pairs", "select"):
        path = run / "stages" / stage / "verdicts.jsonl"
        if path.exists():
            histograms.extend(_verdict_histograms(path, stage))
    return histograms


def _verdict_histograms(path: Path, stage: str) -> list[Histogram]:
    """Return how the rollouts were judged, and how accurate they were question by question."""
    outcomes: Counter[str] = Counter()
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for row in read_lines(path):
        outcome, id_ = get(row, "outcome", str, path), str(get(row, "id", (str, int), path))
        outcomes[outcome] += 1
        asked[id_] += 1
        right[id_] += outcome == "correct"
    if not outcomes:
        return []
    size = max(asked.values()) if len(set(asked.values())) == 1 else 10
    counts = Counter(round(size * right[id_] / asked[id_]) for id_ in asked)
    kinds = [*OUTCOMES, *sorted(set(outcomes).difference(OUTCOMES))]
    kinds = [kind for kind in kinds if outcomes[kind]]
    inside = [i for i in range(size + 1) if 0.2 <= i / size <= 0.8]
    what = "pairs are made from" if stage == "pairs" else "online questions are chosen by"
    return [
        Histogram(
            "Verdicts",
            f"{sum(outcomes.values()):,} offline rollouts that {what}",
            tuple(kind.replace("_", " ") for kind in kinds),
            tuple(outcomes[kind] for kind in kinds),
        ),
        Histogram(
            "Right answers a question",
            f"{len(asked):,} questions; the band, 20% to 80% right, has the most to learn from",
            tuple(f"{i}/{size}" for i in range(size + 1)),
            tuple(counts[i] for i in range(size + 1)),
            band=(inside[0], inside[-1]) if inside else None,
        ),
    ]


def _question(row: dict[str, Any], path: Path) -> str:
    return str(get(row, "question", str, path)).replace("<image>", "").strip()


def _answer(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and value else value)
