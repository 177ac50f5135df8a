"""A LoRA adapter merged into its base: one whole HF-native checkpoint.

    adapter folder (adapter_config.json, adapter_model.safetensors)  +  base  ->  OUT

The sum is taken in float32 and rounded once to the base's dtype. The base may itself be a merged
folder, so adapters can follow one another.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.conversion.convert import whole_folder, write_config
from internvl.conversion.originals import FOLDER
from internvl.conversion.processors import TOKENIZER_FILES
from internvl.conversion.published import DTYPES
from internvl.conversion.shards import read_json
from internvl.errors import UserError
from internvl.folders import require_hf_layout

if TYPE_CHECKING:
    from torch import nn

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def merge_adapter(
    adapter: str | Path, out: str | Path, *, base: str | Path | None = None, progress: bool = True
) -> None:
    """Write base and adapter as one checkpoint, with its processor, to the new folder `out`.

    base: its folder; None: the one that the adapter's adapter_config.json names. Raises `UserError`
    naming what does not fit; `out` is then not there.
    """
    adapter, out = Path(adapter), Path(out)
    settings = _adapter_settings(adapter)
    folder = _base_folder(adapter, settings, base)
    config = require_hf_layout(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"{folder / 'config.json'}: dtype is {dtype!r}, expected one of {known}")
    with _bars(progress), whole_folder(out) as partial:
        model = _with_adapter(folder, adapter)
        _save(model, partial, dtype)
        _copy_processor(folder, partial)
        # as the base has it, and not as today's transformers would fill it in
        write_config(partial / "config.json", config)


def _adapter_settings(adapter: Path) -> dict[str, Any]:
    if not (adapter / _CONFIG).is_file():
        raise UserError(f"{adapter}: no {_CONFIG} there; expected the folder of a LoRA adapter")
    if not (adapter / _WEIGHTS).is_file():
        raise UserError(f"{adapter}: no {_WEIGHTS} there (other formats are not read)")
    settings = read_json(adapter / _CONFIG)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise UserError(f"{adapter / _CONFIG}: peft_type is {kind!r}; only LORA can be merged")
    for key in ("use_dora", "lora_bias"):  # as in internvl.checkpoint.full_weights
        if settings.get(key):
            raise UserError(f"{adapter / _CONFIG}: {key} is true, and cannot be merged")
    return settings


def _base_folder(adapter: Path, settings: dict[str, Any], base: str | Path | None) -> Path:
    if base is not None:
        return Path(base)
    named = settings.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter / _CONFIG}: names no base; give it (--base)")
    if not Path(named).is_dir():
        raise UserError(
            f"{adapter / _CONFIG}: its base {named!r} is no folder here; give the folder (--base)"
        )
    return Path(named)


def _with_adapter(folder: Path, adapter: Path) -> nn.Module:
    """The base in float32 with the adapter on it; every tensor of the adapter is used."""
    import torch
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from internvl.checkpoint import load_model

    model = load_model(folder, dtype="float32")
    try:
        with warnings.catch_warnings():
            # what PEFT only warns of is an error below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped: nn.Module = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        with safe_open(adapter / _WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter}: does not fit {folder}: {reason}") from None
    used = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if stored != used:
        odd = sorted(stored ^ used)
        raise UserError(
            f"{adapter}: does not fit {folder}: {len(odd)} tensors without a counterpart: {odd[0]}"
        )
    assert all(p.dtype == torch.float32 for p in wrapped.parameters())
    return wrapped


def _save(model: Any, out: Path, dtype: str) -> None:
    """The full weights in `dtype`, by the names that save_pretrained writes."""
    from internvl import checkpoint

    # cast while they come: no second copy in float32
    state = {
        name: weight.detach().to(checkpoint.DTYPES[dtype])
        for name, weight in checkpoint.full_weights(model)
    }
    model.get_base_model().save_pretrained(out, state_dict=state)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """transformers' own progress bars (loading, writing), on or off while open."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _copy_processor(folder: Path, out: Path) -> None:
    """The base's processor and generation settings, and what its conversion kept."""
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if (folder / FOLDER).is_dir():
        shutil.copytree(folder / FOLDER, out / FOLDER)
