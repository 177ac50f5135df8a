"""A tiny InternVL made on the spot: real architecture, own tokenizer and processor, no download.

ViT -> pixel shuffle -> MLP -> Qwen3, as transformers' InternVLForConditionalGeneration, in the
published (HF-native) checkpoint layout, so that AutoModel, AutoProcessor and vLLM load it as they
load a real one. Two choices differ from transformers' defaults, for reasons that were measured:

- weights start at N(0, 0.05) and ViT position embeddings at N(0, 0.3): with the defaults (0.02 and
  zeros) so small a model learns far slower;
- embeddings are not tied: vLLM on a CPU packs a tied lm_head once and never refreshes it, so
  after a weight update it would go on sampling from the old one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.world import DEFAULT_OPTIONS, WorldOptions, example_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import InternVLConfig, InternVLProcessor, PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_CONTEXT, VIDEO = "<IMG_CONTEXT>", "<video>"
# InternVL's own special tokens, in its order.
SPECIAL_TOKENS = (
    *(END_OF_TEXT, IM_START, IM_END, "<img>", "</img>", IMAGE_CONTEXT),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", VIDEO),
)
CHAT_WORDS = ("system", "user", "assistant")
# A number keeps its sign and a word its leading space, so that each is one token.
TOKEN_PATTERN = r" ?-?[0-9]+| ?[^\W\d_]+| ?[^\s\w]+|_+|\s"

# InternVL's template: ChatML, an image as one <IMG_CONTEXT> and a newline.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ImageNet statistics, as published InternVL checkpoints use.
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_tiny_model(
    out: Path, *, seed: int, image_size: int = 56, options: WorldOptions = DEFAULT_OPTIONS
) -> None:
    """Write a random tiny InternVL with its processor to the folder `out`, the same per seed.

    image_size: side of a tile in pixels, a multiple of 28 (patch 14, pixel shuffle by 2); a tile
    is (image_size / 28)^2 image tokens. Raises ValueError for another size. options: of the world
    that it is for, whose words and numbers are a token each.
    """
    import torch
    from transformers import GenerationConfig, InternVLForConditionalGeneration

    if image_size <= 0 or image_size % 28:
        raise ValueError(f"image_size must be a positive multiple of 28, not {image_size}")
    processor = make_processor(image_size, options)
    config = make_config(processor.tokenizer, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        positions = model.model.vision_tower.embeddings.position_embeddings
        torch.nn.init.normal_(positions, std=0.3)
    # said once more at the top, where Trainer looks for them (and warns where they are missing)
    model.config.eos_token_id = config.text_config.eos_token_id
    model.config.pad_token_id = config.text_config.pad_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id, pad_token_id=config.text_config.pad_token_id
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)


def make_config(tokenizer: PreTrainedTokenizerFast, image_size: int) -> InternVLConfig:
    """Return the configuration of a model of 0.67 M parameters, for tiles of image_size pixels."""
    from transformers import InternVLConfig

    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "attention_bias": True,
        "image_size": image_size,
        "patch_size": 14,
        "initializer_range": 0.05,
    }
    text = {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(IM_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    }
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=(image_size // 28) ** 2,
        tie_word_embeddings=False,
        initializer_range=0.05,
        dtype="float32",
    )


def make_processor(image_size: int, options: WorldOptions = DEFAULT_OPTIONS) -> InternVLProcessor:
    """Return an InternVLProcessor (1 to 12 tiles of image_size pixels) with a tiny tokenizer."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    pixels = {
        "size": {"height": image_size, "width": image_size},
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            crop_to_patches=True, min_patches=1, max_patches=12, **pixels
        ),
        tokenizer=make_tokenizer(example_texts(options)),
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=(image_size // 28) ** 2,
        chat_template=CHAT_TEMPLATE,
    )


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in which every word of `texts` is one token.

    There are no merges: a whole word is looked up first (`ignore_merges`), anything else falls
    apart into bytes, so every text can be encoded and comes back unchanged.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_words(texts),
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": IMAGE_CONTEXT,
            "video_token": VIDEO,
        },
    )


def _byte_level_words(texts: Iterable[str]) -> Tokenizer:
    """Return the `tokenizers` object: bytes, then the words in sorted order, then specials."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = {word for text in texts for word in re.findall(TOKEN_PATTERN, text)}
    words.update(CHAT_WORDS)
    spelled = {byte_level.pre_tokenize_str(word)[0][0] for word in words}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + sorted(spelled.difference(alphabet))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer
