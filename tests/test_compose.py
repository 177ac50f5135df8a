"""`internvl compose`: a bare language model and another's vision tower, as one InternVL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import load_plain
from safetensors.torch import load_file, save_file
from test_internvl_cli import fails
from tiny_llms import make_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from internvl.chat import eos_token_id, load_processor
from internvl.checkpoint import load_model
from internvl.cli import main
from internvl.conversion.compose import check_composition, compose, compose_once
from internvl.conversion.convert import convert
from internvl.errors import UserError
from internvl.parts import PARTS, part_of

ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>")
ADDED = (*ADDED, "<box>", "</box>", "<video>")
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
]


def composed(llm: Path, vision: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    compose(check_composition(llm, vision, **options), out, progress=False)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "given", "text"),
    [
        ("qwen3", {"spare": 4}, {}),  # a few of the added tokens take the spare rows
        ("qwen2", {"spare": 40}, {"tie_word_embeddings": True}),  # all of them do
        ("qwen3_moe", {}, {}),
        ("llama", {"bos": "<|begin_of_text|>"}, {"tie_word_embeddings": True}),
    ],
)
def test_a_language_model_becomes_an_internvl(
    family: str,
    given: dict[str, Any],
    text: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each weight is one of the two's; the added tokens' rows are the mean of the others."""
    llm = make_llm(tmp_path / "llm", family, seed=3, **given, **text)
    out = tmp_path / "out"
    main(["compose", str(llm), str(tiny_model), str(out), "--seed", "5"])
    line = capsys.readouterr().out
    assert f"10 tokens more ({', '.join(ADDED)})" in line
    assert "projector made anew (seed 5)" in line
    tied = bool(text)
    assert ("head tied to the embeddings" if tied else "head of its own") in line
    old, new = load_file(llm / "model.safetensors"), load_file(out / "model.safetensors")
    tower = load_file(tiny_model / "model.safetensors")
    first = len(AutoTokenizer.from_pretrained(llm))
    rows = max(first + 10, first + given.get("spare", 0))
    assert (HEAD in new) is not tied
    for name, weight in new.items():
        if part_of(name) == PARTS[0]:
            assert torch.equal(weight, tower[name])
        elif name in (EMBEDDINGS, HEAD):
            own = old[name.removeprefix("language_model.")]
            assert weight.shape == (rows, 32)
            assert torch.equal(weight[:first], own[:first])
            mean = own[:first].double().mean(0).float()
            torch.testing.assert_close(weight[first : first + 10], mean.expand(10, -1))
            assert torch.equal(weight[first + 10 :], own[first + 10 :])
        elif part_of(name) == PARTS[2]:
            assert torch.equal(weight, old[name.removeprefix("language_model.")])
    assert len([n for n in new if part_of(n) == PARTS[2]]) == len(old)
    # whole: for us strictly, and for transformers alone, where it is the language model still
    model, processor = load_plain(out)
    loaded = load_model(out)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert loaded.config.text_config.tie_word_embeddings is tied
    bare = AutoModelForCausalLM.from_pretrained(llm).eval()
    ids = torch.tensor([[5, 60, 61, 7, 200, 9]])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, bare(input_ids=ids).logits
    torch.testing.assert_close(ours[..., :first], theirs[..., :first])
    # its tokens, the other's template
    tokenizer, bos = processor.tokenizer, given.get("bos", "")
    assert tokenizer.convert_tokens_to_ids(list(ADDED)) == list(range(first, first + 10))
    reference = load_processor(str(tiny_model))
    rendered = reference.apply_chat_template(MESSAGES, tokenize=False)
    assert processor.apply_chat_template(MESSAGES, tokenize=False) == bos + rendered
    assert eos_token_id(processor) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert tokenizer("a b", return_tensors="pt")["input_ids"].shape == (1, 3)  # no bos of its own
    # and in the published layout
    convert(out, tmp_path / "chat", to="chat", progress=False)
    chat = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert chat["llm_config"]["vocab_size"] == rows
    assert chat["llm_config"]["tie_word_embeddings"] is tied


