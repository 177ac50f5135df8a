"""Very small InternVL checkpoints over each language model that InternVL comes with, or without.

Two layers, 32 wide, random weights, the tiny model's own tokenizer and processor: enough to compare
one way of computing with another, in a fraction of a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

from cascade.tiny import make_config, make_processor

# InternVL2.5, 3 and 3.5 are built on these; a text_config's own keys by family
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},  # as published; the default window is never used
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
    },
    "llama": {"head_dim": 8},
}


CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


def make_llm(
    folder: Path,
    family: str,
    *,
    tokens: tuple[str, ...] = CHAT_TOKENS,
    bos: str | None = None,
    spare: int = 0,
    seed: int = 0,
    **text: Any,
) -> Path:
    """Write a bare causal language model of `family` and its tokenizer to `folder`.

    tokens: special tokens of its tokenizer, beside bytes and an end of text. bos: one more, put
    before every text. spare: rows of the embeddings without a token, as Qwen's have. text: further
    keys of the config.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: at for at, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", *tokens, *([bos] if bos else [])])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token=bos
    )
    own = {**_TEXT, **FAMILIES[family], "vocab_size": len(tokenizer) + spare, **text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**own))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_family(folder: Path, family: str, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint (model and processor) of `family` to `folder` and return the folder.

    text: further keys of the text_config, over the family's own. Tiles are 56 px (4 image tokens).
    """
    processor = make_processor(56)
    tiny = make_config(processor.tokenizer, 56).to_dict()
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = InternVLConfig(
        vision_config={
            **tiny["vision_config"],
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "num_attention_heads": 2,
        },
        text_config={
            **{name: tiny["text_config"][name] for name in kept},
            "model_type": family,
            **_TEXT,
            **FAMILIES[family],
            **text,
        },
        image_token_id=tiny["image_token_id"],
        image_seq_length=4,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
    ids = {name: tiny["text_config"][name] for name in ("eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
