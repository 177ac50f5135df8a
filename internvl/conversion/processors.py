"""The processor of a converted checkpoint: its tokenizer, image settings and chat template.

A published folder's tokenizer is read without its remote code: tokenizer.json where there is one,
the class of transformers for Qwen's files, our own (internlm2) for InternLM2's and LLaMA's.
The tokenizer that is written adds no token at either end: where the published one puts a bos token
before a prompt, the chat template writes it, so that trainer and engine see it once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.conversion.published import Config, image_seq_length, tile_range
from internvl.conversion.shards import read_json
from internvl.conversion.templates import (
    DEFAULT_CONVERSATION,
    END_OF_TURN,
    IMAGE_CONTEXT,
    START_OF_TURN,
    VIDEO,
    chat_template,
    conversation,
    template_name,
)
from internvl.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import InternVLProcessor, PreTrainedTokenizerFast

IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# classes of transformers itself, whose files it reads without remote code
_KNOWN_CLASSES = ("Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_INTERNLM2_CLASS = "InternLM2Tokenizer"
_START, _END = "<img>", "</img>"
# in the order in which the published training code adds them
_INTERNVL_TOKENS = (
    *(_START, _END, IMAGE_CONTEXT, "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)


def make_processor(source: Path, chat: Config) -> InternVLProcessor:
    """The HF-native processor of a published folder, by its config and tokenizer files."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    fewest, most, side = tile_range(chat)
    pixels = {
        "size": {"height": side, "width": side},
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    tokenizer, bos = load_tokenizer(source)
    talk = conversation(chat.get("template"), chat.get("system_message"))
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            crop_to_patches=True, min_patches=fewest, max_patches=most, **pixels
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=image_seq_length(chat),
        chat_template=chat_template(talk, bos=bos),
    )


def load_tokenizer(source: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """A published folder's tokenizer, and the bos token it puts before a prompt ("" for none).

    Raises `UserError` for a tokenizer of remote code that is not InternLM2's, and where one of
    InternVL's tokens is missing.
    """
    settings = read_json(source / "tokenizer_config.json")
    backend, adds_bos = _backend(source, settings)
    for token in (_START, _END, IMAGE_CONTEXT, END_OF_TURN):
        if backend.token_to_id(token) is None:
            raise UserError(f"{source}: its tokenizer has no token {token!r}")
    return _bare_tokenizer(source, settings, backend, adds_bos)


def adopt_tokenizer(
    source: Path, *, add_chat_tokens: bool = False
) -> tuple[PreTrainedTokenizerFast, str, dict[str, int]]:
    """A language model's tokenizer with InternVL's tokens: it, its bos, and the ids of new ones.

    add_chat_tokens: add `<|im_start|>` and `<|im_end|>`, too. Raises `UserError` where they are
    missing without it, and for a tokenizer that cannot be read.
    """
    from tokenizers import AddedToken

    settings = read_json(source / "tokenizer_config.json")
    backend, adds_bos = _backend(source, settings)
    before = backend.get_vocab()
    chat = [token for token in (START_OF_TURN, END_OF_TURN) if token not in before]
    if chat and not add_chat_tokens:
        raise UserError(
            f"{source}: its tokenizer has no {', '.join(map(repr, chat))}, which turns are written "
            "with: give a language model that speaks ChatML (Qwen2, Qwen2.5, Qwen3), or add them, "
            "to be learnt: internvl compose LLM VISION OUT --add-chat-tokens"
        )
    wanted = (START_OF_TURN, END_OF_TURN, *_INTERNVL_TOKENS, VIDEO)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in wanted]
    )
    after = backend.get_vocab()
    added = {token: after[token] for token in wanted if token not in before}
    tokenizer, bos = _bare_tokenizer(source, settings, backend, adds_bos)
    return tokenizer, bos, added


def _bare_tokenizer(
    source: Path, settings: dict[str, Any], backend: Tokenizer, adds_bos: bool
) -> tuple[PreTrainedTokenizerFast, str]:
    """See `load_tokenizer`; the backend has InternVL's tokens."""
    from transformers import PreTrainedTokenizerFast

    names = {key: _content(settings.get(f"{key}_token")) for key in ("bos", "pad", "unk", "eos")}
    if adds_bos and names["bos"] is None:
        raise UserError(f"{source / 'tokenizer_config.json'}: bos_token is missing")
    limit = settings.get("model_max_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=names["bos"],
        # the published code stops a turn here, whatever the tokenizer's own eos is
        eos_token=END_OF_TURN,
        pad_token=names["pad"] or names["eos"] or END_OF_TURN,
        unk_token=names["unk"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": _START,
            "end_image_token": _END,
            "context_image_token": IMAGE_CONTEXT,
            "video_token": VIDEO,
        },
        **({"model_max_length": limit} if limit else {}),
    )
    return tokenizer, (names["bos"] or "") if adds_bos else ""


