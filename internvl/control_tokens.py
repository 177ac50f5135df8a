"""Control tokens: refused where a text spells one, left out where a completion is read.

A template, vLLM and every other engine would take the spelling for the token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from internvl.errors import DataError

if TYPE_CHECKING:
    from transformers import InternVLProcessor

# InternVL's own special tokens that text may hold: a grounding answer's references and boxes
_CONTENT_TOKENS = {"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"}


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer, without those that text may hold."""
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in _CONTENT_TOKENS
    }


@lru_cache(maxsize=8)
def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the spelling of any control token of a tokenizer."""
    longest_first = sorted(_control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def refuse_control_tokens(processor: InternVLProcessor, text: str, name: str) -> None:
    """Raise `DataError` where `text`, the field `name`, spells a control token.

    It would be one: a user could end their own turn, a completion could open an image.
    """
    if found := control_pattern(processor.tokenizer).search(text):
        near = text[max(0, found.start() - 20) : found.end() + 20]
        raise DataError(f"{name} holds the control token {found[0]!r}: {near!r}")


def decode_completion(processor: InternVLProcessor, ids: Sequence[int]) -> str:
    """A completion's text: control tokens left out, `<ref>` and `<box>` kept."""
    tokenizer: Any = processor.tokenizer
    control = set(_control_tokens(tokenizer).values())
    return str(tokenizer.decode([i for i in ids if i not in control], skip_special_tokens=False))
