"""HF-native folders as the hub holds them: written by transformers 4.52, not by us."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import load_weights, make_published

from internvl.chat import eos_token_id, load_processor, render_prompt
from internvl.checkpoint import load_model
from internvl.conversion.convert import convert
from internvl.conversion.heads import has_own_head
from internvl.errors import UserError
from internvl.info import read_config
from internvl.sampler import SampleRequest, SamplingConfig, open_sampler

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "end_image_token": "</img>",
    "start_image_token": "<img>",
    "video_token": "<video>",
}


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def old_config(config: dict[str, Any]) -> None:
    """The keys of transformers 4.52: no tie_word_embeddings, rope_scaling with both types."""
    text, vision = config["text_config"], config["vision_config"]
    for key in ("tie_word_embeddings", "eos_token_id", "pad_token_id"):
        config.pop(key, None)
    for part in (config, text, vision):
        part["torch_dtype"] = part.pop("dtype")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    text["_attn_implementation_autoset"] = True
    del text["layer_types"], text["tie_word_embeddings"]
    config["transformers_version"] = "4.52.0.dev0"


def old_processor(folder: Path) -> None:
    """preprocessor_config.json and what was at the top of tokenizer_config.json."""
    config = json.loads((folder / "processor_config.json").read_text())
    images = config["image_processor"] | {"image_processor_type": "GotOcr2ImageProcessorFast"}
    nothing = dict.fromkeys(("crop_size", "device", "do_center_crop", "input_data_format"))
    images |= {"crop_to_patches": False, "max_patches": 12, "resample": 3, **nothing}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    kept = {"image_seq_length": config["image_seq_length"], "processor_class": "InternVLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(kept))
    (folder / "chat_template.jinja").write_text(TEMPLATE)

    def change(settings: dict[str, Any]) -> None:
        del settings["backend"]
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        settings |= {"errors": "replace", "extra_special_tokens": dict(TOKENS), **TOKENS}

    rewrite(folder / "tokenizer_config.json", change)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside `chat`, which it was made of."""
    folder = tmp_path_factory.mktemp("hub")
    make_published(folder / "chat", "qwen2")
    convert(folder / "chat", folder / "hf", to="hf", progress=False)
    shutil.rmtree(folder / "hf" / "original")
    rewrite(folder / "hf" / "config.json", old_config)
    old_processor(folder / "hf")
    return folder / "hf"


def test_processor(hub: Path) -> None:
    processor: Any = load_processor(str(hub))
    assert processor.image_token == "<IMG_CONTEXT>"
    assert processor.tokenizer.convert_ids_to_tokens(eos_token_id(processor)) == "<|im_end|>"
    prompt = "<|im_start|>user\n<IMG_CONTEXT>\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(processor, "<image>\nHi") == prompt


def test_a_head_of_its_own_though_the_config_is_silent(hub: Path, tmp_path: Path) -> None:
    assert read_config(hub)[0].tie_word_embeddings is True  # so transformers 5 reads it
    assert has_own_head(hub)
    model: Any = load_model(hub)
    head = load_weights(hub.parent / "chat")["language_model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(load_weights(tmp_path)["language_model.lm_head.weight"], head)


def test_to_the_published_layout_and_back(hub: Path, tmp_path: Path) -> None:
    convert(hub, tmp_path / "chat", to="chat", progress=False)
    convert(tmp_path / "chat", tmp_path / "back", to="hf", progress=False)
    for one, other in ((hub.parent / "chat", tmp_path / "chat"), (hub, tmp_path / "back")):
        left, right = load_weights(one), load_weights(other)
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["llm_config"]["tie_word_embeddings"] is False
    assert (tmp_path / "back" / "config.json").read_bytes() == (hub / "config.json").read_bytes()


def test_a_tokenizer_that_names_no_video_token(hub: Path, tmp_path: Path) -> None:
    shutil.copytree(hub, tmp_path / "hf")

    def change(settings: dict[str, Any]) -> None:
        del settings["video_token"], settings["extra_special_tokens"]["video_token"]

    rewrite(tmp_path / "hf" / "tokenizer_config.json", change)
    with pytest.raises(UserError, match=r"no attribute video_token; name the token in"):
        load_processor(str(tmp_path / "hf"))


def test_what_a_published_folder_may_leave_out(tmp_path: Path) -> None:
    """InternLM2's configuration class has biases by default; a turn's end may be the padding."""
    make_published(tmp_path / "chat", "internlm2", changes={"llm_config.bias": True})
    rewrite(tmp_path / "chat" / "config.json", lambda config: config["llm_config"].pop("bias"))
    file = tmp_path / "chat" / "tokenizer_config.json"
    rewrite(file, lambda kept: [kept.pop(name) for name in ("pad_token", "eos_token")])
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    assert "language_model.model.layers.0.self_attn.q_proj.bias" in load_weights(tmp_path / "hf")
    assert load_processor(str(tmp_path / "hf")).tokenizer.pad_token == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_takes_the_head_of_a_silent_config(hub: Path) -> None:
    model = load_model(hub)
    request, config = SampleRequest("Which?", (), seed=0), SamplingConfig(max_tokens=8)
    sampled = {}
    for backend in ("transformers", "vllm"):
        sampler = open_sampler(hub, backend=backend, max_model_len=64)
        sampler.update_weights(model.named_parameters())
        [[sampled[backend]]] = sampler.sample([request], config)
        sampler.close()
    ours, theirs = (torch.tensor(one.logprobs) for one in sampled.values())
    assert torch.allclose(ours, theirs, atol=1e-4)
