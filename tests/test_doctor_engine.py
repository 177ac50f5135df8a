"""cascade doctor's engine checks: a fault of a sampler, of a save or of a loss is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_cases import PLANTED, change_recipe, copy_of, make_healthy
from trainer_cases import questions, write_images

from cascade.doctor import engine
from cascade.doctor.command import examine
from cascade.doctor.engine import Bench, check_engine, check_round_trip, check_tokens
from cascade.doctor.findings import Finding
from cascade.doctor.first_loss import judge_first_loss
from internvl.chat import encode_prompt
from internvl.sampler import SampleRequest


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Iterator[Bench]:
    """The tiny model, sampled from by transformers, with questions of 0, 1, 3 and 2 tiles."""
    write_images(tmp_path, 4)
    rows = questions(tmp_path, ["mixed", "other", "equal", "mixed"])
    made = Bench.open(tiny_model, rows, max_tiles=4, backend="transformers")
    yield made
    made.close()


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.code: finding.level for finding in findings}


def test_a_sound_engine_has_no_finding(bench: Bench) -> None:
    assert levels(check_engine(bench, update=True)) == {
        "engine.tokens": "ok",
        "engine.logprobs": "ok",
        "engine.update": "ok",
        "checkpoint.round-trip": "ok",
    }


def test_prompts_that_are_expanded_twice_are_seen(bench: Bench) -> None:
    def twice(request: SampleRequest, budget: int) -> tuple[list[int], torch.Tensor]:
        processor = bench.encoder.processor
        prompt = encode_prompt(processor, request.question, request.images, budget)
        ids = []
        for token in prompt.ids:
            ids += [token] * (2 if token == processor.image_token_id else 1)
        return ids, torch.zeros(0, 3, 56, 56)

    vars(bench.sampler)["engine_inputs"] = twice
    [found] = check_tokens(bench)
    assert (found.code, found.level) == ("engine.tokens", "error")
    assert "transformers reads line 1 as" in found.found


def test_another_tile_budget_in_the_engine_is_seen(bench: Bench) -> None:
    def fewer(request: SampleRequest, budget: int) -> tuple[list[int], torch.Tensor]:
        processor = bench.encoder.processor
        prompt = encode_prompt(processor, request.question, request.images, 1)
        return prompt.ids, torch.zeros(0, 3, 56, 56)

    vars(bench.sampler)["engine_inputs"] = fewer
    assert levels(check_tokens(bench)) == {"engine.tokens": "error"}


def test_weights_that_do_not_arrive_are_seen(bench: Bench) -> None:
    """What a tied lm_head, or a cache, does to an engine: no error, and old numbers."""
    vars(bench.sampler)["update_weights"] = lambda named: list(named)
    found = {finding.code: finding for finding in check_engine(bench, update=True)}
    assert found["engine.update"].level == "error"
    assert "goes on with old weights" in found["engine.update"].found
    assert "sampler: transformers" in found["engine.update"].cure
    assert found["engine.logprobs"].level == "ok"


def test_another_distribution_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that masks nothing, where the trainer masks the image tokens."""
    bench.sampler._forbidden = ()  # type: ignore[attr-defined]
    [tokens, logprobs, *_] = check_engine(bench, update=False)
    assert (tokens.level, logprobs.code, logprobs.level) == ("ok", "engine.logprobs", "error")


def test_a_save_that_loses_weights_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.load_model

    def load(*args: Any, **options: Any) -> Any:
        model = whole(*args, **options)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        return model

    monkeypatch.setattr(engine, "load_model", load)
    [found] = check_round_trip(bench)
    assert (found.code, found.level) == ("checkpoint.round-trip", "error")
    assert "checksums differ" in found.found


@pytest.mark.parametrize(
    ("said", "level", "told"),
    [
        ("first loss 4.831700, expected 4.831650 = 1.2 ln2", "ok", "is 4.831700, expected"),
        ("first loss 4.9, expected 4.8 = 1.2 ln2", "error", "differ by +0.1000"),
        ("first loss nan, expected 4.8 = 1.2 ln2", "error", "the first loss is nan"),
        ("first loss 4.9; hinge can be anything there", "ok", "it can be anything"),
        ("{'loss': 4.9}", "error", "said nothing of its first loss"),
    ],
)
def test_what_mpo_says_of_its_first_loss(said: str, level: str, told: str) -> None:
    [found] = judge_first_loss("mpo", f"before\n{said}\nafter\n")
    assert found.level == level
    assert told in found.found


# ---------------------------------------------------------------- the whole, with processes


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_all_of_a_healthy_recipe(tmp_path: Path, backend: str) -> None:
    make_healthy(tmp_path)
    change_recipe(tmp_path, lambda recipe: recipe.update(backend=backend))
    findings = examine(tmp_path / "recipe.yaml")
    assert [finding for finding in findings if finding.level != "ok"] == []
    codes = {finding.code for finding in findings}
    assert {"recipe.options", "engine.tokens", "engine.logprobs", "engine.update"} <= codes
    assert {"checkpoint.round-trip", "mpo.first-loss", "hours.stage", "hours.all"} <= codes


@pytest.mark.slow
def test_dropout_moves_the_first_loss(tmp_path: Path) -> None:
    """By the stage's own command, and not by reading config.json alone."""
    make_healthy(tmp_path)
    [planted] = [fault for fault in PLANTED if fault.name == "dropout in MPO"]
    planted.plant(tmp_path)
    change_recipe(tmp_path, lambda recipe: recipe.update(backend="transformers"))
    found = levels([f for f in examine(tmp_path / "recipe.yaml") if f.level != "ok"])
    assert found == {"checkpoint.dropout": "error", "mpo.first-loss": "error"}


@pytest.mark.slow
def test_a_tied_head_goes_stale_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sampler refuses by itself is also seen in the numbers, where it does not."""
    make_healthy(tmp_path)
    [planted] = [fault for fault in PLANTED if fault.name == "tied embeddings"]
    planted.plant(tmp_path)
    from internvl.data import Quarantine, read_rows

    rows = read_rows(tmp_path / "preference.jsonl", kind="question", quarantine=Quarantine(None))[
        :4
    ]
    bench = Bench.open(tmp_path / "model", rows, max_tiles=2, backend="vllm")
    try:
        bench.sampler._tied = False  # type: ignore[attr-defined]
        found = levels(check_engine(bench, update=True))
    finally:
        bench.close()
    assert found["engine.logprobs"] == "ok"
    assert found["engine.update"] == "error"


@pytest.mark.slow
def test_options_of_no_command_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "healthy"
    make_healthy(folder)
    folder = copy_of(folder, tmp_path)
    options = {"learning_rat": 1e-5}
    change_recipe(folder, lambda recipe: recipe["stages"]["mpo"].update(options))
    change_recipe(folder, lambda recipe: recipe.update(backend="transformers"))
    found = [f for f in examine(folder / "recipe.yaml") if f.level != "ok"]
    assert levels(found) == {"recipe.options": "error"}
    assert "did you mean 'learning_rate'?" in found[0].found
