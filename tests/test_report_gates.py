"""What a report says of a run that is not whole: gates, what is missing, what has begun anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from report_cases import make_run, options, record, write_json

from cascade import report
from cascade.report_data import GateOutcome
from cascade.report_words import troubles


def test_gates_and_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=20, steps=2, stages=("sft", "sft_more", "mpo"))
    metrics = run / "eval" / "sft_more" / "metrics.json"
    fallen = {"sampled": 0.01, "sampled_ci": [0, 0.1]}
    write_json(metrics, {**json.loads(metrics.read_text()), **fallen})
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"].append(record("rl", "rl", "rl", 4.0, done=False, config=options(run, "mpo")))
    write_json(run / "manifest.json", manifest)
    log = {"log_history": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]}
    write_json(run / "stages/rl/checkpoint-2/trainer_state.json", log)
    data = report.collect(run)
    assert {gate.stage: gate.state for gate in data.gates} == {
        "sft_more": "closed", "mpo": "passed", "rl": "not reached"
    }  # fmt: skip
    assert [one.name for one in data.unfinished] == ["rl"]
    assert data.waiting == ["rl_alone"]
    assert data.trainings[-1].info.name == "rl"  # from its checkpoint
    said = troubles(data)
    assert said[:2] == ["Begun, but not ended well: rl.", "Not begun: rl_alone."]
    assert said[2].startswith("The gate behind sft_more closed: sampled fell from ")
    page = report.render(replace(data, trainings=(), results=[], examples=[], steps=[], others=[]))
    assert "not finished" in page and "<td>not begun</td>" in page


def test_results_of_what_has_begun_anew_are_not_shown(tmp_path: Path) -> None:
    """A run whose SFT was changed, and ended before its MPO: the old MPO is not set beside it."""
    run = make_run(tmp_path, questions=20, steps=2, stages=("sft", "mpo"))
    manifest = json.loads((run / "manifest.json").read_text())
    for one in manifest["stages"]:
        if one["name"] in ("mpo", "evaluate.mpo"):
            one["needs"] = {"sft" if one["name"] == "mpo" else "mpo": "0" * 16}
    write_json(run / "manifest.json", manifest)
    assert report.collect(run).stale == []
    for one in manifest["stages"]:
        if one["name"] in ("sft", "evaluate.sft"):
            one["key"] = "1" * 16
    write_json(run / "manifest.json", manifest)
    data = report.collect(run)
    assert data.stale == ["mpo"]
    assert [result.name for result in data.results] == ["sft"]
    assert "Not shown, since what they are of has begun anew: the results of MPO." in troubles(data)
    assert {gate.stage: gate.state for gate in data.gates}["mpo"] == "not reached"


def test_a_gate_on_tokens_is_told_in_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=20, steps=2, stages=("sft",))
    gate = GateOutcome("mpo", "sft", "mean_tokens", 5.0, 42.13, 21.0, "closed")
    data = replace(report.collect(run), gates=[gate])
    told = "The gate behind mpo closed: mean_tokens fell from 42.1 (sft) to 21.0."
    assert told in troubles(data)
    assert "<td>5.0 tokens</td>" in report.render(data)
