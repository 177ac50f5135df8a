"""A LoRA adapter merged into its base: the weights that the sampler is given, as a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from published import load_weights, make_published

from internvl.chat import load_processor
from internvl.checkpoint import full_weights, load_model
from internvl.conversion.convert import convert
from internvl.conversion.merge import merge_adapter
from internvl.errors import UserError

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint; not to be written to."""
    root = tmp_path_factory.mktemp("base")
    make_published(root / "chat", "qwen3")
    convert(root / "chat", root / "hf", to="hf", progress=False)
    return root / "hf"


def train(base: Path, out: Path, seed: int = 0, **options: Any) -> PeftModel:
    """An adapter with random weights, saved as the trainers save theirs; and the model."""
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, **options})
    model = get_peft_model(load_model(base), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(str(out))
    return model


def assert_is(folder: Path, model: torch.nn.Module) -> None:
    """The checkpoint's weights are full_weights' of the model, bit for bit."""
    loaded = dict(load_model(folder).named_parameters())
    expected = dict(full_weights(model))
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "bias": "lora_only", "target_modules": ["q_proj", "fc1"]},
        {"modules_to_save": ["multi_modal_projector"]},
    ],
)
def test_a_merged_folder_is_the_full_weights(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = train(base, tmp_path / "adapter", **options)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert_is(tmp_path / "merged", model)
    before = load_weights(base)
    assert before.keys() == load_weights(tmp_path / "merged").keys()
    assert (tmp_path / "merged" / "config.json").read_text() == (base / "config.json").read_text()
    question = [{"role": "user", "content": "Hi"}]
    rendered = [
        load_processor(str(folder)).apply_chat_template(question)
        for folder in (base, tmp_path / "merged")
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize("family", ["qwen3_moe", "tied"])
def test_bases_whose_files_differ_from_their_modules(tmp_path: Path, family: str) -> None:
    """A mixture's experts are one by one on disk, and a tied head is not there at all."""
    changes = {"llm_config.tie_word_embeddings": family == "tied"}
    family = "qwen3" if family == "tied" else family
    make_published(tmp_path / "chat", family, changes=changes)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    model = train(tmp_path / "hf", tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert_is(tmp_path / "merged", model)
    before = load_weights(tmp_path / "hf")
    assert before.keys() == load_weights(tmp_path / "merged").keys()


def test_adapters_follow_one_another_and_go_back_to_the_published_layout(
    base: Path, tmp_path: Path
) -> None:
    train(base, tmp_path / "first")
    merge_adapter(tmp_path / "first", tmp_path / "one", progress=False)
    model = train(tmp_path / "one", tmp_path / "second", seed=1)
    merge_adapter(tmp_path / "second", tmp_path / "two", progress=False)
    assert_is(tmp_path / "two", model)
    # what the first conversion kept has come along
    convert(tmp_path / "two", tmp_path / "chat", to="chat", progress=False)
    published = base.parent / "chat"
    assert (tmp_path / "chat" / "config.json").read_text() == (
        published / "config.json"
    ).read_text()
    before, after = load_weights(published), load_weights(tmp_path / "chat")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"language_model.model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }


def test_a_bfloat16_base_is_rounded_once(base: Path, tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "qwen3", dtype=torch.bfloat16)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    model = train(tmp_path / "hf", tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    loaded = dict(load_model(tmp_path / "merged", dtype="bfloat16").named_parameters())
    for name, weight in full_weights(model):  # held in float32
        assert torch.equal(loaded[name], weight.to(torch.bfloat16)), name
    assert all(
        tensor.dtype == torch.bfloat16 for tensor in load_weights(tmp_path / "merged").values()
    )


def test_another_base_is_given_by_hand(base: Path, tmp_path: Path) -> None:
    model = train(base, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "elsewhere"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"its base 'elsewhere' is no folder here.*--base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base, progress=False)
    assert_is(tmp_path / "merged", model)
    with pytest.raises(UserError, match=r"is not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base, progress=False)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of what is refused here
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, r"use_dora is true, and cannot be merged"),
        ({"lora_bias": True}, r"lora_bias is true, and cannot be merged"),
    ],
)
def test_adapters_that_cannot_be_merged(
    base: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    train(base, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=match):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_what_is_no_adapter_of_that_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config.json there"):
        merge_adapter(base, tmp_path / "merged", progress=False)
    other = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(load_model(base), other).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(UserError, match=r"peft_type is 'IA3'; only LORA can be read"):
        merge_adapter(tmp_path / "ia3", tmp_path / "merged", progress=False)
    train(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"published custom-code layout .*convert it first"):
        merge_adapter(
            tmp_path / "adapter", tmp_path / "merged", base=base.parent / "chat", progress=False
        )
    # another model: more layers than the adapter has, and of another width
    for name, changes in {
        "deeper": {"llm_config.num_hidden_layers": 3},
        "wider": {"llm_config.intermediate_size": 96},
    }.items():
        make_published(tmp_path / name, "qwen3", changes=changes)
        convert(tmp_path / name, tmp_path / f"{name}-hf", to="hf", progress=False)
        with pytest.raises(UserError, match=rf"adapter: does not fit .*{name}-hf"):
            merge_adapter(
                tmp_path / "adapter",
                tmp_path / "merged",
                base=tmp_path / f"{name}-hf",
                progress=False,
            )
        shutil.rmtree(tmp_path / f"{name}-hf")
    assert not (tmp_path / "merged").exists()
