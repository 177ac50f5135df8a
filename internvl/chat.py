"""From messages with images to token ids, loss mask and image slots: one path for all stages.

    [{"role": "system" | "user" | "assistant" | "tool", "content": text or parts}, ...]
         |  the checkpoint's chat template, one image token an image (what vLLM is given)
         v
    text before a reply | reply | text before the next | ...     encode_messages
         |  image tokens expanded; only the assistant's replies are scored
         v
    Encoded(ids, loss_mask, image_slots)            Prompt: the same for a question, with its tiles

Text is data: where it spells a control token (`<|im_end|>`, `<img>`, ...) it is refused by name,
since the template, vLLM and every other engine would take it for the token. `<ref>`, `<box>` and
`<quad>` are what grounding answers are written with, and stay.

Tiles are cut by internvl.tiling, bit-equal to transformers' image processor, which the engine calls
with the same settings: both see the same pixels. They stay uint8 until `normalize_tiles` does the
rest on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.control_tokens import control_pattern, refuse_control_tokens
from internvl.data import IMAGE_PLACEHOLDER
from internvl.errors import DataError, UserError
from internvl.folders import require_hf_layout
from internvl.tiling import cut_images, processor_tile_size

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import InternVLProcessor


Message = Mapping[str, Any]


@dataclass
class Encoded:
    """Messages as a model reads them.

    ids: token ids, image placeholders expanded. loss_mask: True at the assistant's tokens, the
    end-of-turn token of each reply included. image_slots: where image features go, in order.
    """

    ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_slots: list[int] = field(default_factory=list)


@dataclass
class Prompt:
    """An encoded prompt.

    ids: token ids, image placeholders expanded. tiles: uint8 [X, 3, H, W], all images in order.
    image_slots: where the image features go. tile_counts: tiles of each image. text: what an engine
    is given, with one image token an image.
    """

    ids: list[int]
    tiles: torch.Tensor
    image_slots: list[int]
    tile_counts: list[int]
    text: str


def load_processor(path: str) -> InternVLProcessor:
    """The processor (tokenizer, image processor, chat template) of a checkpoint folder."""
    from transformers import AutoProcessor, InternVLProcessor

    require_hf_layout(Path(path))
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no processor can be loaded from it: {reason}") from None
    except AttributeError as error:  # a tokenizer without one of InternVL's tokens
        raise UserError(
            f"{path}: no processor can be loaded from it: {error}; name the token in "
            'tokenizer_config.json, under extra_special_tokens ("video_token": "<video>")'
        ) from None
    if not isinstance(processor, InternVLProcessor):
        raise UserError(
            f"{path}: its processor is {type(processor).__name__}, expected InternVLProcessor "
            "(a checkpoint in the HF-native layout)"
        )
    return processor


def forbidden_token_ids(processor: InternVLProcessor, vocab_size: int) -> list[int]:
    """Ids that a policy must not sample: an image token in a completion has no image behind it.

    vocab_size: logits of the model. A token that a converter added to the tokenizer alone
    (`<video>`) has an id beyond them, and so cannot be sampled anyway.
    """
    tokenizer: Any = processor.tokenizer
    tokens = [
        processor.image_token,
        processor.video_token,
        tokenizer.start_image_token,
        tokenizer.end_image_token,
    ]
    ids = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return sorted(i for i in ids - {None, tokenizer.unk_token_id} if i < vocab_size)


def eos_token_id(processor: InternVLProcessor) -> int:
    """The id that ends an assistant's turn: of the token that the chat template writes there.

    `<|im_end|>` in InternVL's; some tokenizers (the hub's of InternLM2) call another one their eos.
    """
    return _end_of_turn(processor, str(processor.chat_template))


@lru_cache(maxsize=8)
def _end_of_turn(processor: Any, template: str) -> int:
    """See `eos_token_id`; `template` is the processor's, which a caller may have changed."""
    tokenizer, reply = processor.tokenizer, "A reply."
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}]
    after = str(processor.apply_chat_template(turns, tokenize=False)).rpartition(reply)[2]
    if found := control_pattern(tokenizer).match(after):
        return int(tokenizer.convert_tokens_to_ids(found[0]))
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, so no completion could ever end")
    return int(tokenizer.eos_token_id)


# ---------------------------------------------------------------- messages to text


