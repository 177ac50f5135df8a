"""Tables and plots of the training benchmarks, written into docs/performance.md and beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "performance.md"
LABELS = {
    "ours": "ours, cached reference",
    "ours_ref": "ours, reference model on the fly",
    "ours_gc": "ours, gradient checkpointing",
    "trl": "TRL, reference on the fly (its only mode for images)",
    "trl_injected": "TRL, given reference values (not a mode of its)",
    "trl_cpu_head": "TRL, head on all positions (what it does on a CPU)",
    "trl_gc": "TRL, gradient checkpointing",
}
CASES = {
    "g8_short": "G = 8, 50 to 200 tokens",
    "g8_long": "G = 8, 300 to 500 tokens",
    "g16_short": "G = 16, 50 to 200 tokens",
}
OURS, THEIRS, MODEL = "#1f6f8b", "#b5b5b5", "#222222"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def replace_part(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of a name; raises ValueError where there are none."""
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"docs/performance.md has no place for {name}: {begin} ... {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _facts(facts: Mapping[str, str]) -> str:
    libraries = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "trl"))
    return f"Commit {facts['commit']}; {libraries}; {facts['machine']}; clock: {facts['clock']}."


def mpo_text(result: Mapping[str, Any]) -> str:
    """The MPO part of the page."""
    rows = [
        [
            LABELS[name],
            result["seconds_a_step"][name],
            f"{ratio:.2f}",
            f"{result['flop_ratio_to_ours'][name]:.2f}",
            result["gflop_a_second"][name],
            result["memory_mb"][name],
        ]
        for name, ratio in result["ratio_to_ours"].items()
    ]
    header = ["variant", "s a step", "time / ours", "FLOP model", "GFLOP/s", "grown by, MB"]
    collation = result["collation_seconds"]
    lines = [
        f"Speed-up **{result['speedup']:.2f}** (FLOP model {result['flop_model']:.2f}); with "
        f"gradient checkpointing on both sides {result['speedup_gc']:.2f} "
        f"({result['flop_model_gc']:.2f}). Memory grows by **{result['memory_ratio']:.2f}** of "
        f"TRL's ({result['memory_ratio_gc']:.2f} with checkpointing). Collation of a step: "
        f"{collation['ours']:.3f} s, TRL's {collation['trl']:.3f} s.",
        "",
        table(header, rows),
        "",
        "![MPO: seconds a step](performance_mpo.svg)",
        "",
        _facts(result["facts"]),
    ]
    return "\n".join(lines)


SFT_LABELS = {
    "ours": "ours, packed",
    "ours_gc": "ours, gradient checkpointing",
    "trl": "TRL, padded (its only mode for images)",
    "trl_cpu_head": "TRL, head on all positions (what it does on a CPU)",
    "trl_gc": "TRL, gradient checkpointing",
}


def sft_text(result: Mapping[str, Any]) -> str:
    """The SFT part of the page."""
    rows = [
        [
            SFT_LABELS[name],
            result["seconds_a_step"][name],
            result["tokens_a_second"][name],
            f"{ratio:.2f}",
            f"{result['flop_ratio_to_ours'][name]:.2f}",
            result["gflop_a_second"][name],
            result["memory_mb"][name],
        ]
        for name, ratio in result["ratio_to_ours"].items()
    ]
    header = ["variant", "s a step", "tokens a s", "time / ours", "FLOP model", "GFLOP/s"]
    lines = [
        f"Speed-up **{result['speedup']:.2f}** (FLOP model {result['flop_model']:.2f}); with "
        f"gradient checkpointing on both sides {result['speedup_gc']:.2f} "
        f"({result['flop_model_gc']:.2f}). Memory grows by **{result['memory_ratio']:.2f}** of "
        f"TRL's ({result['memory_ratio_gc']:.2f} with checkpointing). Of TRL's "
        f"{result['tokens_with_padding']:,} tokens {result['tokens']:,} are no padding. Before the "
        f"first step the two losses differ by {result['loss_gap']:.0e}.",
        "",
        table([*header, "grown by, MB"], rows),
        "",
        _facts(result["facts"]),
    ]
    return "\n".join(lines)


def write_sft(result: Mapping[str, Any]) -> None:
    """Write the SFT table."""
    _write("sft", sft_text(result))


