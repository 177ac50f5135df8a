"""A checkpoint folder before it is loaded: layout, processor, template, tokens, tiles, pixels.

What is wrong here makes a model worse without a word: it is trained and sampled in a form that it
was never taught, or sees other pixels. Weights are only looked into (their first numbers), and
nothing is started.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.doctor.findings import Finding, error, ok, some, warning
from internvl.adapters import is_adapter, named_base
from internvl.errors import UserError
from internvl.folders import CHAT_TYPE, read_config_json
from internvl.info import count_parameters
from internvl.positions import checkpoint_step

if TYPE_CHECKING:
    from transformers import InternVLConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LOOKED_INTO = 1 << 20  # numbers of one tensor
_DROPOUT = (
    *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "projection_dropout"),
    *("drop_path_rate", "dropout", "attention_probs_dropout_prob"),
)
# what a conversation is in InternVL's form, without its default system message
_CHATML = "<|im_start|>user\n{question}{end}<|im_start|>assistant\n"
_ENDS = ("<|im_end|>\n", "<|im_end|>")
_QUESTION, _REPLY = "How many bars?", "Three."


def check_folder(folder: Path) -> list[Finding]:
    """Whether a folder is a checkpoint in the layout that is trained, with weights that are whole.

    Nothing else can be asked of a folder for which this returns an error.
    """
    where = str(folder)
    try:
        if is_adapter(folder):
            base = named_base(folder)
            return [ok("checkpoint.layout", f"a LoRA adapter on {base}", where)]
        config = read_config_json(folder)
        if config["model_type"] == CHAT_TYPE:
            told = "the published custom-code layout (InternVLChatModel), which is not trained here"
            cure = f"internvl convert {folder} OUT --to hf, or a stage of kind convert before"
            return [error("checkpoint.layout", told, where, cure=cure)]
        parts, dtypes = count_parameters(folder)
    except UserError as fault:
        if is_adapter(folder):
            cure = "bring the base back, or name it: internvl merge ADAPTER OUT --base BASE"
            return [error("checkpoint.reference", str(fault), where, cure=cure)]
        cure = "give the folder of an InternVL checkpoint: hf download, internvl convert"
        return [error("checkpoint.layout", str(fault), where, cure=cure)]
    told = (
        f"HF-native, {sum(parts.values()) / 1e6:,.2f} M parameters in {', '.join(sorted(dtypes))}"
    )
    return [ok("checkpoint.layout", told, where), *check_weights(folder)]


def check_weights(folder: Path) -> list[Finding]:
    """Whether weights are numbers, and not all of a matrix 0 (a save that went wrong)."""
    from safetensors import SafetensorError, safe_open

    empty, odd, number = [], [], 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in [*tensors.keys()]:
                    number += 1
                    values = _beginning(tensors.get_slice(name))
                    if not values.isfinite().all():
                        odd.append(name)
                    elif is_matrix(values.shape) and not values.any():
                        empty.append(name)
        except (SafetensorError, OSError) as fault:
            cure = "fetch the file again, or convert the checkpoint again"
            return [error("checkpoint.weights", f"{file.name}: {fault}", str(folder), cure=cure)]
    cure = "go back to a checkpoint before it, or fetch it again: nothing can be learned from these"
    if odd:
        told = f"{len(odd)} of {number} tensors hold NaN or infinity: {some(odd)}"
        return [error("checkpoint.weights", told, str(folder), cure=cure)]
    if empty:
        told = f"{len(empty)} of {number} tensors are all zeros: {some(empty)}"
        return [error("checkpoint.weights", told, str(folder), cure=cure)]
    return [ok("checkpoint.weights", f"{number} tensors hold numbers", str(folder))]


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has two sides: a vector (a bias, a class token) may well start at zero.

    >>> is_matrix([1, 1, 64]), is_matrix([128, 64])
    (False, True)
    """
    return sum(side > 1 for side in shape) > 1


