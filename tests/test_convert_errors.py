"""What cannot be converted is refused by name, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from published import load_weights, make_published, save_weights

from internvl.conversion.convert import convert
from internvl.errors import UserError


def refused(tmp_path: Path, match: str, *, to: Any = "hf", source: str = "chat") -> None:
    """The conversion is refused with a message that matches, and there is no folder."""
    with pytest.raises(UserError, match=match):
        convert(tmp_path / source, tmp_path / "out", to=to, progress=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("ps_version", "v1", r"ps_version is 'v1': only 'v2' can be converted"),
        ("select_layer", -4, r"select_layer is -4: only -1"),
        ("use_thumbnail", False, r"use_thumbnail is False: only True"),
        ("dynamic_image_size", False, r"dynamic_image_size is False: only True"),
        ("pad2square", True, r"pad2square is True: only False"),
        ("use_llm_lora", 16, r"use_llm_lora is 16: only 0 .*merge it"),
        ("use_backbone_lora", 8, r"use_backbone_lora is 8: only 0"),
        ("force_image_size", 112, r"force_image_size is 112: vision_config.image_size is 56"),
        ("downsample_ratio", 0.4, r"downsample_ratio is 0.4: expected one over a whole number"),
        ("max_dynamic_patch", 0, r"min_dynamic_patch, max_dynamic_patch is \(1, 0\)"),
        ("template", "phi3-chat", r"template is 'phi3-chat'; these can be converted: internvl2_5"),
        ("template", "internvl2_5_gpt_oss", r"template is 'internvl2_5_gpt_oss'"),
        ("torch_dtype", "int8", r"torch_dtype is 'int8': expected one of float32"),
        ("quantization_config", {"quant_method": "awq"}, r"quantization_config is .*'awq'"),
        ("llm_config", None, r"llm_config is None"),
        ("llm_config.architectures", ["Phi3ForCausalLM"], r"architectures is 'Phi3ForCausalLM'"),
        ("llm_config.architectures", ["GptOssForCausalLM"], r"is 'GptOssForCausalLM'.*InternLM2"),
        ("llm_config.rope_scaling", {"type": "su"}, r"rope_scaling is \{'type': 'su'\}: its type"),
        (
            "llm_config.hidden_size",
            64,
            r"tensor 'mlp1.1.weight' is \(128, 256\), config.json makes it \(64, 256\)",
        ),
        ("llm_config.num_hidden_layers", 3, r"tensor '.*layers.2.* is missing \(and \d+ more"),
        ("llm_config.num_hidden_layers", 1, r"tensor '.*layers.1.* has no place in the other"),
        ("llm_config.vocab_size", 300, r"token '<IMG_CONTEXT>' has id 325, .*vocab_size is 300"),
        ("vision_config.dropout", 0.1, r"vision_config.dropout is 0.1"),
        ("vision_config.norm_type", "batch_norm", r"vision_config.norm_type is 'batch_norm'"),
        ("vision_config.image_size", 84, r"force_image_size is 56: vision_config.image_size is 84"),
        ("vision_config.image_size", 42, r"vision_config.image_size is 42: no whole number"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, key: str, value: Any, match: str) -> None:
    make_published(tmp_path / "chat", "qwen2")
    change(tmp_path / "chat", key, value)
    refused(tmp_path, match)


def change(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    part, _, leaf = key.rpartition(".")
    (config[part] if part else config)[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_v2pe_checkpoint_keeps_its_step(tmp_path: Path) -> None:
    changes = {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": 64}
    make_published(tmp_path / "chat", "qwen2", changes=changes)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["position_step"] == 0.25
    change(tmp_path / "chat", "rope_pos_id_stride", 100)
    refused(tmp_path, r"rope_pos_id_stride is 100: expected 256, 128")
    change(tmp_path / "chat", "rope_pos_id_version", "v2pe_rnd")
    refused(tmp_path, r"rope_pos_id_version is 'v2pe_rnd': only 'v2pe_fix'")


def test_what_only_some_models_have_is_refused_by_name(tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "vit6b", changes={"vision_config.layer_norm_eps": 1e-5})
    refused(tmp_path, r"vision_config.layer_norm_eps is 1e-05: with qk_normalization only 1e-06")
    yarn = {"type": "yarn", "factor": 4.0}
    make_published(tmp_path / "lm2", "internlm2", changes={"llm_config.rope_scaling": yarn})
    refused(tmp_path, r"rope_scaling is \{'type': 'yarn'.*linear, dynamic", source="lm2")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("position_step", 0.25, r"position_step is 0.25: the published code"),
        ("projector_hidden_act", "relu", r"projector_hidden_act is 'relu'"),
        ("vision_feature_layer", -2, r"vision_feature_layer is -2"),
        ("vision_feature_select_strategy", "full", r"vision_feature_select_strategy is 'full'"),
        ("vision_config.projection_dropout", 0.1, r"vision_config.projection_dropout is 0.1"),
        (
            "vision_config.image_size",
            [56, 28],
            r"vision_config.image_size is \[56, 28\]: the .* squares",
        ),
    ],
)
def test_what_the_published_layout_has_no_place_for(
    tmp_path: Path, key: str, value: Any, match: str
) -> None:
    make_published(tmp_path / "chat", "qwen3")
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    change(tmp_path / "hf", key, value)
    refused(tmp_path, r"was changed since the conversion", to="chat", source="hf")
    (tmp_path / "hf" / "original").rename(tmp_path / "elsewhere")
    refused(tmp_path, match, to="chat", source="hf")


def test_pixels_that_the_published_code_would_not_make(tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "qwen3")
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    (tmp_path / "hf" / "original").rename(tmp_path / "elsewhere")
    file = tmp_path / "hf" / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(settings))
    refused(tmp_path, r"image_mean is \[0.5, 0.5, 0.5\]; the published", to="chat", source="hf")


def test_an_unknown_chat_template_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_published(tmp_path / "chat", "qwen3")
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    (tmp_path / "hf" / "original").rename(tmp_path / "elsewhere")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    convert(tmp_path / "hf", tmp_path / "out", to="chat", progress=False)
    said = capsys.readouterr().err
    assert "the chat template is none of the published ones; config.json says 'internvl2_5'" in said
    assert "put configuration_*.py, modeling_*.py and conversation.py" in said


def test_folders_that_are_no_source(tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "qwen2")
    refused(tmp_path, r"is in the published custom-code layout already", to="chat")
    refused(tmp_path, r"layout 'hff' is not one of hf, chat", to="hff")
    refused(tmp_path, r"no config.json there", source="nothing")
    (tmp_path / "chat" / "tokenizer_config.json").rename(tmp_path / "elsewhere")
    refused(tmp_path, r"tokenizer_config.json: cannot be read")
    settings = json.loads((tmp_path / "elsewhere").read_text())
    settings["tokenizer_class"] = "MyTokenizer"
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(tmp_path, r"tokenizer_class is 'MyTokenizer', which needs remote code")


# ------------------------------------------------------------------------------------ weights


def as_pickles(folder: Path) -> None:
    """pytorch_model-*.bin with an index, instead of safetensors."""
    tensors = load_weights(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names, weight_map = list(tensors), {}
    for number in (0, 1):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        part = {name: tensors[name] for name in names[number::2]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_pickles_are_read_only_when_asked_for_and_as_tensors(tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "internlm2")
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    as_pickles(tmp_path / "chat")
    refused(tmp_path, r"pytorch_model-00001-of-00002.bin is a pickle.*--allow-pickle")
    out = tmp_path / "from-pickles"
    convert(tmp_path / "chat", out, to="hf", allow_pickle=True, progress=False)
    expected, found = load_weights(tmp_path / "hf"), load_weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("was-run", "w"))


def test_a_pickle_that_would_run_code_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_published(tmp_path / "chat", "qwen2")
    for file in (tmp_path / "chat").glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": Evil()}, tmp_path / "chat" / "pytorch_model.bin")
    for content in (None, pickle.dumps(Evil())):
        if content is not None:
            (tmp_path / "chat" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read as tensors only"):
            convert(tmp_path / "chat", tmp_path / "out", to="hf", allow_pickle=True, progress=False)
    assert not (tmp_path / "was-run").exists()


def test_weights_that_are_not_whole(tmp_path: Path) -> None:
    config = make_published(tmp_path / "chat", "qwen2")
    first, second = sorted((tmp_path / "chat").glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    refused(tmp_path, rf"{second.name}: was cut: tensor '.*' ends at byte")
    second.write_bytes(whole[:5])
    refused(tmp_path, rf"{second.name}: is no safetensors file, or was cut \(5 bytes\)")
    second.write_bytes((20).to_bytes(8, "little") + b"x" * 30)
    refused(tmp_path, rf"{second.name}: its header is no JSON")
    entry = {"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 7]}}
    text = json.dumps(entry).encode()
    second.write_bytes(len(text).to_bytes(8, "little") + text + b"0" * 7)
    refused(tmp_path, rf"{second.name}: tensor 'a' has 7 bytes for")
    entry["a"]["dtype"] = "F8_E4M3"
    text = json.dumps(entry).encode()
    second.write_bytes(len(text).to_bytes(8, "little") + text + b"0" * 7)
    refused(tmp_path, r"tensor 'a' has dtype F8_E4M3; quantized weights")
    second.unlink()
    refused(tmp_path, rf"{second.name}, which model.safetensors.index.json names, is not there")
    (tmp_path / "chat" / "model.safetensors.index.json").unlink()
    refused(tmp_path, r"no weights there")
    first.unlink()
    tensors = {name: torch.zeros(1) for name in ("language_model.a", "b")}
    save_weights(tmp_path / "chat", tensors, 1)
    assert config["model_type"] == "internvl_chat"
    refused(tmp_path, r"is missing \(and \d+ more")
