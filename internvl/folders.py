"""Which kind of checkpoint a folder holds, by its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internvl.errors import UserError

HF_TYPE, CHAT_TYPE = "internvl", "internvl_chat"


def require_config(folder: Path) -> Path:
    """The path of a checkpoint's config.json; raises `UserError` where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        expected = "an InternVL checkpoint folder"
        if adapter:
            expected += " (it holds a LoRA adapter: `internvl merge` makes it whole)"
        if not folder.exists():
            expected += " (a name on the hub is not looked up: download it first)"
        raise UserError(f"{folder}: no config.json there; expected {expected}")
    return file


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of an InternVL checkpoint in either layout, as it is written.

    Raises `UserError` where there is none, or it is not an InternVL's.
    """
    file = require_config(folder)
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in (HF_TYPE, CHAT_TYPE):
        raise UserError(f"{file}: model_type is {kind!r}, expected {HF_TYPE!r} or {CHAT_TYPE!r}")
    return dict(config)


def require_hf_layout(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint that everything here can load.

    Raises `UserError` for the published custom-code layout, with the command that converts it.
    """
    config = read_config_json(folder)
    if config["model_type"] == CHAT_TYPE:
        raise UserError(
            f"{folder}: the published custom-code layout (InternVLChatModel); convert it first: "
            f"internvl convert {folder} OUT --to hf"
        )
    return config