def _beginning(tensor: Any) -> Any:
    """The first rows of a tensor, at most `_LOOKED_INTO` numbers."""
    shape = tensor.get_shape()
    if not shape:
        return tensor[...]
    row = math.prod(shape[1:])
    return tensor[: max(1, _LOOKED_INTO // max(1, row))]


# ---------------------------------------------------------------- processor and template


def check_processor(folder: Path, processor: Any, config: InternVLConfig) -> list[Finding]:
    """Template, tokens, tiles and pixels of a processor against the model that it belongs to."""
    where = str(folder)
    return [
        *check_template(processor, where),
        *check_tokens(processor, config, where),
        *check_tiles(processor, config, where),
        *check_pixels(processor, where),
    ]


def check_template(processor: Any, where: str) -> list[Finding]:
    """Whether the chat template writes what InternVL was taught.

    Any system message may stand before it; a bos token, too. A reply must stand as it was given,
    and be followed by the end of the turn.
    """
    from jinja2 import TemplateError

    from internvl.conversion.templates import template_name

    cure = (
        f"internvl convert writes InternVL's own: convert the published checkpoint again, or put "
        f"its chat_template.jinja into {where}"
    )
    if not processor.chat_template:
        told = "there is no chat template: prompts cannot be written"
        return [error("checkpoint.template", told, where, cure=cure)]
    asked = [{"role": "user", "content": _QUESTION}]
    answered = [*asked, {"role": "assistant", "content": _REPLY}]
    try:
        prompt = str(
            processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        )
        whole = str(processor.apply_chat_template(answered, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as fault:
        told = f"the chat template fails on a question and a reply: {fault}"
        return [error("checkpoint.template", told, where, cure=cure)]
    for end in _ENDS:
        expected = _CHATML.format(question=_QUESTION, end=end)
        if prompt.endswith(expected) and whole == f"{prompt}{_REPLY}{end}":
            name = template_name(str(processor.chat_template)) or "InternVL's form"
            before = prompt.removesuffix(expected)
            system = "with" if "<|im_start|>system" in before else "without"
            return [ok("checkpoint.template", f"{name}, {system} a default system message", where)]
    expected = _CHATML.format(question=_QUESTION, end=_ENDS[0])
    told = (
        f"the chat template writes a question as {prompt[-120:]!r}, and InternVL was taught "
        f"{expected!r}; with a reply: {whole[-40:]!r}"
    )
    return [error("checkpoint.template", told, where, cure=cure)]


def check_tokens(processor: Any, config: Any, where: str) -> list[Finding]:
    """Whether InternVL's special tokens are one id each, and the model knows the image token."""
    tokenizer = processor.tokenizer
    cure = "take tokenizer and config.json from one checkpoint: internvl convert SOURCE OUT --to hf"
    names = [processor.start_image_token, processor.end_image_token, processor.image_token]
    split = [
        name
        for name in [*names, "<|im_start|>", "<|im_end|>"]
        # a SentencePiece tokenizer may write a space before it
        if tokenizer(name, add_special_tokens=False)["input_ids"].count(
            tokenizer.convert_tokens_to_ids(name)
        )
        != 1
        or tokenizer.convert_tokens_to_ids(name) == tokenizer.unk_token_id
    ]
    if split:
        told = f"the tokenizer takes {some(split, 5)} apart: they are no special tokens of it"
        return [error("checkpoint.tokens", told, where, cure=cure)]
    own, model = processor.image_token_id, config.image_token_id
    if own != model:
        told = f"{processor.image_token} is {own} in the tokenizer, and {model} in config.json"
        return [error("checkpoint.tokens", told, where, cure=cure)]
    vocabulary = config.text_config.vocab_size
    beyond = [n for n in names if tokenizer.convert_tokens_to_ids(n) >= vocabulary]
    if beyond:
        told = f"{some(beyond)} have ids beyond the model's vocabulary of {vocabulary:,}"
        return [error("checkpoint.tokens", told, where, cure=cure)]
    told = f"{processor.image_token} is {own}, vocabulary {vocabulary:,}"
    return [ok("checkpoint.tokens", told, where)]


def check_tiles(processor: Any, config: Any, where: str) -> list[Finding]:
    """Whether processor and model agree on a tile's side and on the tokens that it takes."""
    from internvl.tiling import processor_tile_size

    cure = "take preprocessor_config.json and config.json from one checkpoint: internvl convert"
    try:
        side = processor_tile_size(processor.image_processor)
    except UserError as fault:
        return [error("checkpoint.tiles", str(fault), where, cure=cure)]
    seen, vision = config.vision_config.image_size[0], config.vision_config
    if side != seen:
        told = f"the processor cuts tiles of {side} px, and the model was made for {seen} px"
        return [error("checkpoint.tiles", told, where, cure=cure)]
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    makes = round(patches * config.downsample_ratio**2)
    told = f"a tile of {side} px makes {makes} tokens"
    says = {"the processor": processor.image_seq_length, "config.json": config.image_seq_length}
    for who, number in says.items():
        if number != makes:
            told += f", and image_seq_length of {who} is {number}"
            cure = f"image_seq_length: {makes} in {where} (processor_config.json, config.json)"
            return [error("checkpoint.tiles", told, where, cure=cure)]
    return [ok("checkpoint.tiles", told, where)]


def check_pixels(processor: Any, where: str) -> list[Finding]:
    """Whether pixels are normalised as InternVL's vision tower was trained: ImageNet's numbers."""
    images = processor.image_processor
    facts = [
        ("image_mean", images.image_mean, IMAGENET_MEAN),
        ("image_std", images.image_std, IMAGENET_STD),
        ("rescale_factor", [images.rescale_factor], (1 / 255,)),
    ]
    for name, value, wanted in facts:
        if not _near(value, wanted):
            told = f"{name} is {list(value)}, and the vision tower was trained with {list(wanted)}"
            cure = f'"{name}": {list(wanted)} in {where} (the processor\'s configuration)'
            return [error("checkpoint.pixels", told, where, cure=cure)]
    return [
        ok("checkpoint.pixels", "pixels are normalised by ImageNet's mean and deviation", where)
    ]


def _near(value: Iterable[float], wanted: Sequence[float]) -> bool:
    given = list(value)
    return len(given) == len(wanted) and all(
        abs(a - b) < 2e-3 for a, b in zip(given, wanted, strict=True)
    )


# ---------------------------------------------------------------- the model


def check_model(
    folder: Path,
    config: InternVLConfig,
    *,
    vllm: bool,
    vllm_on_cpu: bool,
    syncs: Sequence[str],
    mpo: Sequence[str],
) -> list[Finding]:
    """What a model's configuration means for the engine and the stages.

    vllm: vLLM was asked for by name. vllm_on_cpu: the vLLM that would be used runs on the CPU.
    syncs: stages that hand new weights to an engine in their process. mpo: stages of MPO.
    """
    from internvl.attention.choice import check_language_model
    from internvl.conversion.heads import has_own_head

    raw, where = read_config_json(folder), str(folder)
    found = []
    try:
        check_language_model(config.text_config)
        step = checkpoint_step(raw)
    except UserError as fault:
        return [error("checkpoint.model", str(fault), where, cure="another checkpoint")]
    if step != 1 and vllm:
        told = f"position_step is {step:g} (V2PE), and vLLM knows whole positions only"
        cure = "backend: transformers (and sampler: transformers in RL stages)"
        found.append(error("checkpoint.v2pe", told, where, cure=cure))
    elif step != 1:
        told = f"position_step is {step:g} (V2PE): transformers samples, slower than vLLM would"
        cure = "a checkpoint with position_step 1, if the time matters"
        found.append(warning("checkpoint.v2pe", told, where, cure=cure))
    tied = bool(config.tie_word_embeddings) and not has_own_head(folder)
    if tied and vllm_on_cpu and syncs:
        told = (
            "embeddings are tied, and vLLM on a CPU never refreshes a tied lm_head: after a "
            "weight update it would sample from the old one"
        )
        cure = f"sampler: transformers in {', '.join(syncs)} (or backend: transformers)"
        found.append(error("checkpoint.tied", told, where, cure=cure))
    if mpo and (drops := _dropouts(raw)):
        told = f"{some(drops, 4)} of config.json: in training the policy differs from its reference"
        cure = f"set {'it' if len(drops) == 1 else 'them'} to 0 in {folder / 'config.json'}"
        found.append(error("checkpoint.dropout", told, f"{where} ({', '.join(mpo)})", cure=cure))
    told = f"{config.text_config.model_type}, {'tied' if tied else 'untied'} embeddings"
    return found or [ok("checkpoint.model", told, where)]


def _dropouts(raw: dict[str, Any]) -> list[str]:
    """Names and values of what is dropped in training."""
    parts = {"": raw, "text_config.": raw.get("text_config", {})}
    parts["vision_config."] = raw.get("vision_config", {})
    return [
        f"{prefix}{name} {part[name]:g}"
        for prefix, part in parts.items()
        for name in _DROPOUT
        if part.get(name)
    ]
