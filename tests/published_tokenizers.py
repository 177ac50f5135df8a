"""Small tokenizers of each real kind, as the published folders hold them.

Each function writes a folder's tokenizer files and returns how many tokens there are.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

INTERNVL_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)
TEXTS = [
    "How many bars are red? The red bar is 7 and the blue one is 12.",
    "system user assistant\n<image>\nWhat is shown in the chart?  Two   spaces and\ttabs.",
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室联合开发的多模态大语言模型。",
    "Answer: \\boxed{42}. x = 3 + 4; def f(x): return x ** 2",
]


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _byte_level_bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _added(first: int, tokens: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder of tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(first + index): {"content": token, "special": True, **flags}
        for index, token in enumerate(tokens)
    }


def _qwen2_tokenizer(folder: Path) -> int:
    """vocab.json, merges.txt and added tokens, without tokenizer.json, as in InternVL 2.5 and 3."""
    tokenizer = _byte_level_bpe()
    tokenizer.model.save(str(folder))
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *INTERNVL_TOKENS)
    first = tokenizer.get_vocab_size()
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": _added(first, tokens),
        "additional_special_tokens": list(tokens[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
    added = {token: first + index for index, token in enumerate(tokens)}
    write_json(folder / "added_tokens.json", added)
    return first + len(tokens)


def _llama_tokenizer(folder: Path) -> int:
    """tokenizer.json that puts a bos token before every text, as in InternVL 2-76B."""
    from tokenizers import AddedToken, processors

    tokenizer = _byte_level_bpe()
    tokens = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*tokens, *INTERNVL_TOKENS)]
    )
    bos = tokens[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": bos,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|end_of_text|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    return int(tokenizer.get_vocab_size())


def _qwen3_tokenizer(folder: Path) -> int:
    """The same tokens with tokenizer.json beside the other files, as in InternVL 3.5."""
    from tokenizers import AddedToken

    size = _qwen2_tokenizer(folder)
    tokenizer = _byte_level_bpe()
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *INTERNVL_TOKENS)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return size


INTERNLM2_CHAT_TOKENS = ("<|plugin|>", "<|action_end|>", "<|im_end|>", "<|im_start|>")


def _internlm2_tokenizer(folder: Path) -> int:
    """A SentencePiece model whose last pieces are taken over by chat tokens, as published."""
    import sentencepiece

    model = io.BytesIO()
    unused = [f"[UNUSED_TOKEN_{index}]" for index in range(6)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=unused,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = pieces.get_piece_size()
    taken = [pieces.piece_to_id(piece) for piece in unused[: len(INTERNLM2_CHAT_TOKENS)]]
    ids = dict(zip(INTERNLM2_CHAT_TOKENS, taken, strict=True))
    ids |= {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids |= {token: size + index for index, token in enumerate(INTERNVL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {
            str(index): {"content": token, "special": True, **flags} for token, index in ids.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 8192,
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "tokenization_internlm2.py").write_text("raise RuntimeError('was run')\n")
    return size + len(INTERNVL_TOKENS)


TOKENIZERS = {
    "Qwen2ForCausalLM": _qwen2_tokenizer,
    "Qwen3ForCausalLM": _qwen3_tokenizer,
    "Qwen3MoeForCausalLM": _qwen3_tokenizer,
    "LlamaForCausalLM": _llama_tokenizer,
    "InternLM2ForCausalLM": _internlm2_tokenizer,
}
