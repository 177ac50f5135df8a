"""What the other layout has no place for, kept beside a converted checkpoint.

    OUT/original/                 the source's small files, verbatim (its .py files are never run)
    OUT/original/conversion.json  {"format", "layout", "config", "tied_head", "left_out"}

With it a conversion back restores those files byte for byte. It speaks for the config.json that
was written with it: when that has been changed since, converting back is refused.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from internvl.conversion.shards import read_json
from internvl.errors import UserError

FOLDER, RECORD = "original", "conversion.json"
FORMAT = 1
MAX_FILE_BYTES = 64 << 20
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}
_WEIGHT_INDEXES = (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Record:
    """How a checkpoint folder came about.

    layout: of the folder that it was converted from ("chat" or "hf"). config: config.json as it
    was written beside the record. tied_head: name of the source's stored head where it was the
    embeddings once more. left_out: files too large to be kept.
    """

    layout: str
    config: dict[str, Any]
    tied_head: str | None = None
    left_out: list[str] = field(default_factory=list)


def small_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The folder's own files that are not weights, and names of those too large to be kept."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.endswith(_WEIGHT_INDEXES)
    ]
    large = [path.name for path in files if path.stat().st_size > MAX_FILE_BYTES]
    return [path for path in files if path.name not in large], large


def keep_originals(
    source: Path, out: Path, *, layout: str, config: dict[str, Any], tied_head: str | None
) -> None:
    """Copy the source's small files to OUT/original and write the record beside them."""
    (out / FOLDER).mkdir()
    files, large = small_files(source)
    for file in files:
        if file.name == RECORD:
            raise UserError(f"{file}: this name is needed for the record of the conversion")
        shutil.copyfile(file, out / FOLDER / file.name)
    record = Record(layout=layout, config=config, tied_head=tied_head, left_out=large)
    content = {"format": FORMAT, **asdict(record)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (out / FOLDER / RECORD).write_text(text, encoding="utf-8")


def read_record(source: Path) -> Record | None:
    """The record of a folder, or None; raises `UserError` for one that cannot be understood."""
    path = source / FOLDER / RECORD
    if not path.is_file():
        return None
    content = read_json(path)
    if content.pop("format", None) != FORMAT or set(content) != set(Record.__dataclass_fields__):
        raise UserError(f"{path}: written by another version; remove {path.parent} to convert anew")
    return Record(**content)


def check_unchanged(source: Path, record: Record, config: dict[str, Any]) -> None:
    """Raise `UserError` where config.json is not the one that the record was written for."""
    for key in sorted({*record.config, *config} - {"transformers_version"}):
        if record.config.get(key) != config.get(key):
            raise UserError(
                f"{source / 'config.json'}: {key} was changed since the conversion (it was "
                f"{record.config.get(key)!r}); what {source / FOLDER} holds no longer fits. Undo "
                f"the change, or remove {source / FOLDER} to convert by config.json alone"
            )


def restore_originals(source: Path, out: Path) -> None:
    """Copy OUT's files back from the source's original/, config.json too."""
    for path in sorted((source / FOLDER).iterdir()):
        if path.name != RECORD:
            shutil.copyfile(path, out / path.name)


def carry_originals(source: Path, out: Path) -> None:
    """Give `out`, whose weights were trained from those of `source`, what its conversion kept.

    So a trained checkpoint converts back to the very files that it came with; the weights' dtype
    may be another. Where the configuration no longer describes the same model (another position
    step, say) nothing is carried and a line says so.
    """
    record = read_record(source)
    if record is None:
        return
    config = read_json(out / "config.json")
    if _meaning(config) != _meaning(record.config):
        print(
            f"note: {out} is not the model that {source / FOLDER} describes; it converts to the "
            "published layout by its config.json alone",
            file=sys.stderr,
        )
        return
    partial = out / f".{FOLDER}.partial"
    for old in (partial, out / FOLDER):
        if old.exists():
            shutil.rmtree(old)
    shutil.copytree(source / FOLDER, partial)
    content = {"format": FORMAT, **asdict(replace(record, config=config))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (partial / RECORD).write_text(text, encoding="utf-8")
    partial.rename(out / FOLDER)


def _meaning(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its defaults, without what says nothing of the model."""
    from transformers import InternVLConfig

    full = InternVLConfig.from_dict(dict(config)).to_dict()
    for part in (full, full["text_config"], full["vision_config"]):
        for key in ("transformers_version", "dtype", "use_cache", "_name_or_path"):
            part.pop(key, None)
    return full
