"""MPO's first loss, by the stage's own command on a handful of pairs.

While policy and reference are one model the loss is known before it is computed (mpo/losses.py):

    0.8 ln 2 + 0.2 * 2 ln 2 + nll = 1.2 ln 2 + nll

Dropout, another image path in the two passes, a reference of another model or a cache of an older
one all move it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cascade.doctor.facts import Launch
from cascade.doctor.findings import Finding, error, ok, warning
from internvl.data import Row, write_jsonl
from internvl.data.exports import store_images

PAIRS = 4
ALONE = Launch()
TOLERANCE = 1e-3  # MPO's own
SECONDS = 540  # a command that takes longer is ended
_FIRST = re.compile(r"first loss ([-\w.]+)(?:, expected ([-\w.]+))?")
# what one step on a few pairs has no use for, or must not touch
_LEFT_OUT = (
    *("reference_cache_dir", "quarantine_file", "deepspeed", "fsdp", "fsdp_config"),
    *("metric_for_best_model", "greater_is_better", "num_train_epochs", "image_root"),
)


def pairs_of(rows: Sequence[Row], folder: Path) -> Path:
    """A file of pairs: real ones as they are, or made of questions on the spot.

    The chosen completion of a question is its gold answer, the rejected one another text. Pictures
    are named by their full paths.
    """
    records = []
    for row in rows:
        record = {**row.data}
        if "chosen" not in record:
            answer = record.get("answer")
            gold = answer[0] if isinstance(answer, list) and answer else answer
            record["chosen"] = f"I read the image. Final Answer: {gold or 'yes'}"
            record["rejected"] = "It looks clear. Final Answer: none of these"
        record["image"] = _pictures(row, folder)
        if row.num_frames:
            record["video"] = str((row.image_root / row.data["video"]).absolute())
            del record["image"]
        record.pop("images", None)
        if row.tile_budget(None) is not None:
            record["max_tiles"] = row.tile_budget(None)
        records.append(record)
    file = folder / "pairs.jsonl"
    write_jsonl(file, records)
    return file


def _pictures(row: Row, folder: Path) -> list[str]:
    sources = row.image_sources()
    if any(isinstance(source, bytes) for source in sources):
        sources = [*store_images(row, folder)]
    return [str(Path(str(source)).absolute()) for source in sources]


def step_config(
    options: Mapping[str, Any], *, model: Path, pairs: Path, folder: Path
) -> dict[str, Any]:
    """The stage's own options, for one step on these pairs that leaves nothing behind."""
    kept = {
        name: value
        for name, value in options.items()
        if name not in _LEFT_OUT and not name.startswith(("eval_", "save_"))
    }
    kept["per_device_train_batch_size"] = PAIRS
    return {
        **kept,
        "model_name_or_path": str(model),
        "train_file": str(pairs),
        "image_root": "/",
        "output_dir": str(folder / "mpo"),
        "max_steps": 1,
        "max_bad": 0,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def check_first_loss(
    stage: str,
    options: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    model: Path,
    folder: Path,
    command: Sequence[str] = (),
    launch: Launch = ALONE,
    environment: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Run one step of an MPO stage and look at what it says of its first loss.

    rows: pairs, or questions to make some of. folder: for its files. command: the stage's in the
    run, which is taken where it starts several processes (they all have to be on this machine).
    """
    if launch.processes > launch.here:
        told = f"{launch.processes} processes on several machines: its first step was not run"
        cure = "look at the first line of the run: it says first loss, expected"
        return [warning("mpo.first-loss", told, stage, cure=cure)]
    folder.mkdir(parents=True, exist_ok=True)
    rows = (list(rows) * PAIRS * launch.processes)[: PAIRS * launch.processes]
    config = step_config(options, model=model, pairs=pairs_of(rows, folder), folder=folder)
    file = folder / "step.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    words = ["-m", "mpo", "--config", str(file)]
    if launch.processes > 1 and command:
        words = [*command[:-1], str(file)]
    try:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**(environment or {}), **os.environ},
        )
    except subprocess.TimeoutExpired:
        told = f"one step on {PAIRS} pairs took over {SECONDS} s"
        return [warning("mpo.first-loss", told, stage, cure="run doctor on the training machine")]
    if done.returncode:
        told = f"python -m mpo ended with code {done.returncode}: {_last_line(done.stderr)}"
        cure = f"change the option or the data that it names (stage {stage})"
        return [error("mpo.command", told, stage, cure=cure)]
    return judge_first_loss(stage, done.stdout + done.stderr)


def judge_first_loss(stage: str, output: str) -> list[Finding]:
    """The finding that the command's own words about its first loss make."""
    found = _FIRST.search(output)
    if found is None:
        told = "python -m mpo said nothing of its first loss"
        return [error("mpo.first-loss", told, stage, cure="report this, with the stage's options")]
    loss = float(found[1])
    if found[2] is None:
        told = f"the first loss is {loss:.4f}; with these losses it can be anything"
        return [ok("mpo.first-loss", told, stage)]
    expected = float(found[2])
    told = f"the first loss is {loss:.6f}, expected {expected:.6f}"
    if abs(loss - expected) <= TOLERANCE:
        return [ok("mpo.first-loss", f"{told} (1.2 ln 2 + nll with MPO's weights)", stage)]
    told += f": policy and reference differ by {loss - expected:+.4f} before the first step"
    cure = (
        "turn dropout off (attention_dropout, drop_path in config.json, lora_dropout); remove a "
        "reference cache of another model"
    )
    return [error("mpo.first-loss", told, stage, cure=cure)]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(it said nothing)"
