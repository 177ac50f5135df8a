"""Every recipe that is shipped is read by `cascade run`, and every option in it by its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade import check_options
from cascade.driver import config_text
from cascade.plan import plan
from cascade.recipe import load_recipe
from cascade.recipe_stage import TRAINING

ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    file
    for place in ("examples/*/*.yaml", "cascade/recipes/*.yaml")
    for file in ROOT.glob(place)
    if "\nstages:" in file.read_text()
)


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def test_there_are_recipes() -> None:
    assert [name_of(file) for file in RECIPES] == [
        *("recipes/demo", "recipes/tiny", "demo/ablation"),
        *(f"internvl3_5_cascade/{size}" for size in ("1b", "2b", "8b")),
        *("lora_24gb/cascade", "your_data/cascade"),
    ]


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_the_commands_take_its_options(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but `bf16`, which transformers refuses where no GPU is; none of its data is here."""
    recipe = load_recipe(file)
    checks: list[dict[str, Any]] = []
    for one in plan(recipe, Path("run"), 0):
        check: dict[str, Any] = {"stage": one.stage, "kind": one.kind, "words": one.command[1:]}
        if one.kind in TRAINING:
            config = tmp_path / f"{one.name}.yaml"
            config.write_text(config_text({**(one.config or {}), "bf16": False}))
            check["config"] = str(config)
        checks.append(check)
    (tmp_path / "checks.json").write_text(json.dumps(checks))
    monkeypatch.setattr(sys, "argv", ["check_options", str(tmp_path / "checks.json")])
    check_options.main()
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == []
    trained = {name for name, spec in recipe.stages.items() if spec.kind in TRAINING}
    assert {*found["options"]} >= trained - {n for n, s in recipe.stages.items() if s.optional}


@pytest.mark.parametrize("size", ["1b", "2b", "8b"])
def test_the_published_numbers(size: str) -> None:
    """InternVL3.5's (arXiv 2508.18265), over the 8 processes of the launch."""
    stages = load_recipe(ROOT / f"examples/internvl3_5_cascade/{size}.yaml").stages
    sft, mpo, rl = (stages[name].options for name in ("sft", "mpo", "rl"))
    assert 8 * sft["per_device_train_batch_size"] == 512  # packs
    assert (sft["max_tokens_per_microbatch"], sft["max_tiles_per_microbatch"]) == (32768, 96)
    assert (sft["packing_buffer_size"], sft["learning_rate"]) == (20, 8e-5)
    assert (sft["vit_drop_path"], sft["loss_average"]) == (0.1, "square")
    assert 8 * mpo["per_device_train_batch_size"] == 256  # pairs
    assert (mpo["loss_weights"], mpo["beta"], mpo["learning_rate"]) == ([0.8, 0.2, 1.0], 0.1, 2e-7)
    for options in (sft, mpo):
        assert (options["weight_decay"], options["warmup_steps"]) == (0.05, 0.03)
        assert options["lr_scheduler_type"] == "cosine"
    questions = 8 * rl["per_device_train_batch_size"]
    assert (questions, questions * rl["steps_per_generation"]) == (32, 512)
    assert (rl["num_generations"], rl["max_completion_length"]) == (16, 32768)
    assert (rl["epsilon"], rl["epsilon_high"], rl["freeze_vit"]) == (3e-4, 4e-4, True)
    assert rl["learning_rate"] == (1e-5 if rl.get("use_peft") else 1e-6)
    assert stages["pairs"].sections["sample"]["n"] == 32
    assert stages["pairs"].sections["pair"] == {"max-pairs-per-question": 15}
    band = (stages["select"].options["min-accuracy"], stages["select"].options["max-accuracy"])
    assert band == (0.2, 0.8)
