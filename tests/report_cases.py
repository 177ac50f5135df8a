"""Folders of runs with invented but likely numbers, for the tests of the report.

`make_run`: as `cascade run` leaves one, with several data sets, arms and gates. `make_demo_run`: of
the manifest's first format, which has names and commands alone. `make_seeds`: a run a seed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": "#dc3232", "green": "#32be46", "blue": "#3c5ae6", "yellow": "#e6d232"}
RECIPE = """\
evaluate: {questions: heldout.jsonl, samples: 4}
gate: {metric: sampled, max_drop: 0.02}
seeds: [10, 11, 12]
arms: {sft: sft, sft_more: sft_more, mpo: mpo, gspo: rl_alone, cascade: rl}
stages:
  sft: {kind: sft, model: base, train_file: sft.jsonl}
  sft_more: {kind: sft, model: sft, train_file: chosen.jsonl}
  pairs: {kind: pairs, model: sft, questions: train.jsonl}
  mpo: {kind: mpo, model: sft, data: pairs}
  select: {kind: select, model: mpo, questions: rl.jsonl}
  rl_alone: {kind: rl, model: sft, data: select}
  rl: {kind: rl, model: mpo, data: select}
"""
# stage: (kind, the stage it begins from, greedy, sampled, careless, seconds)
STAGES: dict[str, tuple[str, str | None, float, float, float, float]] = {
    "sft": ("sft", None, 0.13, 0.32, 0.58, 17.2),
    "sft_more": ("sft", "sft", 0.60, 0.52, 0.20, 18.4),
    "mpo": ("mpo", "sft", 0.83, 0.76, 0.02, 31.8),
    "rl_alone": ("rl", "sft", 0.84, 0.80, 0.01, 140.9),
    "rl": ("rl", "mpo", 0.90, 0.87, 0.0, 92.6),
}
_SFT = {"loss": (0.9, 0.5), "learning_rate": (5e-4, 1e-5), "gold_probability": (0.02, 0.4),
        "packing/token_fill": (0.96, 0.97), "packing/tile_fill": (0.7, 0.72),
        "mixture/charts": (0.7, 0.7), "mixture/text": (0.3, 0.3), "grad_norm": (6.0, 3.0),
        "num_tokens": (100.0, 2400.0)}  # fmt: skip
LOGGED = {
    "sft": _SFT,
    "mpo": {
        "loss": (1.27, 0.86), "loss/sigmoid": (0.69, 0.41), "loss/bco_pair": (1.39, 1.02),
        "loss/sft": (0.44, 0.33), "rewards/chosen": (0.0, 0.41), "rewards/rejected": (0.0, -1.3),
        "rewards/margins": (0.0, 1.7), "rewards/accuracies": (0.5, 0.84),
        "bco/delta": (0.0, -0.3), "grad_norm": (6.0, 3.0), "learning_rate": (3e-4, 1e-5),
    },
    "rl": {
        "loss": (0.0, -0.01), "reward": (0.8, 0.95), "reward_std": (0.3, 0.2),
        "rewards/accuracy/mean": (0.7, 0.9), "rewards/format/mean": (0.9, 1.0),
        "clip_ratio/low_mean": (0.1, 0.2), "clip_ratio/high_mean": (0.05, 0.15),
        "sampling/logprob_gap_max": (2e-6, 3e-6), "sampling/logprob_gap_mean": (2e-7, 3e-7),
        "outcomes/correct": (0.7, 0.9), "outcomes/wrong": (0.3, 0.1),
        "outcomes/timeout": (0.0, 0.0),
        "frac_reward_zero_std": (0.3, 0.6), "completions/mean_length": (22.8, 23.0),
        "entropy": (0.31, 0.12), "time/sampling": (0.4, 0.3), "time/train": (0.2, 0.2),
        "my/own_number": (3.0, 4.0), "learning_rate": (1e-4, 1e-6),
    },
}  # fmt: skip


# -- a run of a recipe ---------------------------------------------------------------------------


def make_run(
    run: Path,
    *,
    questions: int = 30,
    steps: int = 24,
    samples: int = 4,
    seed: int = 0,
    datasets: Sequence[str] = ("charts", "tables"),
    stages: Sequence[str] = tuple(STAGES),
) -> Path:
    """Write a run of RECIPE; stages: those that came to their end."""
    rng = random.Random(seed)
    rows = [make_question(run / "world", index, rng, datasets) for index in range(questions)]
    (run / "recipe.yaml").write_text(RECIPE)
    records = []
    for name, (kind, origin, greedy, sampled, careless, seconds) in STAGES.items():
        if name not in stages:
            continue
        write_training(run, name, kind, origin, steps, rng)
        records.append(record(name, name, kind, seconds, config=options(run, origin)))
        evaluate(run, name, rows, (greedy, sampled, careless), samples, rng)
        records.append(record(f"evaluate.{name}", name, "evaluate", 9.5,
                              ["--model", str(run / "stages" / name)]))  # fmt: skip
        made = {"sft": ("pairs", "pair", "sft"), "mpo": ("select", "select", "mpo")}.get(name)
        if made:
            stage, last, model = made
            write_rollouts(run, stage, rows, sampled, rng)
            asked = ["--model", str(run / "stages" / model)]
            records += [
                record(f"{stage}.sample", stage, "sample", 12.0, asked),
                record(f"{stage}.verify", stage, "verify", 1.0),
                record(stage, stage, last, 1.5),
            ]
    write_json(run / "manifest.json", {
        "format": 2, "recipe": "recipe", "preset": "recipe", "seed": seed, "seconds": 372.4,
        "versions": {"python": "3.11.7", "torch": "2.9.0"}, "revision": "0123abcd+",
        "stages": records,
    })  # fmt: skip
    done = [name for name in STAGES if name in stages]
    if len(done) == len(STAGES):
        write_json(run / "summary.json", {"seed": seed, "seconds": 372.4,
                                          "stages": [{"name": name} for name in done]})  # fmt: skip
    return run


def record(
    name: str,
    stage: str,
    kind: str,
    seconds: float,
    words: Sequence[str] = (),
    *,
    config: dict[str, Any] | None = None,
    done: bool = True,
) -> dict[str, Any]:
    """A manifest's record of a process."""
    return {
        "name": name, "stage": stage, "kind": kind, "command": ["-m", kind, "a b", *words],
        "config": config, "needs": {}, "inputs": {"questions.jsonl": "ab12" * 16}, "key": "0" * 16,
        "done": done, "starts": 1, "timed": 1, "started": "2026-11-20T09:00:00Z",
        "seconds": seconds, "cpu_seconds": 1.5 * seconds,
    }  # fmt: skip


