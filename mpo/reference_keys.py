"""What the reference's log-probabilities depend on, as hashes: the model's side and the sample's.

Everything that changes the input or the arithmetic is in one of the two; where a file lies, which
row it is and what the run will do with the numbers are in neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import InternVLProcessor

from internvl.checkpoint import checksum
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from mpo.reference_cache import Digests

FORMAT = 1  # of the samples' hashes, and of how pairs are encoded: raised when that changes
TEXTS = ("system", "history", "question", "chosen", "rejected")
# what a config says of a model beside its arithmetic
_UNUSED = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("id2label", "label2id", "position_step", "use_cache", "output_attentions"),
    *("output_hidden_states", "return_dict"),
}
_ROWS_AT_ONCE = 256
_THREADS = 8  # that read images: hashing leaves the interpreter free


def reference_settings(
    model: nn.Module, encoder: Encoder, *, mixed_precision: str, tf32: bool
) -> dict[str, Any]:
    """The model's side: weights, arithmetic, and how a sample becomes its input; JSON-able."""
    processor = encoder.processor
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    images = {**processor.image_processor.to_dict(), "tokens": processor.image_seq_length}
    return {
        "format": FORMAT,
        "weights": checksum(reference_weights(model)),
        "config": _hash(_trimmed(base.config.to_dict())),
        "dtype": str(next(base.parameters()).dtype),
        "mixed_precision": mixed_precision,
        "tf32": tf32,
        "tokenizer": _hash(_tokenizer_facts(processor)),
        "image_processor": _hash(images),
        "chat_template": _hash(str(processor.chat_template)),
    }


def reference_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names that they have without adapters.

    A LoRA that adds nothing yet (B = 0) is left out, so that a model and a new adapter on it are
    the same reference; one that adds something comes with its scaling. Raises `UserError` where
    this process does not hold all of the weights.
    """
    adding = set[str]()
    if isinstance(model, PeftModel):
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and not _adds_nothing(layer):
                adding.add(name)
                for adapter in layer.active_adapters:
                    yield f"{name}.scaling", torch.tensor(float(layer.scaling[adapter]))
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.numel():
            raise UserError(
                f"{name}: not on this process, so the reference cannot be computed before "
                "training (DeepSpeed ZeRO-3, FSDP's cpu_ram_efficient_loading)"
            )
        owner, is_lora, _ = name.partition(".lora_")
        if (is_lora and owner not in adding) or ".original_module." in name:
            continue
        yield _plain_name(name), tensor


def _adds_nothing(layer: LoraLayer) -> bool:
    if getattr(layer, "lora_magnitude_vector", None):  # DoRA: more than the sum
        return False
    return not any(
        bool(weight.any())
        for name, weight in layer.state_dict().items()
        if name.startswith(("lora_B.", "lora_embedding_B."))
    )


def _plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    owner, saved, rest = name.partition(".modules_to_save.")
    return f"{owner}.{rest.partition('.')[2]}" if saved else name


def _tokenizer_facts(processor: InternVLProcessor) -> Any:
    tokenizer: Any = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]
    facts = json.loads(backend.to_str())
    # left behind by whoever called it last
    return {name: value for name, value in facts.items() if name not in ("padding", "truncation")}


def _trimmed(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _trimmed(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _UNUSED
    }


def _hash(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sample_digest(row: Row, encoder: Encoder) -> bytes:
    """SHA-256 of a pair: texts, images' bytes, tile budget, V2PE draw and augmentation's draw."""
    media = [hashlib.sha256(encoded).hexdigest() for encoded in row.encoded_media()]
    steps: list[float] | None = None
    if media and encoder.position_steps != (1.0,):
        steps = [*encoder.position_steps]
        if len(steps) > 1:  # the draw is made from these, the texts and the seed
            steps.append(encoder.seed)
    facts: list[Any] = [
        [row.data.get(name) for name in TEXTS],
        media,
        row.num_frames,
        row.tile_budget(encoder.max_tiles) if media else None,
        steps,
    ]
    if encoder.augmentation is not None and encoder.augments(row):
        facts.append(["jpeg", *encoder.augmentation.quality, encoder.seed])
    return bytes.fromhex(_hash(facts))


def sample_digests(
    rows: Sequence[Row], encoder: Encoder, *, rank: int, world_size: int, quiet: bool
) -> Digests:
    """`sample_digest` of this rank's share of the rows, the others' as zeros: [rows], "S32"."""
    out = np.zeros(len(rows), "S32")
    starts = range(rank * _ROWS_AT_ONCE, len(rows), _ROWS_AT_ONCE * world_size)
    bar = tqdm(total=len(rows), desc="hashing pairs", unit="pair", disable=quiet, leave=False)
    with ThreadPoolExecutor(_THREADS) as threads, bar:
        for start in starts:
            stop = min(start + _ROWS_AT_ONCE, len(rows))
            share = [rows[index] for index in range(start, stop)]
            found = threads.map(lambda row: sample_digest(row, encoder), share)
            out[start:stop] = np.frombuffer(b"".join(found), "S32")
            bar.update(min(world_size * (stop - start), len(rows) - bar.n))
    return out
