"""JSON in a model's reply, which is seldom all that it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_START = re.compile(r'\{\s*["}]')
_MOST_STARTS = 300  # the last ones: a reply of brackets alone must not take for ever


def objects_in(reply: str) -> Iterator[dict[str, Any]]:
    r"""The JSON objects in a reply, in order; one that holds a key twice is none.

    Code fences, words around an object and a <think> block before it are passed over.

    >>> list(objects_in('<think>{"score": 1}</think>Here: ```json\n{"score": 8}\n```'))
    [{'score': 8}]
    """
    text = reply.rpartition("</think>")[2]
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    for match in [*_START.finditer(text)][-_MOST_STARTS:]:
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("a key comes twice")
    return dict(pairs)
