"""Where a reply is cut: between words of any script, between its tokens, as near as can be."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.chat import load_processor
from mmpr.cutting import cut_reply, word_boundaries


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Any:
    """Its tokenizer is byte-level: what is no known word falls apart into bytes."""
    return load_processor(str(tiny_model))


def encode(processor: Any, text: str) -> list[int]:
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "ratio", "prefix"),
    [
        ("The red bar is 5", 0.6, "The red"),
        ("The red bar is 5", 0.9, "The red bar is"),
        ("zzzzzz red", 0.3, "zzzzzz"),  # a word of six tokens: its end comes after the ratio
        ("红色的柱子最高。", 0.5, "红色的柱"),
        ("答案是3.14159。", 0.6, "答案是"),
        ("一👨\u200d👩\u200d👧二三四五六", 0.2, "一"),
        ("café\u0301s sont là", 0.45, "café\u0301s"),
    ],
)
def test_a_reply_is_cut_between_words(processor: Any, text: str, ratio: float, prefix: str) -> None:
    ids = encode(processor, text)
    cut = cut_reply(ids, text, ratio, processor.tokenizer.decode)
    assert cut is not None and cut.prefix == prefix
    assert processor.tokenizer.decode(ids[: cut.tokens]) == prefix


@pytest.mark.parametrize(
    "text", ["", "word", "  word  ", "3.14159", "👨\u200d👩\u200d👧", "红 ", "\n\n"]
)
def test_what_is_one_word_cannot_be_cut(processor: Any, text: str) -> None:
    ids = encode(processor, text)
    assert cut_reply(ids, text, 0.5, processor.tokenizer.decode) is None


PIECES = st.sampled_from(
    [
        *(*"红色柱子的，。！", "The", " red", " bar", "it's", " 3.14", "-5", "1,000", " ", "\n"),
        *("Ω", "ß", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "e\u0301", "한국", "かな", "हिन्दी"),
        *("\\frac", "{1}", "<think>", "."),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)


@given(text=TEXTS, ratio=st.floats(0.01, 0.99))
def test_a_prefix_is_whole_text_for_any_reply(processor: Any, text: str, ratio: float) -> None:
    ids = encode(processor, text)
    if processor.tokenizer.decode(ids) != text:
        return  # the text spells a special token, or is no UTF-8
    cut = cut_reply(ids, text, ratio, processor.tokenizer.decode)
    if cut is None:
        return
    rest = text[len(cut.prefix) :]
    assert 0 < cut.tokens < len(ids) and cut.prefix + rest == text
    assert processor.tokenizer.decode(ids[: cut.tokens]) == cut.prefix
    assert cut.prefix.strip() and rest.strip()
    assert not cut.prefix.endswith("\ufffd")
    assert not re.search(r"[A-Za-z0-9]\Z", cut.prefix) or not re.match(r"[A-Za-z0-9]", rest)
    assert not unicodedata.combining(rest[0]) and rest[0] != "\u200d"
    # nearer to the ratio there is no place: all between it and the cut part a word
    parts = word_boundaries(text)
    for tokens in range(cut.tokens + 1, int(len(ids) * ratio) + 1):
        prefix = processor.tokenizer.decode(ids[:tokens])
        whole = text.startswith(prefix) and not prefix.endswith("\ufffd")
        assert not whole or not parts[len(prefix)] or not text[len(prefix) :].strip()
