"""Training curves: what a stage logged, put into charts that belong together.

A chart's lines are named by patterns; a number that no pattern names has a chart of its own among
the others, so nothing that was logged is left out. An evaluation while training (eval_...) is drawn
into the chart of the number that it is of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cascade.report_data import Line, Panel, StageInfo, Training
from cascade.report_files import get, number, read_object
from cascade.report_run import TRAINING, RunFolder

MOST_LINES = 6  # of a chart


@dataclass(frozen=True)
class _Chart:
    """A chart: its title, its unit, and the keys of its lines (patterns) with their words."""

    title: str
    unit: str
    lines: Mapping[str, str]


_LOSS = _Chart("Loss", "", {"loss": "", "loss_rest": ""})
_PARTS = (
    _Chart("Preference loss (DPO)", "", {"loss/sigmoid": ""}),
    _Chart("Quality loss (BCO)", "", {"loss/bco_pair": ""}),
    _Chart("Generation loss (SFT)", "", {"loss/sft": ""}),
    _Chart("Implicit rewards", "", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    _Chart("Reward margin", "", {"rewards/margins": ""}),
    _Chart("Chosen above rejected", "share", {"rewards/accuracies": ""}),
    _Chart("BCO's reward shift", "", {"bco/delta": ""}),
    _Chart("Log-prob of a completion", "nats",
           {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)  # fmt: skip
_SFT = (
    _Chart("Gold answer's probability", "share", {"gold_probability": ""}),
    _Chart("Log-prob of a gold token", "nats", {"mean_token_logprob": ""}),
    _Chart("Packs filled", "share", {"packing/token_fill": "tokens", "packing/tile_fill": "tiles"}),
    _Chart("Samples in a pack", "", {"packing/samples": ""}),
    _Chart("Without images", "share",
           {"mixture/text_samples": "of samples", "mixture/text_tokens": "of tokens"}),
    _Chart("Mixture", "share", {"mixture/*": "*"}),
)  # fmt: skip
_RL = (
    _Chart("Reward", "", {"reward": ""}),
    _Chart("Parts of the reward", "", {"rewards/*/mean": "*"}),
    _Chart("Pass@k, held out", "share", {"pass@*": "k = *"}),
    _Chart("Outcomes", "share", {"outcomes/*": "*"}),
    _Chart("Reward spread in a group", "", {"reward_std": ""}),
    _Chart("Groups without spread", "share",
           {"frac_reward_zero_std": "", "frac_groups_discarded": "discarded"}),
    _Chart("Entropy", "nats", {"entropy": ""}),
    _Chart("Tokens of a completion", "", {"completions/mean_length": ""}),
    _Chart("Completions cut short", "share", {"completions/clipped_ratio": ""}),
    _Chart("Clipped", "share", {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}),
    _Chart("KL to the reference", "nats", {"kl": ""}),
    _Chart("Log-prob gap, largest", "nats",
           {"sampling/logprob_gap_max": "trainer to sampler", "sampling/canary_gap": "canary"}),
    _Chart("Log-prob gap, mean", "nats", {"sampling/logprob_gap_mean": ""}),
    _Chart("Importance weight", "", {"sampling/importance_sampling_ratio/*": "*"}),
    _Chart("Steps behind the weights", "", {"sampling/staleness": ""}),
)  # fmt: skip
_LAST = (
    _Chart("Gradient norm", "", {"grad_norm": ""}),
    _Chart("Learning rate", "", {"learning_rate": "", "learning_rate/*": "*"}),
)
_TIMES = (_Chart("Seconds of a step, by phase", "", {"time/*": "*"}),)
_BOUNDS = {
    "Entropy": ("collapse_min_entropy",),
    "Tokens of a completion": ("collapse_min_length", "collapse_max_length"),
    "Log-prob gap, largest": ("max_logprob_gap",),
}
# Always 0 in a healthy run, or told of better elsewhere: a chart only where there is something.
_QUIET = ("outcomes/cannot_judge", "outcomes/timeout", "rewards/not_judged", "sampling/staleness",
          "completions/clipped_ratio", "frac_groups_discarded", "eval_broken",
          "bco/delta")  # fmt: skip
# no curve: one value at the end, or a count that says nothing by step
_NOT_DRAWN = ("epoch", "step", "total_flos", "num_tokens", "train_*", "eval_runtime",
              "eval_samples_per_second", "eval_steps_per_second", "eval_questions")  # fmt: skip


def read_trainings(run: RunFolder) -> list[Training]:
    """The charts of every training stage that logged something."""
    found = []
    for name, info in run.stages.items():
        path = _state(run.folder(name))
        if info.kind not in TRAINING or path is None:
            continue
        log = get(read_object(path), "log_history", list, path)
        found.append(_training(info, _lines(log, path), run.options(name)))
    return [one for one in found if one.panels or one.others]


def read_num_tokens(run: RunFolder, name: str) -> int | None:
    """Tokens that a training stage was given, where it logged them (as num_tokens)."""
    path = _state(run.folder(name))
    if path is None:
        return None
    log = get(read_object(path), "log_history", list, path)
    counts = [number(entry, "num_tokens", path) for entry in log if "num_tokens" in entry]
    return round(max(counts)) if counts else None


def _state(folder: Path) -> Path | None:
    """A stage's log; of one that was killed, that of its last checkpoint."""
    if (folder / "trainer_state.json").exists():
        return folder / "trainer_state.json"
    found = [
        path
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if path.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return max(found, key=lambda path: int(path.parent.name.split("-")[1]), default=None)


def _lines(log: Sequence[dict[str, Any]], path: Path) -> dict[str, Line]:
    """Every logged number with at least two values that can be drawn."""
    points: dict[str, dict[float, float]] = {}
    for entry in log:
        step = number(entry, "step", path)
        for key, value in entry.items():
            drawn = isinstance(value, int | float) and not isinstance(value, bool)
            if drawn and not any(fnmatchcase(key, name) for name in _NOT_DRAWN):
                points.setdefault(key, {})[step] = float(value)
    lines = {}
    for key, values in points.items():
        finite = sorted((s, v) for s, v in values.items() if math.isfinite(v))
        if len(finite) < 2 or (key in _QUIET and not any(v for _, v in finite)):
            continue
        steps, numbers = zip(*finite, strict=True)
        lines[key] = Line(key, "", steps, numbers, len(values) - len(finite), key[:5] == "eval_")
    return lines


def _training(info: StageInfo, lines: dict[str, Line], options: Mapping[str, Any]) -> Training:
    left = dict(lines)
    own = {"sft": _SFT, "mpo": _PARTS, "rl": _RL}[info.kind]
    panels = [_panel(info, chart, left, options) for chart in (_LOSS, *own, *_LAST)]
    # loss parts that are none of MPO's three
    rest = [_Chart(f"Loss: {key[5:]}", "", {key: ""}) for key in left if key.startswith("loss/")]
    panels[1:1] = [_panel(info, chart, left, options) for chart in rest]
    panels += [_panel(info, chart, left, options, is_time=True) for chart in _TIMES]
    keys = [key for key in left if not key.endswith("_se")]
    others = [_panel(info, _Chart(key, "", {key: ""}), left, options) for key in keys]
    return Training(
        info,
        tuple(panel for panel in panels if panel is not None),
        tuple(panel for panel in others if panel is not None),
    )


def _panel(
    info: StageInfo,
    chart: _Chart,
    left: dict[str, Line],
    options: Mapping[str, Any],
    *,
    is_time: bool = False,
) -> Panel | None:
    """Take a chart's lines out of what is left; None where there are none."""
    found: list[Line] = []
    for pattern, word in chart.lines.items():
        for key in [key for key in left if fnmatchcase(key.removeprefix("eval_"), pattern)]:
            said = word.replace("*", _star(key.removeprefix("eval_"), pattern))
            held = "held out" if left[key].held_out and len(word) == 0 else ""
            label = " ".join(part for part in (said.replace("_", " "), held) if part)
            found.append(replace(left.pop(key), label=label))
    if not found:
        return None
    if len(found) > 1:  # the plain one beside another has a word, too
        found = [replace(one, label=one.label or "training") for one in found]
    found.sort(key=lambda one: (one.held_out, -max(abs(value) for value in one.values)))
    shown, rest = found[:MOST_LINES], found[MOST_LINES:]
    left.update({one.key: one for one in rest})
    bounds = tuple(
        (name, float(options[name]))
        for name in _BOUNDS.get(chart.title, ())
        if isinstance(options.get(name), int | float)
    )
    passed = sum(_is_past(name, bound, value)
                 for name, bound in bounds for value in shown[0].values)  # fmt: skip
    return Panel(info.name, chart.title, chart.unit, tuple(shown), bounds, passed, is_time)


def _star(key: str, pattern: str) -> str:
    """What the star of a pattern stands for."""
    if "*" not in pattern:
        return ""
    start, end = pattern.split("*")
    return key[len(start) : len(key) - len(end)]


def _is_past(name: str, bound: float, value: float) -> bool:
    return value < bound if "_min_" in name else value > bound
