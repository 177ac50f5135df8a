"""A LoRA adapter merged into its base: one whole HF-native checkpoint.

    adapter folder (adapter_config.json, adapter_model.safetensors)  +  base  ->  OUT

The sum is taken in float32 and rounded once to the base's dtype. The base may itself be a merged
folder, so adapters can follow one another.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.adapters import CONFIG, adapter_settings, named_base, put_adapter
from internvl.conversion.convert import whole_folder, write_config
from internvl.conversion.originals import FOLDER
from internvl.conversion.processors import PROCESSOR_FILES
from internvl.conversion.published import DTYPES
from internvl.errors import UserError
from internvl.folders import require_hf_layout

if TYPE_CHECKING:
    from torch import nn


def merge_adapter(
    adapter: str | Path, out: str | Path, *, base: str | Path | None = None, progress: bool = True
) -> None:
    """Write base and adapter as one checkpoint, with its processor, to the new folder `out`.

    base: its folder; None: the one that the adapter's adapter_config.json names. Raises `UserError`
    naming what does not fit; `out` is then not there.
    """
    adapter, out = Path(adapter), Path(out)
    _refuse_other_kinds(adapter)
    folder = named_base(adapter) if base is None else Path(base)
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


def _refuse_other_kinds(adapter: Path) -> None:
    settings = adapter_settings(adapter)
    for key in ("use_dora", "lora_bias"):  # as in internvl.checkpoint.full_weights
        if settings.get(key):
            raise UserError(f"{adapter / CONFIG}: {key} is true, and cannot be merged")


def _with_adapter(folder: Path, adapter: Path) -> nn.Module:
    """The base in float32 with the adapter on it."""
    import torch

    from internvl.checkpoint import load_model

    wrapped = put_adapter(load_model(folder, dtype="float32"), adapter, base=folder)
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
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if (folder / FOLDER).is_dir():
        shutil.copytree(folder / FOLDER, out / FOLDER)
