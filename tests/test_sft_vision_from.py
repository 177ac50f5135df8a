"""Progressive scaling: the vision tower of one checkpoint under another's language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import load_plain
from safetensors.torch import load_file
from test_faults import Command
from test_faults import command as command
from tiny_llms import make_family, make_llm

from cascade.tiny import make_tiny_model
from internvl.checkpoint import load_model
from internvl.conversion.convert import convert
from internvl.conversion.merge import merge_adapter
from internvl.parts import PARTS, part_of

TOWER, PROJECTOR, LLM = PARTS


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrower language model (Qwen2) over a narrower tower of one layer."""
    return make_family(tmp_path_factory.mktemp("small"), "qwen2")


def options(base: Path, donor: Path, world: Path, output: Path, **more: Any) -> list[str]:
    given: dict[str, Any] = {
        "model_name_or_path": base,
        "vision_from": donor,
        "train_file": world / "sft.jsonl",
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
        **more,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def by_part(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found[part_of(name)][name] = tensor
    return found


def test_a_tower_goes_under_a_wider_language_model(
    small: Path, tiny_model: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    """The projector is made anew, is all that is trained, and a killed run ends the same."""
    output = tmp_path / "out"
    words = options(tiny_model, small, tiny_world, output, stage="mlp_warmup", seed=7)
    ended = command("sft", *words)
    assert ended.code == 0, ended.err
    line = (
        f"vision tower (1 layers of 32) from {small}; projector made anew (seed 7): that of "
        f"{small} is for a language model of 32; language model, tokenizer and tile processor "
        f"from {tiny_model}"
    )
    assert line in ended.out
    result, base, donor = (by_part(folder) for folder in (output, tiny_model, small))
    for part, source in ((TOWER, donor), (LLM, base)):
        assert set(result[part]) == set(source[part])
        assert all(torch.equal(result[part][n], weight) for n, weight in source[part].items())
    shapes = {
        name.rpartition("projector.")[2]: tuple(w.shape) for name, w in result[PROJECTOR].items()
    }
    assert shapes["linear_1.weight"] == (128, 4 * 32) and shapes["linear_2.bias"] == (128,)
    # whole: every name matches, for us strictly, and transformers alone makes the same of it
    model, _ = load_plain(output)
    loaded = load_model(output).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    assert model.config.vision_config.hidden_size == 32
    assert model.config.text_config.hidden_size == 128
    # killed after step 1, and again from there: the same bytes
    weights = (output / "model.safetensors").read_bytes()
    (output / "checkpoint-2" / "complete.json").rename(output / "checkpoint-2" / "incomplete")
    (output / "model.safetensors").unlink()
    again = command("sft", *words)
    assert again.code == 0, again.err
    assert "going on from" in again.out
    assert (output / "model.safetensors").read_bytes() == weights


def test_a_projector_that_fits_comes_along(
    tiny_model: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    donor_folder, output = tmp_path / "donor", tmp_path / "out"
    make_tiny_model(donor_folder, seed=9)
    ended = command(
        "sft",
        *options(tiny_model, donor_folder, tiny_world, output, learning_rate="0.0", max_steps=1),
    )
    assert ended.code == 0, ended.err
    assert f"(2 layers of 64) and projector from {donor_folder}; language model" in ended.out
    result, base, donor = (by_part(folder) for folder in (output, tiny_model, donor_folder))
    for part, source in ((TOWER, donor), (PROJECTOR, donor), (LLM, base)):
        assert all(torch.equal(result[part][n], weight) for n, weight in source[part].items())
    # and in the published layout, which vLLM's own InternVL code reads
    convert(output, tmp_path / "chat", to="chat", progress=False)
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert config["model_type"] == "internvl_chat"


def test_a_bare_language_model_is_trained_by_adapter(
    tiny_model: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    """What was composed is a folder, the adapter's base; a run that goes on takes it as it is."""
    output, llm = tmp_path / "out", make_llm(tmp_path / "llm", "qwen3")
    words = options(
        *(llm, tiny_model, tiny_world, output),
        max_steps=1,
        learning_rate="1e-3",
        use_peft="true",
        lora_modules_to_save="multi_modal_projector",
    )
    ended = command("sft", *words)
    assert ended.code == 0, ended.err
    assert "its tokenizer with 10 tokens more (<img>, </img>, <IMG_CONTEXT>, " in ended.out
    composed = output / "composed"
    named = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == composed
    before = (composed / "model.safetensors").stat()
    merge_adapter(output, tmp_path / "whole", progress=False)
    base, whole = by_part(composed), by_part(tmp_path / "whole")
    assert set(whole[LLM]) == set(base[LLM])
    trained = {name for name, weight in base[LLM].items() if not whole[LLM][name].equal(weight)}
    assert trained and all(".layers." in name for name in trained)
    assert not all(whole[PROJECTOR][name].equal(weight) for name, weight in base[PROJECTOR].items())
    assert all(whole[TOWER][name].equal(weight) for name, weight in base[TOWER].items())
    (llm / "config.json").write_text((llm / "config.json").read_text() + "\n")
    assert "was composed of other checkpoints" in command("sft", *words).error
    assert (composed / "model.safetensors").stat() == before


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_the_result_loads_in_vllm(
    tiny_model: Path,
    tiny_world: Path,
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bare language model's, that is, with tokens and rows that it did not have."""
    pytest.importorskip("vllm")
    from PIL import Image

    from internvl.sampler import SampleRequest, SamplingConfig, open_sampler

    llm = make_llm(tmp_path / "llm", "qwen3", spare=4, head_dim=32)  # vLLM on CPUs has no 16
    output = tmp_path / "out"
    words = options(llm, tiny_model, tiny_world, output, stage="vit_incremental")
    assert command("sft", *words).code == 0
    picture = Image.new("RGB", (112, 56), (9, 90, 200))
    request = SampleRequest("<image>\nWhat?", [picture], seed=0)
    asked = SamplingConfig(n=1, temperature=0.0, max_tokens=12, max_tiles=4)
    said = []
    for backend in ("vllm", "transformers"):
        with capsys.disabled():  # vLLM wants a stdout that is a file
            sampler = open_sampler(output, backend=backend, max_model_len=512)
            said.append(sampler.sample([request], asked)[0][0].token_ids)
            sampler.close()
    assert said[0] == said[1]


def test_what_does_not_fit_is_refused(
    small: Path, tiny_model: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    """All but the last by configurations alone."""

    def error(donor: Path, **more: Any) -> str:
        return command("sft", *options(tiny_model, donor, tiny_world, tmp_path / "o", **more)).error

    large = tmp_path / "large"
    make_tiny_model(large, seed=0, image_size=112)
    assert "its image_size is" in error(large)
    assert "(112, 112)" in error(large) or "[112, 112]" in error(large)
    assert "lora_modules_to_save does not name multi_modal_projector" in error(
        small, use_peft="true"
    )
    assert "is made anew, but freeze_projector is set" in error(small, freeze_projector="true")
    assert "no config.json there" in error(tmp_path / "nothing")
    other = tmp_path / "other"
    make_family(other, "qwen2")
    processor = json.loads((other / "processor_config.json").read_text())
    processor["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(processor))
    assert "its image_mean is [0.5, 0.5, 0.5], that of" in error(other)
    broken = tmp_path / "broken"
    make_family(broken, "qwen2")
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (broken / "config.json").write_text(json.dumps(config))
    assert f"{broken}: tensor 'vision_tower.encoder.layer.1." in error(broken)