def test_the_same_folders_give_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", "qwen3")
    one = composed(llm, tiny_model, tmp_path / "one", seed=1)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    two = composed(llm, tiny_model, tmp_path / "two", seed=1)
    for name in files:
        again = (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() == again, name
    other = composed(llm, tiny_model, tmp_path / "other", seed=2)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {n for n in two if "multi_modal_projector.linear" in n}
    # made once: what is there is taken as it is, and refused where it was made of something else
    composition = check_composition(llm, tiny_model, seed=1)
    assert not compose_once(composition, tmp_path / "one", progress=False)
    with pytest.raises(UserError, match="was composed of other checkpoints"):
        compose_once(composition, tmp_path / "other", progress=False)


def test_a_projector_of_the_same_width_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    width = json.loads((tiny_model / "config.json").read_text())["text_config"]["hidden_size"]
    llm = make_llm(tmp_path / "llm", "qwen3", hidden_size=width)
    new = composed(llm, tiny_model, tmp_path / "out")
    theirs = load_file(tiny_model / "model.safetensors")
    kept = [name for name in new if part_of(name) == PARTS[1]]
    assert len(kept) == 6 and all(torch.equal(new[name], theirs[name]) for name in kept)
    # an InternVL gives its language model as well, as its own processor, unchanged
    again = composed(tmp_path / "out", tiny_model, tmp_path / "again")
    assert all(torch.equal(again[name], new[name]) for name in new)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_serves_what_was_composed(tiny_model: Path, tmp_path: Path) -> None:
    """The likeliest tokens are those of transformers, with an image, over grown embeddings."""
    pytest.importorskip("vllm")
    from PIL import Image

    from internvl.sampler import SampleRequest, SamplingConfig, open_sampler

    llm = make_llm(tmp_path / "llm", "qwen3", spare=4, head_dim=32)  # vLLM on CPUs has no 16
    composed(llm, tiny_model, tmp_path / "out")
    picture = Image.new("RGB", (112, 56), (9, 90, 200))
    request = SampleRequest("<image>\nWhat?", [picture], seed=0)
    asked = SamplingConfig(n=1, temperature=0.0, max_tokens=12, max_tiles=4)
    said = []
    for backend in ("vllm", "transformers"):
        sampler = open_sampler(tmp_path / "out", backend=backend, max_model_len=512)
        said.append(sampler.sample([request], asked)[0][0].token_ids)
        sampler.close()
    assert said[0] == said[1]


def test_a_tokenizer_without_chatml_gets_it_when_asked(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = make_llm(tmp_path / "llm", "llama", tokens=(), bos="<s>")
    capsys.readouterr()
    error = fails(capsys, "compose", llm, tiny_model, tmp_path / "out")
    assert "its tokenizer has no '<|im_start|>', '<|im_end|>'" in error
    assert "--add-chat-tokens" in error
    assert not (tmp_path / "out").exists()
    composed(llm, tiny_model, tmp_path / "out", add_chat_tokens=True)
    processor = load_processor(str(tmp_path / "out"))
    ids = processor.tokenizer(processor.apply_chat_template(MESSAGES, tokenize=False))["input_ids"]
    first = len(AutoTokenizer.from_pretrained(llm))
    assert ids[0] == processor.tokenizer.bos_token_id and ids.count(first + 1) == 2


def test_a_stored_copy_of_a_tied_head(tiny_model: Path, tmp_path: Path) -> None:
    """Left out where it is the embeddings; refused where it is another and the config says tied."""
    llm = make_llm(tmp_path / "llm", "qwen2", tie_word_embeddings=True)
    weights = load_file(llm / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": rows.clone()}, llm / "model.safetensors")
    assert HEAD not in composed(llm, tiny_model, tmp_path / "out")
    save_file({**weights, "lm_head.weight": rows + 1}, llm / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings is true, but the stored head"):
        composed(llm, tiny_model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_composed_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, in one line; all but the last two before a weight is read."""
    llm = make_llm(tmp_path / "llm", "qwen3")
    capsys.readouterr()

    def error(vision: Path = tiny_model, **changed: Any) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(llm, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        (folder / "model.safetensors").unlink()  # nobody looks
        return fails(capsys, "compose", folder, vision, tmp_path / "out")

    assert "architectures says Qwen3Model; expected" in error(architectures=["Qwen3Model"])
    assert "architectures says nothing" in error(architectures=None)
    assert "says GptOssForCausalLM" in error(architectures=["GptOssForCausalLM"])
    assert "weights are quantized" in error(quantization_config={"quant_method": "awq"})
    assert "dtype is 'int8'" in error(dtype="int8")
    assert "vocab_size 200, but its tokenizer has ids up to 258" in error(vocab_size=200)
    assert "no config.json there" in fails(capsys, "compose", tmp_path, tiny_model, tmp_path / "o")
    assert "model_type is 'qwen3', expected" in error(vision=llm)
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    (plain / "chat_template.jinja").write_text("{% for m in messages %}[INST]{% endfor %}")
    assert "its chat template is not ChatML" in error(vision=plain)
    template = (tiny_model / "chat_template.jinja").read_text()
    (plain / "chat_template.jinja").write_text("{{ pad_token }}" + template + "<|other|>")
    assert "no token" not in error(vision=plain)
    (plain / "chat_template.jinja").write_text(template + "{{ pad_token[:-2] }}")
    words = ("--add-chat-tokens",)
    text = fails(capsys, "compose", tiny_model, tiny_model, tmp_path / "out", *words)
    assert "is an InternVL, which has its tokens" in text
    # by the headers of the weights
    weights = load_file(llm / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, llm / "model.safetensors")
    text = fails(capsys, "compose", llm, tiny_model, tmp_path / "out")
    assert "tensor 'language_model.model.norm.weight' is missing" in text
    assert not (tmp_path / "out").exists()
