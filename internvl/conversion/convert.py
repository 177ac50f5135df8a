"""Published InternVL checkpoints to the HF-native layout and back, without running their code.

    convert("InternVL3-1B", "ckpt", to="hf")       InternVLChatModel -> what everything here loads
    convert("ckpt", "release", to="chat")          and back, byte for byte where nothing changed

config.json and the headers of the weights are read, names and settings mapped (layouts, published,
processors, beside this file), and tensors copied as byte ranges (shards), so a model of any size
converts within a few megabytes beyond its processor. The folder appears under its name when it is
complete: a conversion that was killed leaves `.NAME.partial` only, which the next one removes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internvl.conversion.shards import (
    MAX_SHARD_BYTES,
    Target,
    TensorInfo,
    Weights,
    open_weights,
)
from internvl.errors import UserError
from internvl.folders import CHAT_TYPE, read_config_json

if TYPE_CHECKING:
    from internvl.conversion.layouts import Shapes

_LAYOUT_NAMES = {"hf": "HF-native", "chat": "published custom-code"}


@dataclass(frozen=True)
class _Source:
    """A folder to be converted; tied_head: its stored head that repeats the embeddings."""

    folder: Path
    config: dict[str, Any]
    weights: Weights
    tied_head: str | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors that have a counterpart."""
        tensors = dict(self.weights.tensors)
        if self.tied_head:
            del tensors[self.tied_head]
        return tensors


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["hf", "chat"],
    allow_pickle: bool = False,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint folder `source` to the new folder `out` in the layout `to`.

    allow_pickle: read pytorch_model*.bin too (tensors only). Raises `UserError` naming the key,
    tensor or file that cannot be converted; `out` is then not there.
    """
    source, out = Path(source), Path(out)
    if to not in _LAYOUT_NAMES:
        raise UserError(f"layout {to!r} is not one of {', '.join(_LAYOUT_NAMES)}")
    config = read_config_json(source)
    if (config["model_type"] == CHAT_TYPE) == (to == "chat"):
        raise UserError(f"{source}: is in the {_LAYOUT_NAMES[to]} layout already")
    loaded = _Source(source, config, open_weights(source, allow_pickle=allow_pickle))
    with whole_folder(out) as partial:
        targets = _to_hf(loaded, partial) if to == "hf" else _to_chat(loaded, partial)
        write_targets(
            targets, partial, loaded.weights, progress=progress, max_shard_bytes=max_shard_bytes
        )


def write_targets(
    targets: list[Target],
    partial: Path,
    weights: Weights,
    *,
    progress: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint's weights into its folder; raises `UserError` where there is no room."""
    from internvl.conversion.shards import write_weights

    needed = sum(target.info.nbytes for target in targets)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(f"{partial.parent}: {needed:,} bytes are needed, {free:,} are free there")
    write_weights(partial, targets, weights, max_shard_bytes=max_shard_bytes, progress=progress)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears as `out` when the block ends well, and not at all otherwise.

    Raises `UserError` where `out` holds something already.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give a new folder, or remove it first")
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_config(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration as transformers does: sorted, indented by two."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# ------------------------------------------------------------------------ published to HF


def _to_hf(source: _Source, out: Path) -> list[Target]:
    """Write everything but weights; returns what the weights are made of."""
    from internvl.conversion.heads import untied
    from internvl.conversion.layouts import HEAD, INTERNLM2_HEAD, hf_shapes, plan_to_hf
    from internvl.conversion.originals import (
        check_unchanged,
        keep_originals,
        read_record,
        restore_originals,
    )
    from internvl.conversion.published import (
        check_chat_config,
        dimensions,
        language_model,
        unknown_keys,
    )

    check_chat_config(source.config)
    for key in unknown_keys(source.config):
        value = source.config[key]
        _note(f"config.json: {key} is {value!r}, which has no meaning here; it is kept as it is")
    internlm2 = language_model(source.config["llm_config"]) == "InternLM2ForCausalLM"
    record = read_record(source.folder)
    if record and record.layout == "hf":
        check_unchanged(source.folder, record, source.config)
        restore_originals(source.folder, out)
        config = read_config_json(out)
    else:
        source = _find_tied_head(source)
        config = _new_hf_files(source, out)
        keep_originals(source.folder, out, layout="chat", config=config, tied_head=source.tied_head)
    if {HEAD, INTERNLM2_HEAD} & set(source.tensors):
        config = untied(config)  # it may have been silent about it, see heads
    shapes = hf_shapes(config)
    dims = dimensions(config["text_config"], internlm2=internlm2)
    targets = plan_to_hf(source.tensors, shapes, dims)
    if record and record.tied_head:
        targets.append(_copy_of_embeddings(record.tied_head, targets))
    return targets


def _find_tied_head(source: _Source) -> _Source:
    """Note a stored head that is the embeddings; refuse one that should be and is not."""
    from internvl.conversion.heads import same_bytes
    from internvl.conversion.layouts import EMBEDDINGS, HEAD, INTERNLM2_HEAD
    from internvl.conversion.published import chat_is_tied

    head = next((name for name in (HEAD, INTERNLM2_HEAD) if name in source.weights.tensors), None)
    if head is None or not chat_is_tied(source.config):
        return source
    embeddings = EMBEDDINGS
    if head == INTERNLM2_HEAD:
        embeddings = "language_model.model.tok_embeddings.weight"
    if not same_bytes(source.weights, head, embeddings):
        raise UserError(
            f"{source.folder}: tie_word_embeddings is true, but {head} is not {embeddings}; set it "
            "to false in config.json (llm_config) if the stored head is the trained one"
        )
    return _Source(source.folder, source.config, source.weights, head)


def _new_hf_files(source: _Source, out: Path) -> dict[str, Any]:
    """Processor, generation settings and config.json of a published folder; returns the config."""
    from internvl.conversion.layouts import HEAD, INTERNLM2_HEAD
    from internvl.conversion.processors import make_processor
    from internvl.conversion.published import chat_is_tied, hf_config

    processor = make_processor(source.folder, source.config)
    tokenizer = processor.tokenizer
    has_head = bool({HEAD, INTERNLM2_HEAD} & set(source.tensors))
    config = hf_config(
        source.config,
        image_token_id=tokenizer.context_image_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        tied=chat_is_tied(source.config) and not has_head,
    )
    vocabulary = config["text_config"]["vocab_size"]
    for token in (tokenizer.context_image_token, tokenizer.eos_token, tokenizer.pad_token):
        index = tokenizer.convert_tokens_to_ids(token)
        if index >= vocabulary:
            raise UserError(
                f"{source.folder}: token {token!r} has id {index}, "
                f"llm_config.vocab_size is {vocabulary}: tokenizer and model do not belong together"
            )
    processor.save_pretrained(out)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_config(out / "generation_config.json", ids)
    write_config(out / "config.json", config)
    return config


def _copy_of_embeddings(name: str, targets: list[Target]) -> Target:
    """The stored head of a tied model: the embeddings' bytes once more."""
    ends = (".embed_tokens.weight", ".tok_embeddings.weight")
    embeddings = next(target for target in targets if target.name.endswith(ends))
    return Target(name, embeddings.info, embeddings.segments)


# ------------------------------------------------------------------------ HF to published


def _to_chat(source: _Source, out: Path) -> list[Target]:
    """Write everything but weights; returns what the weights are made of."""
    from internvl.conversion.layouts import hf_shapes, plan_to_chat
    from internvl.conversion.originals import (
        check_unchanged,
        keep_originals,
        read_record,
        restore_originals,
    )
    from internvl.conversion.published import dimensions, language_model

    record = read_record(source.folder)
    shapes = hf_shapes(source.config)
    if record and record.layout == "chat":
        check_unchanged(source.folder, record, source.config)
        restore_originals(source.folder, out)
        chat = read_config_json(out)
    else:
        source, shapes = _drop_tied_copy(source, shapes)
        chat = _new_chat_files(source, out)
        keep_originals(source.folder, out, layout="hf", config=chat, tied_head=source.tied_head)
    internlm2 = language_model(chat["llm_config"]) == "InternLM2ForCausalLM"
    dims = dimensions(source.config["text_config"], internlm2=internlm2)
    targets = plan_to_chat(source.tensors, shapes, dims)
    if record and record.tied_head:
        targets.append(_copy_of_embeddings(record.tied_head, targets))
    return targets


def _drop_tied_copy(source: _Source, shapes: Shapes) -> tuple[_Source, Shapes]:
    """A tied model's head that was stored all the same, as some tools do.

    It is the head where it differs and the config is silent; see heads.
    """
    from internvl.conversion.heads import TIED, same_bytes, untied
    from internvl.conversion.layouts import EMBEDDINGS, HEAD, hf_name, hf_shapes

    actual = {hf_name(name): name for name in source.weights.tensors}
    if HEAD in shapes or not {HEAD, EMBEDDINGS} <= set(actual):
        return source, shapes
    if same_bytes(source.weights, actual[HEAD], actual[EMBEDDINGS]):
        return _Source(source.folder, source.config, source.weights, actual[HEAD]), shapes
    if TIED in source.config:
        raise UserError(
            f"{source.folder}: tie_word_embeddings is true, but {actual[HEAD]} is not the "
            "embeddings; set it to false in config.json (also in text_config) if it was trained"
        )
    config = untied(source.config)
    return _Source(source.folder, config, source.weights), hf_shapes(config)


def _new_chat_files(source: _Source, out: Path) -> dict[str, Any]:
    """Tokenizer and config.json for a model that never was in the published layout."""
    from internvl.conversion.processors import published_processor
    from internvl.conversion.published import chat_config

    template, tiles, notes = published_processor(source.folder, source.config, out)
    chat = chat_config(source.config, template=template, tiles=tiles)
    write_config(out / "config.json", chat)
    if (source.folder / "generation_config.json").is_file():
        shutil.copyfile(source.folder / "generation_config.json", out / "generation_config.json")
    for note in notes:
        _note(note)
    _note(
        "the published layout runs its own code, which is not here: put configuration_*.py, "
        "modeling_*.py and conversation.py of a published InternVL of the same language model "
        "into the folder"
    )
    return chat
