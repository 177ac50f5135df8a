"""The inputs of a run: are they there, and what are they, whatever they are called?"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from cascade.recipe import Recipe, StageSpec
from cascade.recipe_stage import OUTPUT_PATHS, ROOTS, Place, places_of
from internvl.adapters import is_adapter, named_base
from internvl.data.cache import cached_file
from internvl.errors import UserError

_CACHED_FROM = 32 * 2**20  # bytes; the hash of a smaller file is made in no time
_OF_A_CHECKPOINT = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "*.model")
_NOT_OF_ONE = ("trainer_state.json",)  # the log of its training


def digest_input(path: Path) -> str:
    """The sha256 of a file; of a folder or a pattern, one hash of its files' names and hashes.

    Of a checkpoint: its weights, configuration and tokenizer; of an adapter's its base's, too. With
    a meta.json go the annotation files that it names, with accelerate's configuration DeepSpeed's.
    Images in files of their own are not read. The hash of a large file is kept in the cache folder,
    by its size and time of change.
    """
    if path.is_file():
        named = [*_annotations(path), *_deepspeed_file(path)]
        return _digest_files([path, *named]) if named else _digest_file(path)
    if path.is_dir():
        digest, base = _digest_files(_files_of(path), path), _base_of(path)
        if base is None:
            return digest
        return hashlib.sha256(f"{digest} {digest_input(base)}".encode()).hexdigest()
    return _digest_files([Path(name) for name in sorted(glob.glob(str(path)))])


def missing_inputs(spec: StageSpec) -> list[tuple[str, Path]]:
    """(key, path) of what a stage names that is not there."""
    return [
        (key, place.path)
        for key, place in places_of(spec)
        if place.stage is None
        and key.rpartition(".")[2] not in OUTPUT_PATHS
        and not _is_there(place.path)
    ]


def tell_missing(recipe: Recipe, spec: StageSpec) -> list[str]:
    """The same, a line each, with the nearest stage's name beside it."""
    told = []
    for key, path in missing_inputs(spec):
        near = difflib.get_close_matches(path.name, recipe.stages, n=1)
        meant = f"; did you mean stage {near[0]!r}?" if near else ""
        told.append(f"{recipe.file}: stages.{spec.name}.{key}: {path} is not there{meant}")
    return told


def input_paths(places: Sequence[tuple[str, Place]]) -> tuple[Path, ...]:
    """Those of the places whose content decides a result; folders of images are not read."""
    return tuple(
        place.path
        for key, place in places
        if place.stage is None and key.rpartition(".")[2] not in (*OUTPUT_PATHS, *ROOTS)
    )


def _is_there(path: Path) -> bool:
    return path.exists() or ("*" in path.name and bool(glob.glob(str(path))))


def _files_of(folder: Path) -> list[Path]:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        found = [file for pattern in _OF_A_CHECKPOINT for file in folder.glob(pattern)]
        return sorted(file for file in found if file.name not in _NOT_OF_ONE)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _annotations(path: Path) -> list[Path]:
    """The files that a meta.json names; none of any other file."""
    if path.suffix != ".json":
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return []  # what reads it will say so
    if not isinstance(entries, dict):
        return []
    from internvl.data.sources import meta_place

    named = [e["annotation"] for e in entries.values() if isinstance(e, dict) and "annotation" in e]
    places = [meta_place(path, name) for name in named if isinstance(name, str)]
    return [Path(name) for place in places for name in sorted(glob.glob(str(place)))]


def _deepspeed_file(path: Path) -> list[Path]:
    """The file that an accelerate configuration names; none of any other file."""
    if path.suffix not in (".yaml", ".yml"):
        return []
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []  # what reads it will say so
    own = entries.get("deepspeed_config") if isinstance(entries, dict) else None
    named = own.get("deepspeed_config_file") if isinstance(own, dict) else None
    return [Path(named)] if isinstance(named, str) and Path(named).is_file() else []


def _base_of(folder: Path) -> Path | None:
    """The checkpoint under an adapter; None where it names none here, as --base may say it."""
    if not is_adapter(folder):
        return None
    try:
        return named_base(folder)
    except UserError:
        return None  # what reads it will say so


def _digest_files(files: list[Path], root: Path | None = None) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_dir():
            digest.update(f"{file.name} {_digest_files(_files_of(file), file)}\n".encode())
            continue
        name = file.relative_to(root).as_posix() if root is not None else file.name
        digest.update(f"{name} {_digest_file(file)}\n".encode())
    return digest.hexdigest()


def _digest_file(path: Path) -> str:
    if path.stat().st_size < _CACHED_FROM:
        return _read_digest(path)

    def make(target: Path) -> None:
        target.write_text(_read_digest(path), encoding="ascii")

    return cached_file([path], ".sha256", make, version=1).read_text(encoding="ascii")


def _read_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
