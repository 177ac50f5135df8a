"""Stable hashes: the same on every machine, in every process and Python version."""

from __future__ import annotations

import hashlib
from pathlib import Path

from internvl.adapters import is_adapter, named_base
from internvl.folders import require_config

_WHOLE_FILE = 64 * 2**20  # a file up to here is hashed whole, a larger one by its header and blocks
_BLOCKS, _BLOCK_BYTES = 64, 2**16


def stable_hash(*parts: object) -> int:
    """A 63-bit number from the parts' text; `hash()` differs from process to process.

    >>> stable_hash(0, "q1")
    5155483079786754936
    """
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _hash_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_FILE:
            digest.update(file.read())
        else:
            # 64 blocks from start to end: the safetensors header, and weights all along the file,
            # so that a checkpoint trained further is another one though its sizes are the same
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def model_fingerprint(model: str) -> str:
    """A hash of a checkpoint's weights and configuration, the same wherever its folder lies.

    Of a LoRA adapter: its own and its base's. Raises UserError when the folder or its config.json
    is missing.
    """
    folder = Path(model)
    if is_adapter(folder):
        return f"{_hash_folder(folder)[:16]}{model_fingerprint(str(named_base(folder)))[:16]}"
    require_config(folder)
    return _hash_folder(folder)[:32]


def _hash_folder(folder: Path) -> str:
    """A hash of the files that make a model."""
    files = [
        path
        for pattern in ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
        for path in folder.glob(pattern)
        if path.name != "trainer_state.json"  # the log of the training, not the model
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name} {_hash_file(path)}\n".encode())
    return digest.hexdigest()
