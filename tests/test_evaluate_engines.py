"""`cascade evaluate` with real engines, with an adapter, and killed for good."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import files_of, metrics, predictions, questions

from cascade.cli import main
from cascade.completions import question_seed
from internvl.data import Quarantine, read_rows
from internvl.sampler import SamplingConfig, request_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Kept:
    """The shared engine, which is not this command's to close."""

    def __init__(self, sampler: Any):
        self.name, self.stream = sampler.name, sampler.stream

    def close(self) -> None: ...


@pytest.mark.xdist_group("vllm")
def test_completions_are_the_engine_s(
    vllm_sampler: Any, tiny_model: Path, tiny_world: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Greedy and sampled, each by the question's own seed, whatever was asked beside it."""
    monkeypatch.setattr("internvl.sampler.open_sampler", lambda *_, **__: Kept(vllm_sampler))
    file, out = tiny_world / "heldout.jsonl", tmp_path / "out"
    words = ["--samples=2", "--max-tokens=8", "--max-tiles=2", "--seed=5", "--max-bad=0"]
    main(["evaluate", str(file), f"--model={tiny_model}", f"--output={out}", *words])
    rows = read_rows(file, kind="question", quarantine=Quarantine(None))
    records = predictions(out)
    assert [record["id"] for record in records] == [row.data["id"] for row in rows]
    limits: dict[str, Any] = {"max_tokens": 8, "max_tiles": 2}
    for number in (0, len(rows) - 1):
        request = request_of(rows[number], question_seed(5, rows[number].data["id"]))
        for config, said in (
            (SamplingConfig(temperature=0.0, **limits), [records[number]["greedy"]]),
            (SamplingConfig(n=2, **limits), records[number]["sampled"]),
        ):
            (completions,) = vllm_sampler.sample([request], config)
            wanted = [(c.text, len(c.token_ids), c.finish_reason == "length") for c in completions]
            found = [(one["completion"], one["tokens"], one["truncated"]) for one in said]
            assert found == wanted
    assert metrics(out)["n"] == len(rows)
    assert json.loads((out / "settings.json").read_text())["backend"] == vllm_sampler.name


def run(*words: object) -> None:
    """`cascade evaluate` as a process."""
    command = [sys.executable, "-m", "cascade", "evaluate", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_an_adapter_answers_as_its_merged_model(
    tiny_model: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """vLLM on base and adapter against transformers on the weights that PEFT has merged."""
    import torch
    from peft import LoraConfig, get_peft_model

    from internvl.checkpoint import load_model

    torch.manual_seed(0)
    model = load_model(str(tiny_model), dtype="float32")
    modules = r".*language_model\.layers\..*_proj"
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=modules))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    wrapped.peft_config["default"].base_model_name_or_path = str(tiny_model)
    wrapped.save_pretrained(adapter)
    shutil.copytree(tiny_model, merged)
    wrapped.merge_and_unload().save_pretrained(merged)
    words = [tiny_world / "heldout.jsonl", "--samples=1", "--max-tokens=12", "--max-tiles=2"]
    found = {}
    for name, model_folder, backend in (
        ("adapter", adapter, "vllm"),
        ("merged", merged, "transformers"),
        ("base", tiny_model, "transformers"),
    ):
        run(
            *words,
            f"--model={model_folder}",
            f"--output={tmp_path / name}-e",
            f"--backend={backend}",
        )
        found[name] = [one["greedy"]["completion"] for one in predictions(tmp_path / f"{name}-e")]
    assert found["adapter"] == found["merged"] != found["base"]


SLOWLY = """
import sys, time
sys.path.insert(0, {tests!r})
import cascade.completions
from cascade.cli import main
from evaluation_runs import FakeSampler
cascade.completions.FLUSH_QUESTIONS = 3
class Slowly(FakeSampler):
    def answer(self, request, config, n):
        time.sleep(0.01)
        return super().answer(request, config, n)
import internvl.sampler
internvl.sampler.open_sampler = lambda *_, **__: Slowly()
main(["evaluate", *sys.argv[1:]])
"""


def written(folder: Path) -> int:
    """Bytes of completions and predictions."""
    total = 0
    for path in folder.rglob("*.jsonl"):
        with suppress(FileNotFoundError):  # it has ended just now
            total += path.stat().st_size
    return total


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    file, model = questions(tmp_path, 60), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    script = SLOWLY.format(tests=str(Path(__file__).parent))

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = [file, f"--model={model}", f"--output={out}", "--prompts", "cot", "direct"]
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words), "--samples=2", "--workers=1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )

    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    assert start(whole).wait(200) == 0
    rng = random.Random(4)
    for _ in range(4):
        before, process = written(out), start(out)
        deadline = time.monotonic() + 120
        while written(out) == before:  # once it has gone on, at any moment
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(out).wait(200) == 0
    assert files_of(out) == files_of(whole)
