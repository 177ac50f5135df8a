"""Real RL on real vLLM: from an SFT checkpoint of the demo world, the held-out reward rises.

In the short one the model was shown 512 charts: it writes answers of the right form, and guesses.
RL then asks only charts whose answer is 5 or 6, of which held-out ones tell whether it has learned.
The full one starts from the demo's own SFT checkpoint, on the demo's own questions and options.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cascade.demo import demo_recipe
from cascade.recipe import load_recipe
from cascade.run import RunOptions, run_seed
from cascade.world import WorldSizes, make_world
from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.sampler import open_sampler
from rl.config import RLConfig
from rl.trainer import RLTrainer
from sft.config import SFTConfig
from sft.trainer import SFTTrainer

pytestmark = pytest.mark.xdist_group("vllm")
ANSWERS = ("5", "6")
STEPS = 12
COMMON: dict[str, Any] = {
    "train_file": "rows.jsonl",
    "max_tiles": 2,
    "weight_decay": 0.0,
    "max_tokens_per_microbatch": 16384,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def read(folder: Path, split: str) -> list[Row]:
    file = folder / f"{split}.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [Row(record, file, index, folder) for index, record in enumerate(records)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    sizes = WorldSizes(sft=512, mixed=1, probe=1, preference=1, rl=700, heldout=600)
    make_world(folder, seed=0, sizes=sizes)
    return folder


@pytest.fixture(scope="module")
def sft_model(tiny_model: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after 32 steps of SFT on the world's careful solutions."""
    folder = tmp_path_factory.mktemp("sft")
    options = {"max_steps": 32, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    options |= {"loss_average": "token", "lr_scheduler_type": "constant", "warmup_steps": 5}
    processor = load_processor(str(tiny_model))
    trainer = SFTTrainer(
        model=load_model(tiny_model),
        args=SFTConfig(output_dir=str(folder), adam_beta2=0.98, **options, **COMMON),
        train_dataset=read(world, "sft"),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    return folder


def mean_and_error(output: Path, step: int) -> tuple[float, float]:
    """Mean held-out reward, and its standard error: the questions are what was drawn."""
    lines = (output / "evaluation" / f"step-{step}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    means = [sum(r["rewards"]) / len(r["rewards"]) for r in records]
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))


def assert_rises(output: Path, last: int) -> None:
    (before, error), (after, other) = mean_and_error(output, 0), mean_and_error(output, last)
    errors = (after - before) / math.hypot(error, other)
    print(f"reward {before:.3f} +- {error:.3f} -> {after:.3f} +- {other:.3f}: {errors:.1f} s.e.")
    assert errors > 3.0


def test_the_reward_rises(sft_model: Path, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    torch.manual_seed(0)
    options = {"max_steps": STEPS, "learning_rate": 1e-3, "adam_beta2": 0.99, "warmup_steps": 2}
    options |= {"per_device_train_batch_size": 16, "num_generations": 8, "steps_per_generation": 2}
    options |= {"max_completion_length": 24, "freeze_vit": False, "max_logprob_gap": 1e-4}
    options |= {"eval_file": "rows.jsonl", "eval_strategy": "steps", "eval_steps": STEPS}
    asked, held_out = (
        [row for row in read(world, split) if row.data["answer"] in ANSWERS]
        for split in ("rl", "heldout")
    )
    sampler = open_sampler(sft_model, backend="vllm", max_model_len=256)
    RLTrainer(
        model=load_model(sft_model),
        args=RLConfig(
            output_dir=str(tmp_path), sampler="vllm", eval_on_start=True, **options, **COMMON
        ),
        train_dataset=asked,
        eval_dataset=held_out,
        processing_class=load_processor(str(sft_model)),
        sampler=sampler,
    ).train()
    sampler.close()
    assert_rises(tmp_path, STEPS)


@pytest.mark.slow
def test_the_reward_rises_from_the_demos_own_checkpoint(tmp_path: Path) -> None:
    """The demo's commands and options: world, careful SFT, mixed SFT, then 100 steps of RL."""
    pytest.importorskip("vllm")
    recipe = yaml.safe_load(demo_recipe("demo").text)
    stages = recipe["stages"]
    stages["world"] |= {"probe": 128, "preference": 8, "heldout": 200}
    # as many steps, and an evaluation of every 20th: half the time
    stages["sft-careful"] |= {"eval_steps": 20, "per_device_eval_batch_size": 128}
    evaluation = {"eval_strategy": "steps", "eval_steps": 100, "eval_file": "world/heldout.jsonl"}
    evaluation |= {"eval_on_start": True, "num_generations_eval": 4, "max_steps": 100}
    stages["rl"] |= {**evaluation, "model": "sft", "train_file": "world/rl.jsonl"}
    del stages["rl"]["data"], recipe["evaluate"], recipe["report"]
    recipe["stages"] = {n: stages[n] for n in ("world", "sft-careful", "sft", "rl")}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    run_seed(load_recipe(file), tmp_path, 0, RunOptions(backend="vllm"))
    assert_rises(tmp_path / "stages" / "rl", 100)