def options(run: Path, origin: str | None) -> dict[str, Any]:
    """A training stage's options, as far as a report reads them."""
    model = run / "stages" / origin if origin else Path("base")
    return {"model_name_or_path": str(model), "max_tiles": 2, "learning_rate": 3e-4,
            "collapse_min_entropy": 0.2, "max_logprob_gap": 1e-4}  # fmt: skip


def write_training(
    run: Path, name: str, kind: str, origin: str | None, steps: int, rng: random.Random
) -> None:
    """The log, options and model configuration of a training stage."""
    folder, logged = run / "stages" / name, LOGGED[kind]
    log = [
        {"step": step} | {key: wander(*ends, step / steps, rng) for key, ends in logged.items()}
        for step in range(1, steps + 1)
    ]
    log += [{"step": step, "eval_loss": 1 / step} for step in (1, steps // 2 + 1, steps)]
    write_json(folder / "trainer_state.json", {"log_history": log})
    write_json(folder / "config.resolved.json", options(run, origin))
    write_json(folder / "config.json", {"vision_config": {"image_size": [56, 56]}})


def evaluate(
    run: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    rates: tuple[float, float, float],
    samples: int,
    rng: random.Random,
) -> None:
    """An evaluation's predictions, and the metrics that they come to."""
    from cascade.metrics import result_of, summarise

    answered = [answer(row, *rates, samples, rng) for row in rows]
    write_lines(run / "eval" / name / "predictions.jsonl", answered)
    count = {"careless": "It looks clear"}
    metrics = summarise([result_of(row, count) for row in answered], name=name, model=name)
    write_json(run / "eval" / name / "metrics.json", metrics)


def write_rollouts(
    run: Path, stage: str, rows: Sequence[dict[str, Any]], rate: float, rng: random.Random
) -> None:
    """The verdicts of 8 answers a question; of pairs also the pairs."""
    folder = run / "stages" / stage
    write_lines(folder / "verdicts.jsonl", [
        {"dataset": row["dataset"], "id": row["id"], "sample": k, "token_ids": [1, 2, 3],
         "outcome": "correct" if rng.random() < rate else rng.choice(["wrong"] * 9 + ["no_answer"])}
        for row in rows for k in range(8)
    ])  # fmt: skip
    if stage == "pairs":
        write_lines(folder / "pairs.jsonl", make_pairs(rows, rng))
    else:
        write_json(folder / "questions.jsonl.stats.json", {"selected": len(rows) // 2})


def make_pairs(rows: Sequence[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Two pairs a question."""
    return [
        {"id": f"{row['id']}-{k}", "image": row["image"], "question": row["question"],
         "chosen": completion(row, True, False, rng), "answer_gt": row["answer"],
         "rejected": completion(row, False, rng.random() < 0.6, rng),
         "kind": "format" if k else "correctness"}
        for row in rows for k in range(2)
    ]  # fmt: skip


# -- a run of the first format -------------------------------------------------------------------

DEMO = {"sft-careful": "sft", "sft": "sft", "mpo": "mpo", "control": "mpo", "rl": "rl"}
DEMO_ORIGINS = {"sft": "sft-careful", "mpo": "sft", "control": "sft", "rl": "mpo"}
# greedy, sampled, careless
DEMO_RATES = {"sft-careful": (0.752, 0.62, 0.0), "sft": (0.13, 0.321, 0.583),
              "mpo": (0.835, 0.78, 0.0), "control": (0.849, 0.651, 0.161),
              "rl": (0.879, 0.855, 0.0)}  # fmt: skip


def make_demo_run(run: Path, *, questions: int = 30, steps: int = 24, n: int = 2000) -> Path:
    """Write a run of the demo as its first version left it: no intervals, no kinds, no inputs."""
    rng = random.Random(0)
    rows = [make_question(run / "world", index, rng) for index in range(questions)]
    records = []
    for name, kind in DEMO.items():
        greedy, sampled, careless = DEMO_RATES[name]
        write_json(run / "eval" / name / "metrics.json", {
            "name": name, "model": f"stages/{name}", "n": n, "k": 4, "greedy": greedy,
            "greedy_se": math.sqrt(greedy * (1 - greedy) / n), "sampled": sampled,
            "sampled_se": 0.8 * math.sqrt(sampled * (1 - sampled) / n), "format": 0.99,
            "mean_tokens": 22.5, "careless": careless, "chain_correct": sampled - 0.05,
        })  # fmt: skip
        answered = [answer(row, *DEMO_RATES[name], 4, rng) for row in rows]
        kept = ("id", "image", "question", "answer", "greedy", "sampled")
        write_lines(run / "eval" / name / "predictions.jsonl",
                    [{key: row[key] for key in kept} for row in answered])  # fmt: skip
        write_training(run, name, kind, DEMO_ORIGINS.get(name), steps, rng)
        command = ["-m", "accelerate.commands.launch", "-m", kind, "--config", "a b.yaml"]
        records.append({"name": name, "command": command, "seconds": 31.8, "key": "0" * 64,
                        "started": "2026-11-20T09:00:00Z", "done": True})  # fmt: skip
    write_rollouts(run, "pairs", rows, 0.3, rng)
    records.append({**records[0], "name": "pair", "command": ["-m", "mmpr", "pair", "x.jsonl"]})
    write_json(run / "manifest.json",
               {"seed": 7, "preset": "demo", "seconds": 372.4, "stages": records})  # fmt: skip
    write_json(run / "summary.json", {"seed": 7, "seconds": 372.4, "stages": [
        {"name": name} for name in ("sft", "mpo", "rl")]})  # fmt: skip
    return run


# -- runs of several seeds -----------------------------------------------------------------------


def make_seeds(folder: Path, seeds: Sequence[int] = (10, 11, 12), **more: Any) -> Path:
    """A run a seed; one arm of the last seed has failed."""
    rng = random.Random(1)
    for seed in seeds:
        run = make_run(folder / f"seed-{seed}", seed=seed, **more)
        (run / "report.html").write_text("a page")
    arms = {"sft": "sft", "sft_more": "sft_more", "mpo": "mpo", "gspo": "rl_alone", "cascade": "rl"}
    runs: list[dict[str, Any]] = []
    for arm, stage in arms.items():
        for seed in seeds:
            runs.append({"arm": arm, "stage": stage, "seed": seed, "n": 2000, "se": 0.01,
                         "accuracy": round(STAGES[stage][3] + rng.gauss(0, 0.02), 4),
                         "right_chain": STAGES[stage][3] - 0.04,
                         "compute_seconds": 0.0 if arm == "sft" else 150.0})  # fmt: skip
    runs[-1] = {
        "arm": "cascade",
        "stage": "rl",
        "seed": seeds[-1],
        "error": "stage rl failed",
    }
    write_json(folder / "ablation.json", {"recipe": "recipe", "compute_from": "sft", "runs": runs})
    return folder


# -- pieces ----------------------------------------------------------------------------------


def wander(first: float, last: float, done: float, rng: random.Random) -> float:
    """A noisy way from first to last, quick in the beginning, as losses go."""
    return first + (last - first) * done**0.4 + rng.gauss(0, abs(last - first) / 9)


def make_question(
    world: Path, index: int, rng: random.Random, datasets: Sequence[str] = ("charts",)
) -> dict[str, Any]:
    """Draw one chart and return its question, with the heights beside it."""
    heights = {name: rng.randint(1, 9) for name in rng.sample(list(COLOURS), 4)}
    image = Image.new("RGB", (112 if index % 2 else 56, 56), (12, 12, 14))
    for place, (name, height) in enumerate(heights.items()):
        box = (4 + 13 * place, 54 - 5 * height, 12 + 13 * place, 54)
        ImageDraw.Draw(image).rectangle(box, fill=COLOURS[name])
    path = world / "images" / "heldout" / f"{index:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    first, second = rng.sample(list(COLOURS), 2)
    return {
        "dataset": datasets[index % len(datasets)], "id": f"heldout-{index}",
        "image": f"images/heldout/{index:05d}.png",
        "question": f"<image>\nWhat is the sum of the {first} and {second} bars?",
        "answer": str(heights[first] + heights[second]),
        "bars": (first, heights[first], second, heights[second]),
    }  # fmt: skip


def completion(row: dict[str, Any], right: bool, careless: bool, rng: random.Random) -> str:
    first, a, second, b = row["bars"]
    b += 0 if right else rng.choice((-1, 1))
    if careless:
        return f"It looks clear from the chart. Final Answer: {a + b}"
    reading = f"The {first} bar is {a}. The {second} bar is {b}."
    return f"{reading} {a} + {b} = {a + b}. Final Answer: {a + b}"


def answer(
    row: dict[str, Any], greedy: float, sampled: float, careless: float, k: int, rng: random.Random
) -> dict[str, Any]:
    def one(rate: float) -> dict[str, Any]:
        right = rng.random() < rate
        text = completion(row, right, rng.random() < careless, rng)
        return {"completion": text, "outcome": "correct" if right else "wrong", "tokens": 20,
                "format_ok": True, "truncated": False, "extracted": text[-1:],
                "vote": 0 if right else 1}  # fmt: skip

    kept = {key: row[key] for key in ("dataset", "id", "image", "question", "answer")}
    return kept | {"greedy": one(greedy), "sampled": [one(sampled) for _ in range(k)]}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
