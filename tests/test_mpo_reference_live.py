"""The reference asked at each step gives what the cached one gives: whole models, LoRA, and LoRA
on an earlier stage's adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain import gradient_error
from trainer_cases import LARGE, Recorded, make_trainer, pairs, train, write_images

from internvl.adapters import put_adapter
from internvl.checkpoint import checksum, load_model
from internvl.conversion.merge import merge_adapter
from internvl.data import Row
from internvl.errors import UserError
from internvl.packing import pack
from mpo.reference import CachedReference, FrozenModel, LiveReference
from training.cli import ModelArguments, peft_config

ROWS = 6
TARGETS = r".*(language_model\.layers\..*_proj|vision_tower\..*\.fc1)"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, ROWS)
    return pairs(folder, ROWS)


def lora() -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS,
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier stage's adapter, with the projector trained whole; far from its base."""
    folder = tmp_path_factory.mktemp("earlier") / "adapter"
    model = get_peft_model(load_model(tiny_model), lora())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(str(folder))
    return folder


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", ["whole", "new adapter", "earlier adapter"])
def test_cached_and_on_the_fly_are_the_same(
    case: str, tiny_model: Path, adapter: Path, rows: list[Row], tmp_path: Path
) -> None:
    """Losses of every step to 1e-6, weights to 1e-5; and the reference stays what it was."""
    start = adapter if case == "earlier adapter" else tiny_model
    frozen: list[str] = []
    runs = []
    for precompute in (True, False):
        run = train(
            *("mpo", start, tmp_path / str(precompute), rows),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            max_tokens_per_microbatch=LARGE if precompute else 120,
            learning_rate=0.05 if case == "new adapter" else 0.02,
            precompute_ref_log_probs=precompute,
            peft_config=lora() if case == "new adapter" else None,
        )
        runs.append(run)
        nll = run.logs[0]["loss/sft"]
        assert run.losses[0] == pytest.approx(1.2 * math.log(2) + nll, rel=1e-6)
        reference = run.trainer.reference
        assert type(reference) is (CachedReference if precompute else LiveReference)
        if not precompute:
            frozen.append(checksum(reference._frozen._weights.items()))
            assert all(not w.requires_grad for w in reference._frozen._weights.values())
            assert reference._frozen._weights.keys() == trained_weights(run.trainer.model).keys()
    cached, live = runs
    assert live.losses == pytest.approx(cached.losses, rel=1e-6)
    assert live.delta == pytest.approx(cached.delta, rel=1e-5)
    for name, value in cached.evaluation.items():
        assert live.evaluation[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    after = [trained_weights(run.trainer.model) for run in runs]
    before = cached.weights[0]
    assert gradient_error(after[1], after[0]) < 1e-5
    assert gradient_error(after[0], before) > 1e-3  # it moved
    assert frozen == [checksum(before.items())]  # and the reference did not
    if case != "whole":
        assert [*live.trainer.model.peft_config] == ["default"]


@pytest.fixture
def next_stage(
    tiny_model: Path, adapter: Path, rows: list[Row], tmp_path: Path
) -> Iterator[tuple[Any, Path]]:
    """A run from the earlier adapter, and what it saved."""
    options: dict[str, Any] = {"max_steps": 2, "precompute_ref_log_probs": False}
    run = train("mpo", adapter, tmp_path / "run", rows, **options)
    run.trainer.save_model(str(tmp_path / "out"))
    yield run.trainer, tmp_path / "out"


def test_one_adapter_is_saved_which_loads_merges_and_goes_on(
    next_stage: tuple[Any, Path], tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """Adapter inference, PEFT's own loading and the merged folder agree to 1e-5."""
    trainer, out = next_stage
    assert not [path for path in out.iterdir() if path.is_dir()]
    assert {path.name for path in out.glob("*.safetensors")} == {"adapter_model.safetensors"}
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model)

    merge_adapter(out, tmp_path / "merged", progress=False)
    loaded = [
        trainer.model,
        PeftModel.from_pretrained(load_model(tiny_model), str(out)),
        put_adapter(load_model(tiny_model), out, base=tiny_model),
        load_model(tmp_path / "merged"),
    ]
    batch = pack([trainer.encoder.pair(row) for row in rows])
    with torch.no_grad():
        for model in loaded:
            model.eval()
        first, *others = [trainer.score(model, batch).logprobs for model in loaded]
    for other in others:
        assert (other - first).abs().max() < 1e-5
    base = load_model(tiny_model).eval()
    assert (trainer.score(base, batch).logprobs - first).abs().max() > 0.1

    again = make_trainer("sft", out, tmp_path / "sft", rows, Recorded(), eval_rows=0)
    started, ended = trained_weights(again.model), trained_weights(trainer.model)
    assert started.keys() == ended.keys()
    assert all(started[name].equal(weight) for name, weight in ended.items())


def test_a_model_with_an_adapter_gets_no_other(
    adapter: Path, rows: list[Row], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has an adapter already; peft_config would put on"):
        make_trainer("mpo", adapter, tmp_path, rows, Recorded(), peft_config=lora())


def test_an_adapter_whose_base_is_not_there(adapter: Path, tmp_path: Path) -> None:
    from internvl.adapters import base_of

    other = tmp_path / "adapter"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../base"
    (other / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"its base '../base' is no folder here"):
        base_of(other)
    (tmp_path / "base").mkdir()
    assert base_of(other).samefile(tmp_path / "base")
    assert base_of(tmp_path / "base") == tmp_path / "base"


def test_an_adapter_is_trained_on_as_it_is(adapter: Path, tiny_model: Path) -> None:
    """With its own settings, and only where that is asked for."""
    with pytest.raises(UserError, match=rf"is an adapter: set use_peft .*internvl merge {adapter}"):
        ModelArguments(model_name_or_path=str(adapter))
    with pytest.raises(UserError, match=r"lora_r is given, but .* is an adapter with settings of"):
        ModelArguments(model_name_or_path=str(adapter), use_peft=True, lora_r=4)
    arguments = ModelArguments(model_name_or_path=str(adapter), use_peft=True)
    assert peft_config(arguments) is None
    assert (
        peft_config(ModelArguments(model_name_or_path=str(tiny_model), use_peft=True)) is not None
    )


def test_a_frozen_model_stays_as_it_was_and_drops_nothing_out() -> None:
    class Dropping(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(input), 0.5, self.training)

    model = Dropping(4, 3).train()
    values = torch.randn(2, 4)
    expected = torch.nn.functional.linear(values, model.weight, model.bias).detach().clone()
    frozen = FrozenModel(model)
    with torch.no_grad():
        model.weight += 1
    found = frozen(input=values)
    assert found.equal(expected) and not found.requires_grad
    assert model.training and model.weight.requires_grad
    assert not list(frozen.parameters())
