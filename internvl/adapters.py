"""LoRA adapters on disk: the folder that PEFT writes, its base, and both as one model.

adapter folder (adapter_config.json, adapter_model.safetensors)  +  base  ->  PeftModel
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.conversion.shards import read_json
from internvl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no whole checkpoint."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_settings(adapter: str | Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter; raises `UserError` for any other folder."""
    adapter = Path(adapter)
    if not (adapter / CONFIG).is_file():
        raise UserError(f"{adapter}: no {CONFIG} there; expected the folder of a LoRA adapter")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: no {WEIGHTS} there (other formats are not read)")
    settings = read_json(adapter / CONFIG)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise UserError(f"{adapter / CONFIG}: peft_type is {kind!r}; only LORA can be read")
    return settings


def named_base(adapter: str | Path) -> Path:
    """The folder of the base that an adapter names.

    A relative name starts from the working directory, as PEFT writes it, or else from the
    adapter's own folder. Raises `UserError` where it leads nowhere.
    """
    file = Path(adapter) / CONFIG
    named = adapter_settings(adapter).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{file}: names no base; write it there (internvl merge: --base)")
    for place in (Path(named), file.parent / named):
        if place.is_dir():
            return place
    raise UserError(
        f"{file}: its base {named!r} is no folder here; write the folder there (internvl merge: "
        "--base)"
    )


def base_of(folder: str | Path) -> Path:
    """The whole checkpoint behind a folder: an adapter's base, or the folder itself."""
    return named_base(folder) if is_adapter(folder) else Path(folder)


def put_adapter(
    model: nn.Module, adapter: str | Path, *, base: str | Path, trainable: bool = False
) -> PeftModel:
    """The base's model with an adapter on it; every tensor of the adapter is used, none is missing.

    base: where `model` was loaded from. Its weights stay as they are. Raises `UserError` naming
    what does not fit.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    adapter = Path(adapter)
    adapter_settings(adapter)
    try:
        with warnings.catch_warnings():
            # what PEFT only warns of is an error below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter}: does not fit {base}: {reason}") from None
    used = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if stored != used:
        odd = sorted(stored ^ used)
        raise UserError(
            f"{adapter}: does not fit {base}: {len(odd)} tensors without a counterpart: {odd[0]}"
        )
    for settings in wrapped.peft_config.values():
        settings.base_model_name_or_path = str(base)  # what is saved of it finds its base
    return wrapped


def given_adapter(model: nn.Module, peft_config: PeftConfig | None) -> PeftConfig | None:
    """The configuration of the adapter that a model has already, or None.

    Raises `UserError` where it has several, or is to get (peft_config) another one.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    names = [*model.peft_config]
    if names != ["default"]:
        raise UserError(f"the model has the adapters {names}; expected one, named 'default'")
    if peft_config is not None:
        raise UserError("the model has an adapter already; peft_config would put on another")
    return model.peft_config["default"]
