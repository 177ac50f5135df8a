"""Published checkpoints in and out: nothing is lost, and the same numbers come out.

The judge of names is transformers' own save_pretrained, of numbers `published_forward`, of prompts
the literal text of the published conversation templates.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from published import FAMILIES, load_weights, make_published
from published_forward import published_logits

from internvl.checkpoint import load_model
from internvl.conversion.convert import convert
from internvl.errors import UserError
from internvl.model import plain_attention


def pair(tmp_path: Path, family: str, **options: Any) -> tuple[Path, Path]:
    """A published checkpoint and its HF-native conversion."""
    chat, hf = tmp_path / "chat", tmp_path / "hf"
    make_published(chat, family, **options)
    convert(chat, hf, to="hf", progress=False)
    return chat, hf


def small_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that is not about weights."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and "safetensors" not in path.name
    }


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal names, dtypes, shapes and bytes."""
    left, right = load_weights(one), load_weights(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; "llm_config__x" is key x of llm_config."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, leaf = key.rpartition("__")
        (config[part] if part else config)[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))


# -------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_published_to_hf_and_back_is_equal_to_the_byte(tmp_path: Path, family: str) -> None:
    chat, hf = pair(tmp_path, family, dtype=torch.bfloat16)
    convert(hf, tmp_path / "back", to="chat", progress=False)
    assert_same_weights(chat, tmp_path / "back")
    files = small_files(chat)
    assert small_files(tmp_path / "back") == files
    assert {"config.json", "modeling_internvl_chat.py", "README.md"} < set(files)
    # never run, and kept where nothing looks for code to run
    assert not list(hf.glob("*.py"))
    assert not list((hf / "original").glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_published_and_back_is_equal_to_the_byte(tmp_path: Path, family: str) -> None:
    """A model that never was in the published layout, as training writes it."""
    _, hf = pair(tmp_path, family)
    shutil.rmtree(hf / "original")
    convert(hf, tmp_path / "chat-again", to="chat", progress=False)
    convert(tmp_path / "chat-again", tmp_path / "hf-again", to="hf", progress=False)
    assert_same_weights(hf, tmp_path / "hf-again")
    assert small_files(hf) == small_files(tmp_path / "hf-again")
    # without what was kept, its config.json and tokenizer say the same
    shutil.rmtree(tmp_path / "chat-again" / "original")
    convert(tmp_path / "chat-again", tmp_path / "hf-third", to="hf", progress=False)
    assert_same_weights(hf, tmp_path / "hf-third")
    ours, again = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "hf-third")
    )
    again["text_config"]["bos_token_id"] = ours["text_config"]["bos_token_id"]
    assert ours == again
    template = "chat_template.jinja"
    assert (hf / template).read_text() == (tmp_path / "hf-third" / template).read_text()


def test_the_published_config_of_a_model_that_never_was_one(tmp_path: Path) -> None:
    chat, hf = pair(tmp_path, "qwen3_moe")
    shutil.rmtree(hf / "original")
    convert(hf, tmp_path / "out", to="chat", progress=False)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    published = json.loads((chat / "config.json").read_text())
    for key in set(published) - {"_commit_hash", "system_message", "llm_config", "vision_config"}:
        assert made[key] == published[key], key
    for part in ("llm_config", "vision_config"):
        for key in set(made[part]) & set(published[part]) - {"use_cache", "drop_path_rate"}:
            if not key.endswith("token_id"):
                assert made[part][key] == published[part][key], key
    assert made["llm_config"]["num_experts"] == 4
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == made["llm_config"]["eos_token_id"]
    assert_same_weights(chat, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_save_pretrained(tmp_path: Path, family: str) -> None:
    from transformers import InternVLForConditionalGeneration

    _, hf = pair(tmp_path, family)
    model = InternVLForConditionalGeneration.from_pretrained(hf)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(hf, tmp_path / "saved")
    ours, saved = (
        json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "saved")
    )
    assert ours == saved


