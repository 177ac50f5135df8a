"""The checkpoints that a recipe begins with: looked at, and brought in where that is needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.doctor.checkpoint import check_folder, check_model, check_processor
from cascade.doctor.environment import gib, has_vllm, vllm_on_cpu
from cascade.doctor.facts import Facts, Start
from cascade.doctor.findings import Finding, error, error_codes, ok
from cascade.recipe import StageSpec
from internvl.adapters import base_of, is_adapter
from internvl.errors import UserError
from internvl.folders import HF_TYPE, read_config_json
from internvl.info import count_parameters, read_config

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLProcessor

    from internvl.encoding import Encoder

Say = Callable[[str], None]


class Checkpoints:
    """What the stages begin with.

    folders: where each start lies whole, in the layout that is trained. quick: nothing is
    converted. say: told what is done next.
    """

    def __init__(self, facts: Facts, *, quick: bool, say: Say):
        self.facts, self.quick, self._say = facts, quick, say
        self.folders: dict[Start, Path] = {}
        self._unsound: set[Path] = set()  # folders of which nothing can be made: told already
        self._encoders: dict[tuple[Path, int], Encoder] = {}
        self._models: dict[Path, tuple[InternVLConfig, dict[str, int]]] = {}
        self._processors: dict[Path, InternVLProcessor] = {}

    def check(self) -> list[Finding]:
        """The checks of all of them, each once."""
        return [finding for start in self.facts.starts() for finding in self._checkpoint(start)]

    @property
    def main(self) -> Path | None:
        """The checkpoint that most of the run begins with: the first that is sound."""
        return next((f for f in self.folders.values() if f not in self._unsound), None)

    def is_sound(self, start: Start) -> bool:
        """Whether a start can be loaded, and prompts can be written for it."""
        return start in self.folders and self.folders[start] not in self._unsound

    def encoder(self, folder: Path | None, tiles: int = 12) -> Encoder | None:
        """What counts tokens by a sound checkpoint's processor; None without one."""
        if folder is None or folder not in self.folders.values() or folder in self._unsound:
            return None
        from internvl.encoding import Encoder

        if (folder, tiles) not in self._encoders:
            limit = self.model(folder)[0].text_config.max_position_embeddings
            self._encoders[folder, tiles] = Encoder(self._processors[folder], tiles, limit)
        return self._encoders[folder, tiles]

    def model(self, folder: Path) -> tuple[InternVLConfig, dict[str, int]]:
        """(configuration, parameters by part) of a folder; read once."""
        if folder not in self._models:
            self._models[folder] = read_config(folder)[0], count_parameters(folder)[0]
        return self._models[folder]

    def _checkpoint(self, start: Start) -> list[Finding]:
        """The checks of one checkpoint; remembers it where it can be loaded."""
        folder = start.source or start.folder
        if not folder.exists():
            return []  # told by recipe.inputs
        if start.source is not None:
            found = self._bring_in(start)
            if any(finding.level == "error" for finding in found) or start.folder not in (
                *self.folders.values(),
            ):
                return found
            folder = start.folder
        else:
            found = []
        found += check_folder(folder)
        if error_codes(found) & {"checkpoint.layout", "checkpoint.reference"}:
            self._unsound.add(folder)
            return found
        base = base_of(folder)
        if is_adapter(folder):
            found += check_folder(base)
        self.folders[start] = base
        processor = self._processor(base)
        if error_codes(processor):  # nothing is encoded by it: that would only be told again
            self._unsound.add(base)
        found += processor
        stages = self._descended(start)
        found += check_model(
            base,
            self.model(base)[0],
            vllm=self.facts.recipe.backend == "vllm"
            or any(self.facts.option(s, "sampler") == "vllm" for s in stages if s.kind == "rl"),
            vllm_on_cpu=vllm_on_cpu(),
            syncs=[s.name for s in stages if self.syncs_whole(s)],
            mpo=[s.name for s in stages if s.kind == "mpo"],
        )
        return found

    def _bring_in(self, start: Start) -> list[Finding]:
        """Convert a published checkpoint for the checks that load it, where there is room."""
        from internvl.conversion.convert import convert

        assert start.source is not None
        where = str(start.source)
        try:
            kind = read_config_json(start.source)["model_type"]
            size = sum(file.stat().st_size for file in start.source.glob("*.safetensors"))
            if kind == HF_TYPE:
                cure = f"take it as it is: model: {start.source}, and no stage of kind convert"
                return [error("checkpoint.layout", "it is HF-native already", where, cure=cure)]
            told = f"the published layout, {gib(size)} GiB"
            free = shutil.disk_usage(self.facts.scratch).free
            if self.quick or 2 * size > free:
                why = "--quick" if self.quick else f"{gib(free)} GiB are free for a converted copy"
                told += f"; looked at no further ({why})"
                return [ok("checkpoint.layout", told, where)]
            self._say(f"converting {start.source} for the checks that load it")
            convert(start.source, start.folder, to="hf", allow_pickle=start.allow_pickle)
        except UserError as fault:
            cure = "see docs/checkpoints.md for what can be brought in"
            return [error("checkpoint.convert", str(fault), where, cure=cure)]
        self.folders[start] = start.folder
        return [ok("checkpoint.convert", f"{told}: it can be brought in", where)]

    def _processor(self, folder: Path) -> list[Finding]:
        from internvl.chat import load_processor

        try:
            self._processors[folder] = load_processor(str(folder))
            return check_processor(folder, self._processors[folder], self.model(folder)[0])
        except UserError as fault:
            cure = "fetch the checkpoint's tokenizer and processor files again"
            return [error("checkpoint.processor", str(fault), str(folder), cure=cure)]

    def _descended(self, start: Start) -> list[StageSpec]:
        """The training stages whose weights begin with a checkpoint."""
        return [
            spec
            for spec in self.facts.training
            if spec.model is not None and self.facts.start(spec.model) == start
        ]

    def syncs_whole(self, spec: StageSpec) -> bool:
        """Whether a stage hands all weights to a vLLM in its process."""
        if spec.kind != "rl" or spec.options.get("server") or not has_vllm():
            return False
        by_adapter = self.facts.option(spec, "use_peft") and (
            spec.options.get("lora_sync", "auto") != "merged"
        )
        return self.facts.option(spec, "sampler") in ("auto", "vllm") and not by_adapter

    def folder_of(self, spec: StageSpec) -> Path | None:
        """The checkpoint that a stage's weights begin with, in a layout whose size can be read."""
        if spec.model is None:
            return None
        start = self.facts.start(spec.model)
        if start in self.folders:
            return self.folders[start]
        folder = start.source or start.folder
        if folder in self._unsound:
            return None
        try:
            self.model(folder)
        except UserError:
            return None
        return folder