def _render_content(processor: InternVLProcessor, message: Message, name: str) -> Any:
    """A message's content as the template takes it: checked, a user's "<image>" an image token."""
    content, role = message["content"], message["role"]
    if isinstance(content, str):
        refuse_control_tokens(processor, content, name)
        if role != "user":  # a tool's or the assistant's "<image>" is a word
            return content
        return content.replace(IMAGE_PLACEHOLDER, processor.image_token)
    for part in content:
        if part["type"] == "text":
            refuse_control_tokens(processor, part["text"], name)
        elif part["type"] != "image" or role == "assistant":
            raise DataError(f"{name} holds a part of type {part['type']!r}, which cannot be there")
    return content


def render_messages(
    processor: InternVLProcessor, messages: Sequence[Message], *, generate: bool
) -> str:
    """Messages through the checkpoint's chat template, as text with one image token an image.

    content: a string, where each "<image>" of a user is an image, or a list of parts
    {"type": "image"} and {"type": "text", "text": ...}, where text is text. generate: end with the
    opening of the assistant's turn. A bos token that the tokenizer itself puts before a text is
    written here. Raises `DataError` for text that spells a control token.
    """
    turns = [
        {**m, "content": _render_content(processor, m, f"message {number} ({m['role']})")}
        for number, m in enumerate(messages)
    ]
    options = {"tokenize": False, "add_generation_prompt": generate}
    text, bos = str(processor.apply_chat_template(turns, **options)), _bos(processor.tokenizer)
    return text if text.startswith(bos) else bos + text


@lru_cache(maxsize=8)
def _bos(tokenizer: Any) -> str:
    """The bos token where the tokenizer puts it before every text by itself, else nothing."""
    whole, bare = (tokenizer("a", add_special_tokens=kind)["input_ids"] for kind in (True, False))
    if whole not in (bare, [tokenizer.bos_token_id, *bare]):
        raise UserError("the tokenizer adds tokens to a text other than one bos token")
    return "" if whole == bare else str(tokenizer.bos_token)


def render_prompt(
    processor: InternVLProcessor,
    question: str,
    system: str | None = None,
    history: Sequence[Message] = (),
) -> str:
    """A question as the unexpanded prompt text that an engine is given."""
    refuse_control_tokens(processor, question, "question")
    refuse_control_tokens(processor, system or "", "system")
    for number, message in enumerate(history):
        refuse_control_tokens(processor, message["content"], f"turn {number} of 'history'")
    return render_messages(processor, prompt_messages(question, system, history), generate=True)