def test_shards_and_their_index_are_as_transformers_writes_them(tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "qwen3", shards=1)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = load_weights(tmp_path / "hf")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(tensors)
    assert sorted(set(index["weight_map"].values())) == files
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"] == {"total_parameters": total // 4, "total_size": total}
    load_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", to="chat", progress=False)
    assert_same_weights(tmp_path / "chat", tmp_path / "back")


@pytest.mark.parametrize("family", ["qwen3_moe", "internlm2"])
def test_names_of_the_modules_are_understood_too(tmp_path: Path, family: str) -> None:
    """As a checkpoint for resuming has them: the experts of a mixture in one tensor."""
    from transformers import InternVLForConditionalGeneration

    chat, hf = pair(tmp_path, family)
    model = InternVLForConditionalGeneration.from_pretrained(hf)
    for file in hf.glob("*.safetensors"):
        file.unlink()
    config = (hf / "config.json").read_text()
    model.save_pretrained(hf, save_original_format=False)
    (hf / "config.json").write_text(config)
    assert "model.vision_tower.embeddings.cls_token" in load_weights(hf)
    convert(hf, tmp_path / "back", to="chat", progress=False)
    assert_same_weights(chat, tmp_path / "back")


# ------------------------------------------------------------------------------------ numbers


def largest_difference(chat: Path, hf: Path, length: int = 40) -> float:
    """Of the logits: transformers' on the conversion, a plain forward's on the published.

    In units of the logits' standard deviation, which is about 1 (3 where the head is tied).
    """
    config = json.loads((chat / "config.json").read_text())
    model = load_model(hf).eval()
    image = model.config.image_token_id
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 256, (length,), generator=generator).tolist()
    ids[5:9], ids[15:19] = [image] * 4, [image] * 4
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    expected = published_logits(config, load_weights(chat), ids, pixels, image)
    assert expected.std() > 0.5
    with torch.no_grad(), plain_attention(model):
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
    return float((logits - expected).abs().max() / expected.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_published_layout(tmp_path: Path, family: str) -> None:
    assert largest_difference(*pair(tmp_path, family)) < 1e-5


def test_logits_with_biases_and_a_stretched_rope(tmp_path: Path) -> None:
    changes = {"llm_config.bias": True, "llm_config.max_position_embeddings": 24}
    chat, hf = pair(tmp_path, "internlm2", changes=changes)
    assert largest_difference(chat, hf, length=60) < 1e-5
    convert(hf, tmp_path / "back", to="chat", progress=False)
    assert_same_weights(chat, tmp_path / "back")


# --------------------------------------------------------------------------------- tied heads


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    changes = {"llm_config.tie_word_embeddings": True}
    chat, hf = pair(tmp_path, "qwen3", changes=changes)
    assert "language_model.lm_head.weight" not in load_weights(hf)
    assert largest_difference(chat, hf) < 1e-5
    shutil.copytree(chat, tmp_path / "stored")
    from safetensors.torch import save_file

    tensors = load_weights(chat)
    tensors["language_model.lm_head.weight"] = tensors[
        "language_model.model.embed_tokens.weight"
    ].clone()
    for file in (tmp_path / "stored").glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "stored" / "model.safetensors")
    convert(tmp_path / "stored", tmp_path / "stored-hf", to="hf", progress=False)
    assert_same_weights(hf, tmp_path / "stored-hf")
    convert(tmp_path / "stored-hf", tmp_path / "stored-back", to="chat", progress=False)
    assert_same_weights(tmp_path / "stored", tmp_path / "stored-back")
    tensors["language_model.lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "stored" / "model.safetensors")
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but .*lm_head"):
        convert(tmp_path / "stored", tmp_path / "out", to="hf", progress=False)


# ------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_conversion_holds_no_shard_in_memory(tmp_path: Path) -> None:
    """140 MB in shards of 32 MB, either way: a block or two of at most 16 MiB are held."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    make_published(tmp_path / "chat", "internlm2", shards=1)
    # everything that is loaded once is loaded before the measurement
    convert(tmp_path / "chat", tmp_path / "small", to="hf", progress=False)
    convert(tmp_path / "small", tmp_path / "small-back", to="chat", progress=False)
    edit_config(tmp_path / "chat", llm_config__intermediate_size=45_000)
    hollow_weights(tmp_path / "chat")
    steps: list[tuple[str, str, Literal["hf", "chat"]]] = [
        ("chat", "hf", "hf"),
        ("hf", "back", "chat"),
    ]
    for source, out, to in steps:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        options: dict[str, Any] = {"progress": False, "max_shard_bytes": 32 << 20}
        convert(tmp_path / source, tmp_path / out, to=to, **options)
        peak = status("VmHWM") - before
        files = list((tmp_path / out).glob("*.safetensors"))
        assert len(files) >= 4
        assert sum(file.stat().st_size for file in files) > 130 << 20
        assert peak < 36 << 20, f"{peak / 2**20:.0f} MiB"


def hollow_weights(folder: Path) -> None:
    """One safetensors file with the tensors of config.json, a hole in the disk for its data."""
    from published import tensor_shapes

    config = json.loads((folder / "config.json").read_text())
    header, offset = {}, 0
    for name, shape, _ in tensor_shapes(config):
        size = 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


# ------------------------------------------------------------------------------ whole or not


def test_a_conversion_that_dies_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_published(tmp_path / "chat", "qwen2")
    out = tmp_path / "hf"

    def killed(*_: object, **__: object) -> None:
        # what a kill leaves behind: the partial folder, nothing under the name
        shutil.copytree(tmp_path / ".hf.partial", tmp_path / "left")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("internvl.conversion.shards.write_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "chat", out, to="hf", progress=False)
    assert not out.exists()
    assert not (tmp_path / ".hf.partial").exists()
    os.rename(tmp_path / "left", tmp_path / ".hf.partial")
    (tmp_path / ".hf.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    out.mkdir()  # an empty folder may be there
    convert(tmp_path / "chat", out, to="hf", progress=False)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "hf"]
    with pytest.raises(UserError, match="is not empty"):
        convert(tmp_path / "chat", out, to="hf", progress=False)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    make_published(tmp_path / "chat", "internlm2", shards=1)
    edit_config(
        tmp_path / "chat", llm_config__intermediate_size=100_000, llm_config__num_hidden_layers=8
    )
    hollow_weights(tmp_path / "chat")
    code = (
        "import sys; from internvl.conversion.convert import convert; "
        "convert(sys.argv[1], sys.argv[2], to='hf', progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "chat"), str(tmp_path / "hf")]
    process = subprocess.Popen(command)
    weights = tmp_path / ".hf.partial" / "model.safetensors"
    while process.poll() is None and not weights.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert weights.exists()
    assert not (tmp_path / "hf").exists()
    subprocess.run(command, check=True)
    assert not weights.parent.exists()
    convert(tmp_path / "hf", tmp_path / "back", to="chat", progress=False)
    size = (tmp_path / "chat" / "model.safetensors").stat().st_size
    assert (tmp_path / "back" / "model.safetensors").stat().st_size == pytest.approx(size, abs=8192)


def test_the_bar_counts_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_published(tmp_path / "chat", "qwen2", changes={"new_switch": 3, "off_switch": False})
    convert(tmp_path / "chat", tmp_path / "hf", to="hf")
    total = sum(tensor.nbytes for tensor in load_weights(tmp_path / "hf").values()) / 1e6
    said = capsys.readouterr().err
    assert f"weights: 100%|██████████| {total:.2f}M/{total:.2f}M" in said
    notes = [line for line in said.splitlines() if line.startswith("note:")]
    assert notes == [
        "note: config.json: new_switch is 3, which has no meaning here; it is kept as it is"
    ]


def test_a_changed_config_is_not_overridden_by_what_was_kept(tmp_path: Path) -> None:
    _, hf = pair(tmp_path, "qwen2")
    edit_config(hf, text_config__rms_norm_eps=1e-5)
    with pytest.raises(UserError, match="text_config was changed since the conversion"):
        convert(hf, tmp_path / "back", to="chat", progress=False)
    shutil.rmtree(hf / "original")
    convert(hf, tmp_path / "back", to="chat", progress=False)
    made = json.loads((tmp_path / "back" / "config.json").read_text())
    assert made["llm_config"]["rms_norm_eps"] == 1e-5