def _content(token: object) -> str | None:
    """A special token's text, in any of the spellings of tokenizer_config.json."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _backend(source: Path, settings: dict[str, Any]) -> tuple[Tokenizer, bool]:
    """The `tokenizers` object, adding nothing at either end, and whether the original adds bos."""
    kind = str(settings.get("tokenizer_class"))
    alone = (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file()
    if kind.startswith(_INTERNLM2_CLASS) or (kind.startswith("LlamaTokenizer") and alone):
        from internvl.conversion.internlm2 import fast_tokenizer

        backend = fast_tokenizer(
            source / "tokenizer.model",
            _added_tokens(source, settings),
            legacy=settings.get("legacy") is not False,
        )
        if settings.get("add_eos_token", False):
            raise UserError(f"{source / 'tokenizer_config.json'}: add_eos_token is true")
        return backend, bool(settings.get("add_bos_token", True))
    if not kind.removesuffix("Fast").startswith(_KNOWN_CLASSES):
        raise UserError(
            f"{source / 'tokenizer_config.json'}: tokenizer_class is {kind!r}, which needs remote "
            f"code; known are {', '.join((*_KNOWN_CLASSES, _INTERNLM2_CLASS))}"
        )
    return _known_backend(source, settings)


def _added_tokens(source: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Tokens by id, of tokenizer_config.json and (older folders) added_tokens.json."""
    added: dict[int, str] = {}
    if (source / "added_tokens.json").is_file():
        added = {index: token for token, index in read_json(source / "added_tokens.json").items()}
    for index, token in settings.get("added_tokens_decoder", {}).items():
        added[int(index)] = str(_content(token))
    return added


def _known_backend(source: Path, settings: dict[str, Any]) -> tuple[Tokenizer, bool]:
    """Through transformers' own class, in a folder without config.json and without auto_map."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    clean = {key: value for key, value in settings.items() if key != "auto_map"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        (folder / "tokenizer_config.json").write_text(json.dumps(clean), encoding="utf-8")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source}: its tokenizer cannot be loaded: {reason}") from None
    probe = tokenizer("a")["input_ids"]
    adds_bos = probe[:1] == [tokenizer.bos_token_id]
    if len(probe) != len(tokenizer("a", add_special_tokens=False)["input_ids"]) + adds_bos:
        raise UserError(f"{source}: its tokenizer adds tokens to a text other than one bos token")
    # a copy, so that nothing that transformers' class does while it is saved can come back
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    return backend, adds_bos


# ------------------------------------------------------------------------- HF to published


def published_processor(
    source: Path, config: Config, out: Path
) -> tuple[str, tuple[int, int], list[str]]:
    """Write the tokenizer of an HF-native folder for the published layout.

    Returns the template's name, fewest and most tiles, and what the user should know. Raises
    `UserError` for pixel settings that the published code has built in otherwise.
    """
    from internvl.chat import load_processor

    processor = load_processor(str(source))
    images: Any = processor.image_processor
    side = config["vision_config"].get("image_size", 448)
    height = side if isinstance(side, int) else side[0]
    needed = {
        "image_mean": (list(images.image_mean), IMAGE_MEAN),
        "image_std": (list(images.image_std), IMAGE_STD),
        "size": (dict(images.size), {"height": height, "width": height}),
    }
    for key, (found, value) in needed.items():
        if found != value:
            raise UserError(
                f"{source}: the image processor's {key} is {found}; the published code has {value}"
            )
    text = str(processor.chat_template)
    name, notes = template_name(text), []
    if name is None:
        name = DEFAULT_CONVERSATION
        notes.append(
            f"the chat template is none of the published ones; config.json says {name!r}, whose "
            "default system message the published code will put before a prompt"
        )
    _write_published_tokenizer(processor, source, out)
    return name, (int(images.min_patches), int(images.max_patches)), notes


def _write_published_tokenizer(processor: InternVLProcessor, source: Path, out: Path) -> None:
    """Tokenizer files; a bos token that the chat template writes becomes the tokenizer's."""
    from tokenizers import processors

    tokenizer: Any = processor.tokenizer
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, out / file)
    settings = read_json(source / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name before transformers 5
    probe = [{"role": "user", "content": "a"}]
    bos = tokenizer.bos_token
    if bos and str(processor.apply_chat_template(probe, tokenize=False)).startswith(bos):
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        backend.save(str(out / "tokenizer.json"))
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