def prompt_messages(
    question: str, system: str | None = None, history: Sequence[Message] = ()
) -> list[Message]:
    """The messages of a question; history: the user's and the assistant's before it."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*messages, *history, {"role": "user", "content": question}]


def cut_tiles(
    processor: InternVLProcessor, images: Sequence[Image.Image], max_tiles: int
) -> tuple[torch.Tensor, list[int]]:
    """Cut RGB images into tiles.

    max_tiles: the budget of the whole prompt; several images share it, max(1, max_tiles // images)
    each (InternVL 2.5), the thumbnail not counted. Returns uint8 tiles [X, 3, H, W] and the number
    of tiles of each image.
    """
    settings = tile_settings(len(images), max_tiles)
    return cut_images(
        images,
        min_tiles=settings["min_patches"],
        max_tiles=settings["max_patches"],
        tile_size=processor_tile_size(processor.image_processor),
    )


def tile_settings(num_images: int, max_tiles: int) -> dict[str, Any]:
    """The image processor's keyword arguments for a prompt: trainer and engine share them."""
    return {
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": max(1, max_tiles // max(1, num_images)),
    }


def expand_images(processor: InternVLProcessor, text: str, tile_counts: Sequence[int]) -> str:
    """Replace each image token by `<img>` + 256 context tokens a tile + `</img>`."""
    pieces = text.split(processor.image_token)
    if len(pieces) != len(tile_counts) + 1:
        raise DataError(f"{len(tile_counts)} image(s) but {len(pieces) - 1} placeholder(s): {text}")
    out = [pieces[0]]
    for count, piece in zip(tile_counts, pieces[1:], strict=True):
        context = processor.image_token * (processor.image_seq_length * count)
        out.append(f"{processor.start_image_token}{context}{processor.end_image_token}{piece}")
    return "".join(out)


def encode_text(processor: InternVLProcessor, text: str) -> list[int]:
    """Text to ids; no token is added at either end (the template has written them)."""
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_after(processor: InternVLProcessor, before: str, text: str) -> list[int]:
    """Ids of `text` where it follows `before`, as in one piece with it.

    A SentencePiece tokenizer puts a space before a text that stands alone. A token never spans the
    two: what was given to the sampler ends there.
    """
    head = _opening_ids(processor.tokenizer, before)
    ids = encode_text(processor, before + text)
    return ids[len(head) :] if ids[: len(head)] == head else encode_text(processor, text)


@lru_cache(maxsize=64)
def _opening_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what stands before a text: the same few words in every row."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_reply(processor: InternVLProcessor, opening: str, text: str) -> list[int]:
    """An assistant's reply after `opening` (rendered text), ended by the end-of-turn token."""
    line = opening[opening.rstrip("\n").rfind("\n") + 1 :]
    return [*_encode_after(processor, line, text), eos_token_id(processor)]


def _turns(
    processor: InternVLProcessor, messages: Sequence[Message], generate: bool
) -> list[tuple[str, str | None]]:
    """(unexpanded text before a reply, reply), and the text after the last one with None.

    Raises `DataError` for a template that does not write replies as they are: what is trained on
    would not be what is then read.
    """
    if not messages or messages[0]["role"] == "assistant":
        raise DataError("messages must begin with the user's, the system's or a tool's")
    eos = str(processor.tokenizer.convert_ids_to_tokens(eos_token_id(processor)))
    turns: list[tuple[str, str | None]] = []
    before = ""
    for number, message in enumerate([*messages, None]):
        if message is not None and message["role"] != "assistant":
            continue
        opens = generate or message is not None
        text = render_messages(processor, messages[:number], generate=opens)
        if not text.startswith(before):
            raise DataError(
                "the chat template rewrites what the assistant said, so these messages cannot be "
                f"trained in one piece: {before[-60:]!r}"
            )
        reply = None if message is None else _text_of(message)
        turns.append((text[len(before) :], reply))
        before = f"{text}{reply}{eos}"
    return turns


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def encode_messages(
    processor: InternVLProcessor,
    messages: Sequence[Message],
    tile_counts: Sequence[int],
    *,
    generate: bool = False,
) -> Encoded:
    """Messages to ids, loss mask and image slots; see `render_messages` for what they hold.

    tile_counts: tiles of each image, in the order of the placeholders. generate: end with the
    opening of the assistant's turn. The ids are those of the processor's own
    `apply_chat_template(..., tokenize=True)`, but that no token spans the start of a reply: there
    the sampler's prompt ends. Raises `DataError` where images and placeholders differ in number.
    """
    encoded, remaining, before = Encoded(), list(tile_counts), ""
    for text, reply in _turns(processor, messages, generate):
        here = text.count(processor.image_token)
        expanded = expand_images(processor, text, remaining[:here])
        ids = _encode_after(processor, before, expanded)
        start = len(encoded.ids)
        encoded.image_slots += [
            start + place for place, i in enumerate(ids) if i == processor.image_token_id
        ]
        answer = [] if reply is None else encode_reply(processor, text, reply)
        encoded.ids += ids + answer
        encoded.loss_mask += [False] * len(ids) + [True] * len(answer)
        del remaining[:here]
        before = str(processor.tokenizer.convert_ids_to_tokens(eos_token_id(processor)))
    if remaining:
        given = len(tile_counts)
        raise DataError(f"{given} image(s) but {given - len(remaining)} placeholder(s)")
    return encoded


def encode_prompt(
    processor: InternVLProcessor,
    question: str,
    images: Sequence[Image.Image],
    max_tiles: int,
    system: str | None = None,
    history: Sequence[Message] = (),
) -> Prompt:
    """A question with its images as the trainer sees it: expanded ids and uint8 tiles."""
    tiles, counts = cut_tiles(processor, images, max_tiles)
    text = render_prompt(processor, question, system, history)
    messages = prompt_messages(question, system, history)
    encoded = encode_messages(processor, messages, counts, generate=True)
    return Prompt(encoded.ids, tiles, encoded.image_slots, counts, text)


def normalize_tiles(processor: InternVLProcessor, tiles: torch.Tensor) -> torch.Tensor:
    """uint8 tiles to the float32 pixels that the vision tower takes, on the tiles' device.

    Bit-equal to what the image processor returns when it normalises by itself.
    """
    image_processor: Any = processor.image_processor
    return image_processor.rescale_and_normalize(
        tiles,
        do_rescale=True,
        rescale_factor=image_processor.rescale_factor,
        do_normalize=True,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
