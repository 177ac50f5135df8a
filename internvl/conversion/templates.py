"""The published conversation templates, as the chat template of an HF-native processor.

The published code puts a default system message before the first question, and the model was
trained with it, so the chat template does so too wherever the messages bring no system prompt of
their own. Facts from the published conversation.py:

    name            turn ends with      default system message
    internvl2_5     <|im_end|>\\n        "... 书生·万象 ..."            InternVL 2.5, 3, 3.5
    internlm2-chat  <|im_end|>          "... 书生多模态大模型 ..."       InternVL 1.5, 2 (InternLM2)
    Hermes-2        <|im_end|>          the same                        InternVL 2 (Qwen2, LLaMA)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from internvl.errors import UserError

START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
IMAGE_CONTEXT, VIDEO = "<IMG_CONTEXT>", "<video>"

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Conversation:
    """A published template: what ends each turn, and the system message when none is given."""

    separator: str
    system_message: str


CONVERSATIONS = {
    "internvl2_5": Conversation(END_OF_TURN + "\n", _SYSTEM_2_5),
    "internlm2-chat": Conversation(END_OF_TURN, _SYSTEM_2),
    "Hermes-2": Conversation(END_OF_TURN, _SYSTEM_2),
}
# what a model that never was in the published layout is said to speak
DEFAULT_CONVERSATION = "internvl2_5"


def conversation(template: object, system_message: object = None) -> Conversation:
    """The published conversation `template`, with config.json's own system message if it has one.

    Raises `UserError` for a template that is not one of the three.
    """
    found = CONVERSATIONS.get(template) if isinstance(template, str) else None
    if found is None:
        known = ", ".join(CONVERSATIONS)
        raise UserError(
            f"config.json: template is {template!r}; these can be converted: {known}. Another one "
            "would need its own chat template"
        )
    if isinstance(system_message, str):
        return Conversation(found.separator, system_message)
    return found


def chat_template(conversation: Conversation, *, bos: str) -> str:
    """The Jinja template of a conversation; `bos` is written before everything (may be empty).

    An image is one <IMG_CONTEXT> and a newline, which the processor expands, as "<image>\\n" in
    the published prompts.
    """
    end, system = _quoted(conversation.separator), _quoted(conversation.system_message)
    return (
        f"{{{{ {_quoted(bos)} }}}}"
        "{% if messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\\n' + {system} + {end} }}}}"
        "{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for content in message['content'] %}"
        f"{{% if content['type'] == 'image' %}}{{{{ '{IMAGE_CONTEXT}\\n' }}}}"
        f"{{% elif content['type'] == 'video' %}}{{{{ '{VIDEO}\\n' }}}}"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        f"{{{{ {end} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def with_bos(text: str, bos: str) -> str:
    """A chat template with another bos token (or none) before everything, as ours write it.

    >>> with_bos("{{ '<s>' }}{{ 'Hello' }}{{ x }}", "<b>")
    "{{ '<b>' }}{{ 'Hello' }}{{ x }}"
    """
    # our own templates begin with a string and then a condition: see `chat_template`
    body = re.sub(r"\A\{\{ '(?:[^'\\]|\\.)*' \}\}", "", text)
    return text if body == text and not bos else f"{{{{ {_quoted(bos)} }}}}{body}"


def template_name(text: str) -> str | None:
    """The published template that a chat template is, by its text; None for any other.

    A leading bos token does not count: in the published layout it is the tokenizer's.
    """
    for name, known in CONVERSATIONS.items():
        body = chat_template(known, bos="").removeprefix("{{ '' }}")
        if text.endswith(body):
            return name
    return None


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
