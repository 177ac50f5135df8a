"""What a converted processor makes of a conversation: the published prompt, token for token.

The literal prompts are what `Conversation.get_prompt` of the published conversation.py builds from
the same turns; ids are judged by transformers' own tokenizer class on the published files, and for
InternLM2 by sentencepiece itself.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published import FAMILIES, make_published
from published_tokenizers import TEXTS

from internvl.chat import encode_prompt, load_processor
from internvl.conversion.convert import convert
from internvl.conversion.internlm2 import fast_tokenizer
from internvl.conversion.processors import load_tokenizer
from internvl.errors import UserError

SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的"
    "人工智能助手。"
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
# system + question + answer + question, as each template writes them
PROMPTS = {
    "internvl2_5": (
        f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n"
        "<|im_start|>user\n<image>\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\nSeven.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "internlm2-chat": (
        f"<|im_start|>system\n{SYSTEM_2}<|im_end|><|im_start|>user\n<image>\nHow many?<|im_end|>"
        "<|im_start|>assistant\nSeven.<|im_end|><|im_start|>user\nSure?<|im_end|>"
        "<|im_start|>assistant\n"
    ),
}
PROMPTS["Hermes-2"] = PROMPTS["internlm2-chat"]
BOS = {"internlm2": "<s>", "llama": "<|begin_of_text|>"}

Tokenize = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every family, published and converted; not to be written to."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for family in FAMILIES:
        made[family] = (root / family, root / f"{family}-hf")
        make_published(made[family][0], family)
        convert(*made[family], to="hf", progress=False)
    return made


def published_tokenizer(folder: Path, scratch: Path) -> Tokenize:
    """Text to ids as the published code does it: with the bos token where there is one."""
    if (folder / "tokenizer.model").exists():
        return sentencepiece_tokenizer(folder)
    from transformers import AutoTokenizer

    scratch.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (folder / name).exists():
            shutil.copy(folder / name, scratch)
    tokenizer: Any = AutoTokenizer.from_pretrained(scratch)
    return lambda text: list(tokenizer(text)["input_ids"])


def sentencepiece_tokenizer(folder: Path) -> Tokenize:
    """InternLM2's: special tokens first, what is between them by sentencepiece."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {
        entry["content"]: int(index) for index, entry in settings["added_tokens_decoder"].items()
    }
    longest_first = sorted(added, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def tokenize(text: str) -> list[int]:
        ids = [1]
        for piece in filter(None, pattern.split(text)):
            ids += [added[piece]] if piece in added else model.encode(piece)
        return ids

    return tokenize


def random_texts() -> list[str]:
    """Pieces of the training texts and of everything else, special tokens between them."""
    rng = random.Random(0)  # of the standard library: text, not numbers
    words = [
        *" ".join(TEXTS).split(" "),
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "😀",
        "é",
        "\u3000",
        "żółw",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<|im_end|>",
        "[UNUSED_TOKEN_5]",
        "\x00",
    ]
    return [
        "".join(rng.choice(words) + rng.choice(["", " ", "\n"]) for _ in range(12))
        for _ in range(200)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_published_tokenizers(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    chat, hf = folders[family]
    published = published_tokenizer(chat, tmp_path / "tokenizer")
    tokenizer: Any = load_processor(str(hf)).tokenizer
    bos = tokenizer(BOS[family])["input_ids"] if family in BOS else []
    assert len(bos) == (family in BOS)
    for text in [*TEXTS, *random_texts()]:
        ids = tokenizer(text)["input_ids"]
        assert bos + ids == published(text), repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_published_ones(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    chat, hf = folders[family]
    literal = PROMPTS[FAMILIES[family].template]
    bos = BOS.get(family, "")
    processor = load_processor(str(hf))
    image, text = {"type": "image"}, {"type": "text", "text": "How many?"}
    turns = [
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert rendered == bos + literal.replace("<image>", "<IMG_CONTEXT>")
    # a system prompt of the user's own stands where the published code's would
    own = [{"role": "system", "content": "Think first."}, turns[2]]
    system = SYSTEM_2_5 if SYSTEM_2_5 in literal else SYSTEM_2
    opening = literal[: literal.index("user\n")].replace(system, "Think first.")
    ending = literal[literal.rindex("<|im_end|>") :]
    rendered = processor.apply_chat_template(own, add_generation_prompt=True)
    assert rendered == f"{bos}{opening}user\nSure?{ending}"
    # ids: the published code's, where each image is <img>, 4 tokens a tile, </img>
    published = published_tokenizer(chat, tmp_path / "tokenizer")
    prompt = encode_prompt(processor, "<image>\nHow many?", [Image.new("RGB", (112, 56))], 6)
    expanded = "<img>" + "<IMG_CONTEXT>" * 12 + "</img>"
    single = literal[: literal.index("Seven.")].replace("<image>", expanded)
    assert prompt.ids == published(single)
    assert prompt.tiles.shape == (3, 3, 56, 56)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_model_may_put_a_space_before_a_text(tmp_path: Path, prefix: bool) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=[] if prefix else ["[UNUSED_0]", "\t\t", "\u2581\u2581"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.getvalue())
    judge = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = fast_tokenizer(file, {})
    for text in ["a", " a", "  two  spaces  ", "\t\tx [UNUSED_0]", *TEXTS]:
        assert tokenizer.encode(text).ids == judge.encode(text), repr(text)
    if prefix:  # LLaMA's newer setting: the first text alone would get its space
        with pytest.raises(UserError, match="puts a space before a text, but not with legacy"):
            fast_tokenizer(file, {}, legacy=False)


def test_a_llama_tokenizer_of_sentencepiece_alone(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """As in InternVL2-40B: its ids are SentencePiece's, as with transformers 4's own class."""
    chat = folders["internlm2"][0]
    shutil.copy(chat / "tokenizer.model", tmp_path)
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, bos = load_tokenizer(tmp_path)
    published = sentencepiece_tokenizer(chat)
    assert bos == ""
    for text in [*TEXTS, *random_texts()]:
        assert [1, *tokenizer(text)["input_ids"]] == published(text), repr(text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model_type": "unigram"}, r"is no BPE model"),
        ({"byte_fallback": False}, r"has no byte fallback"),
        ({"normalization_rule_name": "nfkc"}, r"normalises text \(nfkc\)"),
        ({"remove_extra_whitespaces": True}, r"removes extra spaces"),
        (
            {"add_dummy_prefix": True, "user_defined_symbols": ["[UNUSED_0]"]},
            r"has symbols of its own and puts a space before a text",
        ),
    ],
)
def test_sentencepiece_models_of_another_kind(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    import sentencepiece

    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **options,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=match):
        fast_tokenizer(tmp_path / "tokenizer.model", {})
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"is no SentencePiece model"):
        fast_tokenizer(tmp_path / "tokenizer.model", {})


def test_sentencepiece_missing_is_said_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_published(tmp_path / "chat", "internlm2")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'internvl-posttraining\[internlm2\]'"):
        convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)


def test_a_tokenizer_model_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.model: cannot be read: No such file"):
        fast_tokenizer(tmp_path / "tokenizer.model", {})


def test_a_config_may_bring_its_own_system_message(tmp_path: Path) -> None:
    message = "It's a 'test' \\ of\nquotes."
    make_published(tmp_path / "chat", "qwen2", changes={"system_message": message})
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    processor = load_processor(str(tmp_path / "hf"))
    rendered = processor.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert rendered.startswith(f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n")


def test_settings_of_the_processor_come_from_the_config(tmp_path: Path) -> None:
    changes = {"min_dynamic_patch": 2, "max_dynamic_patch": 9}
    make_published(tmp_path / "chat", "internlm2", changes=changes)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    processor: Any = load_processor(str(tmp_path / "hf"))
    images, videos, tokenizer = (
        processor.image_processor,
        processor.video_processor,
        processor.tokenizer,
    )
    assert (images.min_patches, images.max_patches, images.crop_to_patches) == (2, 9, True)
    for part in (images, videos):
        assert dict(part.size) == {"height": 56, "width": 56}
        assert list(part.image_mean) == [0.485, 0.456, 0.406]
        assert list(part.image_std) == [0.229, 0.224, 0.225]
    assert type(images).__name__ == "GotOcr2ImageProcessor"
    assert type(videos).__name__ == "InternVLVideoProcessor"
    assert (processor.image_seq_length, tokenizer.padding_side) == (4, "left")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "</s>",
        "<s>",
    )
    assert (processor.start_image_token, processor.end_image_token) == ("<img>", "</img>")
    assert (processor.image_token, processor.video_token) == ("<IMG_CONTEXT>", "<video>")
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == config["text_config"]["eos_token_id"] == tokenizer.eos_token_id
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
