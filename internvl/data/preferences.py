"""TRL's preference rows as pairs: `prompt`, `chosen` and `rejected` as messages or as texts.

    {"prompt": [{"role": "user", "content": [{"type": "image"},
                                             {"type": "text", "text": "How many?"}]}],
     "chosen": [{"role": "assistant", "content": "3"}],
     "rejected": [{"role": "assistant", "content": "4"}], "images": ["a.png"]}
          |
    {"question": "<image>\\nHow many?", "chosen": "3", "rejected": "4", "image": ["a.png"]}

A content is a text or a list of parts. As in TRL (1.16), a row without a prompt shares the messages
at the beginning of its conversations, and pictures that no part names stand in front of the first
user's text; the line break behind a picture is the one that InternVL's chat template writes there.
A prompt that is a text is a user's question. Turns before the last question become `history`, a
system message `system`.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

_IMAGE = "<image>"
_SPEAKERS = {"user": "human", "assistant": "gpt"}
_OF_PREFERENCES = ("prompt", "chosen", "rejected")


def is_preference(record: dict[str, Any]) -> bool:
    """Whether a record is a preference row of TRL's, and no pair of ours."""
    replies = (record.get("chosen"), record.get("rejected"))
    return "question" not in record and (
        "prompt" in record or any(isinstance(reply, list) for reply in replies)
    )


def to_pair(record: dict[str, Any], images: int) -> dict[str, Any]:
    """A preference row as a pair, all other fields kept.

    images: how many the row has in a field of its own. Raises ValueError with what cannot be read.
    """
    if record.get("tools"):
        raise ValueError("field 'tools' is given; a pair with tools is not supported")
    prompt, chosen, rejected = _explicit(*(record.get(name) for name in _OF_PREFERENCES))
    inline: list[Any] = []
    texts = _Texts(inline)
    pair = {name: value for name, value in record.items() if name not in _OF_PREFERENCES}
    turns = [
        (_role(message, number), texts.of(message, f"message {number} of the prompt"))
        for number, message in enumerate(prompt)
    ]
    if turns and turns[0][0] == "system":
        if pair.get("system"):
            raise ValueError("a system message beside the field 'system'; give one of them")
        pair["system"] = turns.pop(0)[1]
    _check_order(turns)
    if inline and images:
        raise ValueError("pictures both in the messages and in a field of their own; give one")
    if inline:
        pair["image"] = inline
    elif images and not any(_IMAGE in text for _, text in turns) and texts.first_is_plain:
        turns[0] = ("user", f"{_IMAGE}\n" * images + turns[0][1])
    if len(turns) > 1:
        pair["history"] = [{"from": _SPEAKERS[role], "value": text} for role, text in turns[:-1]]
    replies = {"chosen": _reply(chosen, "chosen"), "rejected": _reply(rejected, "rejected")}
    return {**pair, "question": turns[-1][1], **replies}


def _explicit(prompt: Any, chosen: Any, rejected: Any) -> tuple[list[Any], Any, Any]:
    """The prompt's messages, and what answers them."""
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list) or value == []:
            shown = "empty" if value == [] else type(value).__name__
            raise ValueError(f"field {name!r} is {shown}, expected a text or messages")
    if isinstance(prompt, list):
        return prompt, chosen, rejected
    lists = [value for value in (chosen, rejected) if isinstance(value, list)]
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"field 'prompt' is {type(prompt).__name__}, expected a text or messages")
    if isinstance(prompt, str) and all(_role(reply[0], 0) == "assistant" for reply in lists):
        return [{"role": "user", "content": prompt}], chosen, rejected
    if len(lists) < 2:
        raise ValueError("no 'prompt', and chosen and rejected are not both messages")
    if chosen == rejected:
        raise ValueError("chosen and rejected are identical")
    # also where a text beside the conversations repeats their question (UltraFeedback)
    same = len(list(takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))))
    return chosen[:same], chosen[same:], rejected[same:]


def _role(message: Any, number: int) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise ValueError(f"message {number} is no object with a role and a content")
    return role


def _check_order(turns: list[tuple[str, str]]) -> None:
    if not turns:
        raise ValueError("the prompt holds no user's message")
    for number, (role, _) in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise ValueError(f"a message of the prompt is from {role!r}, expected {wanted!r}")
    if len(turns) % 2 == 0:
        raise ValueError("the prompt ends with the assistant's message, expected the user's")


def _reply(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 1 or _role(value[0], 0) != "assistant":
        roles = ", ".join(_role(message, number) for number, message in enumerate(value))
        raise ValueError(
            f"{name} answers the prompt with messages from {roles or 'nobody'}, expected one from "
            "'assistant'"
        )
    return _Texts(None).of(value[0], name)


class _Texts:
    """Messages' contents as texts. images: takes up the pictures that parts carry (None: none may).

    first_is_plain: whether the first user's content was a text.
    """

    def __init__(self, images: list[Any] | None):
        self._images = images
        self._users = 0
        self.first_is_plain = False

    def of(self, message: dict[str, Any], name: str) -> str:
        """A message's text, "<image>" and a line break for each picture among its parts."""
        content, role = message.get("content"), message["role"]
        if message.get("tool_calls"):
            raise ValueError(f"{name} calls tools, which is not supported")
        if role == "user":
            self._users += 1
            self.first_is_plain |= self._users == 1 and isinstance(content, str)
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise ValueError(
                f"the content of {name} is {type(content).__name__}, expected a text or parts"
            )
        return "".join(self._part(part, name, role) for part in content)

    def _part(self, part: Any, name: str, role: str) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if role == "user" and _IMAGE in part["text"]:
                raise ValueError(
                    f"a text part of {name} holds {_IMAGE}; in parts a picture is one of its own, "
                    '{"type": "image"}'
                )
            return str(part["text"])
        if kind != "image" or role != "user" or self._images is None:
            raise ValueError(f"{name} holds a part of type {kind!r}, which cannot be there")
        own = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        self._images.extend(own[:1])
        return f"{_IMAGE}\n"