def gspo_text(result: Mapping[str, Any]) -> str:
    """The GSPO part of the page."""
    rows = []
    for name, case in result["cases"].items():
        seconds, memory, rate = case["seconds"], case["memory_mb"], case["gflop_a_second"]
        rows.append(
            [
                CASES[name],
                seconds["ours"],
                seconds["trl"],
                f"**{result[f'speedup_{name}']:.2f}**",
                f"{result[f'flop_model_{name}']:.2f}",
                f"{rate['ours']} / {rate['trl']}",
                f"{memory['ours']} / {memory['trl']} = {result[f'memory_ratio_{name}']:.2f}",
            ]
        )
    header = ["case", "ours, s", "TRL, s", "speed-up", "FLOP model", "GFLOP/s", "grown by, MB"]
    lines = [table(header, rows), "", "![GSPO: speed-up](performance_gspo.svg)", ""]
    return "\n".join([*lines, _facts(result["facts"])])


def write_mpo(result: Mapping[str, Any]) -> None:
    """Write the MPO table and plot."""
    names = list(result["seconds_a_step"])
    figure, axes = _figure(len(names))
    for place, name in enumerate(reversed(names)):
        colour = OURS if name.startswith("ours") else THEIRS
        axes.barh(place, result["ratio_to_ours"][name], color=colour, height=0.6)
        axes.plot(result["flop_ratio_to_ours"][name], place, "|", color=MODEL, ms=16, mew=2)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in reversed(names)])
    axes.set_xlabel("time of an MPO step, ours = 1\n(mark: what the FLOP model says)")
    _save(figure, "performance_mpo.svg")
    _write("mpo", mpo_text(result))


def write_gspo(result: Mapping[str, Any]) -> None:
    """Write the GSPO table and plot."""
    names = list(result["cases"])
    figure, axes = _figure(len(names))
    for place, name in enumerate(reversed(names)):
        axes.barh(place, result[f"speedup_{name}"], color=OURS, height=0.5)
        axes.plot(result[f"flop_model_{name}"], place, "|", color=MODEL, ms=18, mew=2)
    axes.set_yticks(range(len(names)), [CASES[name] for name in reversed(names)])
    axes.set_xlabel("TRL's time of a GSPO update / ours\n(mark: what the FLOP model says)")
    _save(figure, "performance_gspo.svg")
    _write("gspo", gspo_text(result))


def rl_step_text(result: Mapping[str, Any]) -> str:
    """The online step's part of the page."""
    phases = list(dict.fromkeys(p for spent in result["share"].values() for p in spent))
    rows = []
    for name, shares in result["share"].items():
        seconds = result["seconds_a_step"][name]
        told = [f"{shares.get(p, 0):.0%} ({seconds.get(p, 0):.2f} s)" for p in phases]
        rows.append([name, f"{sum(seconds.values()):.2f}", *told])
    plot = "![An online step's phases](performance_rl_step.svg)"
    lines = [table(["case", "s a step", *phases], rows), "", plot, ""]
    return "\n".join([*lines, _facts(result["facts"])])


def write_rl_step(result: Mapping[str, Any]) -> None:
    """Write the online step's table and its plot: one bar a case, stacked by phase."""
    figure, axes = _figure(len(result["share"]) + 2)
    names = list(result["share"])
    phases = list(dict.fromkeys(p for spent in result["share"].values() for p in spent))
    colours = ("#8c564b", OURS, "#7fb3c8", "#d9a441", "#c46a3f", "#4f7942", THEIRS, MODEL)
    start = [0.0] * len(names)
    for phase, colour in zip(phases, colours, strict=False):
        widths = [100 * result["share"][name].get(phase, 0.0) for name in names]
        axes.barh(names, widths, left=start, color=colour, height=0.6, label=phase)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of an online step's wall time, %")
    figure.legend(loc="outside upper center", ncols=len(phases), frameon=False, fontsize="small")
    _save(figure, "performance_rl_step.svg")
    _write("rl_step", rl_step_text(result))


def _figure(bars: int) -> tuple[Any, Any]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "performance"  # the same numbers give the same file
    figure = Figure(figsize=(8, 0.8 + 0.42 * bars), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, name: str) -> None:
    figure.savefig(DOCS / name, metadata={"Date": None})


def _write(name: str, text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_part(page, name, text), encoding="utf-8")
