"""Gates: a run does not go on from a stage whose held-out metric fell too far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cascade.recipe_stage import Gate
from internvl.errors import UserError

Z95 = 1.959963984540054


class GateError(UserError):
    """A held-out metric fell by more than its gate bears."""

    exit_code = 3


def is_borne(before: float, now: float, gate: Gate) -> bool:
    """Whether a metric fell by no more than `max_drop`, whatever rounding makes of the two."""
    return before - now <= gate.max_drop + 1e-9


def check_gate(run: Path, stage: str, gate: Gate) -> None:
    """Compare a stage's metric with that of the stage that its gate names.

    Raises `GateError` where it fell by more than `max_drop`, `UserError` where either is not known.
    """
    before = _metric(run, gate.against, gate.metric)
    now = _metric(run, stage, gate.metric)
    if is_borne(before[0], now[0], gate):
        return
    paired = _paired(run, stage, gate)
    raise GateError(
        f"gate of stage {stage}: {gate.metric} fell from {_told(before)} ({gate.against}) to "
        f"{_told(now)}, by {before[0] - now[0]:.4f}{paired}; max_drop is {gate.max_drop:g}. "
        f"Nothing is lost: mend the recipe and start again, or go on anyway with --no-gate (or "
        f"gate: false in stages.{stage})"
    )


def _metric(run: Path, stage: str, name: str) -> tuple[float, tuple[float, float] | None]:
    """A metric's value and its 95% interval, where one is known."""
    path = run / "eval" / stage / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"gate: {path} is not there: evaluate stage {stage} first") from None
    value = metrics.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        numbers = [key for key, one in metrics.items() if isinstance(one, float)]
        raise UserError(f"gate: {path} has no number {name!r}; there are: {', '.join(numbers)}")
    interval = metrics.get(f"{name}_ci")
    if interval is not None:
        return float(value), (float(interval[0]), float(interval[1]))
    se = metrics.get(f"{name}_se")
    if se is None:
        return float(value), None
    return float(value), (value - Z95 * se, value + Z95 * se)


def _paired(run: Path, stage: str, gate: Gate) -> str:
    """The interval of the fall, question by question, or why it cannot be told.

    Nothing where the predictions are not there.
    """
    folders = [run / "eval" / name for name in (gate.against, stage)]
    if gate.metric not in ("greedy", "sampled") or not all(
        (folder / "predictions.jsonl").is_file() for folder in folders
    ):
        return ""
    from cascade.compare import check_comparable, read_evaluation
    from cascade.comparison import compare_results

    a, b = map(read_evaluation, folders)
    try:
        check_comparable(a, b)
    except UserError as error:
        return f" ({error})"
    low, high = compare_results(a.results, b.results, 0)[gate.metric]["ci"]
    return f" (95%, question by question: {-high:.4f} to {-low:.4f})"


def _told(metric: tuple[float, tuple[float, float] | None]) -> str:
    value, interval = metric
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
