"""Every stage's command on an adapter that an earlier stage trained: kills, saves, the engine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stage_runs import InSave, StageRun

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.model import plain_attention

pytestmark = pytest.mark.slow
LAYERS = r".*language_model\.layers\..*_proj"


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, far from it, with the projector trained whole."""
    folder = tmp_path_factory.mktemp("earlier") / "adapter"
    config = LoraConfig(
        r=4, target_modules=LAYERS, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM"
    )
    save_random(tiny_model, config, folder)
    return folder


def save_random(base: Path, config: LoraConfig, folder: Path) -> Any:
    model = get_peft_model(load_model(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(str(folder))
    return model


@pytest.fixture
def make(tiny_world: Path, adapter: Path, tmp_path: Path) -> Callable[..., StageRun]:
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as out:
        for line in (tiny_world / "rl.jsonl").read_text().splitlines()[:8]:
            row = json.loads(line)
            keep = {name: row[name] for name in ("id", "image", "question")}
            careless = "It looks clear from the chart. Final Answer: 11"
            out.write(json.dumps({**keep, "chosen": row["solution"], "rejected": careless}) + "\n")
    files = {"mpo": pairs, "sft": tiny_world / "sft.jsonl", "rl": tiny_world / "rl.jsonl"}

    def run(stage: str, name: str, **changes: Any) -> StageRun:
        options: dict[str, Any] = {
            "model_name_or_path": str(adapter),
            "use_peft": True,
            "train_file": str(files[stage]),
            "image_root": str(tiny_world),
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
        }
        return StageRun(stage, {**options, **changes})

    return run


def test_killed_in_a_save_it_ends_with_the_same_bytes(make: Callable[..., StageRun]) -> None:
    """The reference is the earlier adapter also after the restart."""
    options = {"precompute_ref_log_probs": False}
    whole, run = make("mpo", "whole", **options), make("mpo", "killed", **options)
    whole.finish()
    assert run.start(InSave(4)).code == -signal.SIGKILL
    assert "going on from" in run.finish().text
    assert run.weights() == whole.weights()
    assert run.logged() == whole.logged()
    cached = make("mpo", "cached")
    cached.finish()
    for one, other in zip(cached.logged(), whole.logged(), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    found = {file.parent.name for file in whole.folder.rglob("adapter_config.json")}
    assert found == {"whole", "checkpoint-2", "checkpoint-4"}  # one adapter each


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_other_stages_go_on_with_it(
    stage: str, make: Callable[..., StageRun], adapter: Path
) -> None:
    rl = {
        "num_generations": 4,
        "steps_per_generation": 2,
        "max_completion_length": 8,
        "sampler": "transformers",
        "per_device_train_batch_size": 2,
    }
    run = make(stage, stage, **(rl if stage == "rl" else {}))
    run.finish()
    assert run.weights() != (adapter / "adapter_model.safetensors").read_bytes()
    saved, before = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (run.folder, adapter)
    )
    for name in ("r", "target_modules", "modules_to_save", "base_model_name_or_path"):
        assert saved[name] == before[name], name


@pytest.mark.xdist_group("vllm")
def test_vllm_serves_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """LoRARequest on the base gives the log-probabilities of adapter inference, and the base's."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    config = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = save_random(tiny_model, config, tmp_path / "adapter")
    ids = load_processor(str(tiny_model)).tokenizer("What is 4 + 5?")["input_ids"]
    inputs, targets = torch.tensor([ids]), torch.tensor(ids[1:])

    def plain() -> list[float]:
        logits = model(input_ids=inputs).logits[0, :-1].log_softmax(-1)
        values: list[float] = logits.gather(1, targets[:, None])[:, 0].tolist()
        return values

    with torch.no_grad(), plain_attention(model.get_base_model()):
        adapted = plain()
        with model.disable_adapter():
            base = plain()
    assert max(abs(a - b) for a, b in zip(adapted, base, strict=True)) > 0.1
    engine = LLM(
        *(str(tiny_model),),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        enable_lora=True,
        max_lora_rank=8,
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    for lora, expected in ((None, base), (request, adapted)):
        (out,) = engine.generate({"prompt_token_ids": ids}, asked, lora_request=lora)
        found = [next(iter(place.values())).logprob for place in out.prompt_logprobs[1:]]
        assert found == pytest.approx(expected, abs=1e-5)
