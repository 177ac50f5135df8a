"""What a recipe says, as the checks ask for it: checkpoints, files, tile budgets, processes.

Stages' results do not exist yet. What a stage starts from is followed back to what does: a folder,
a published checkpoint that `convert` will bring in, or a world, of which a little is made here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cascade.doctor.data import DataFile
from cascade.plan import chosen_stages
from cascade.recipe import Place, Recipe, StageSpec
from internvl.data import Kind
from internvl.errors import UserError

TRAINING = ("sft", "mpo", "rl")
WORLD_SAMPLE = 64  # records of each split that are made of a world
# what an option is where a stage does not say it (tests compare them with the stages' own)
DEFAULTS: dict[str, Any] = {
    "max_tiles": 12,
    "max_tokens_per_microbatch": 16384,
    "max_tiles_per_microbatch": None,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 2e-5,
    "dtype": "float32",
    "use_peft": False,
    "lora_r": 16,
    "load_in_4bit": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "freeze_vit": False,
    "freeze_llm": False,
    "freeze_projector": False,
    "dataloader_num_workers": 0,
    "max_bad": 0.05,
    "max_length": None,
    "save_steps": 500,
    "save_total_limit": None,
    "save_strategy": "steps",
    "save_only_model": False,
}
RL_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "num_generations": 8,
    "max_completion_length": 1024,
    "freeze_vit": True,
    "sampler": "auto",
    "vllm_gpu_memory_utilization": None,
    "temperature": 1.0,
}
MPO_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-6, "precompute_ref_log_probs": True}
# of `mmpr sample`, `cascade evaluate`
SAMPLE_DEFAULTS: dict[str, Any] = {"n": 8, "max-tokens": 1024, "max-tiles": 12}
EVALUATE_DEFAULTS: dict[str, Any] = {"samples": 2, "max-tokens": 1024, "max-tiles": 12}
_FILES: dict[str, Kind] = {"sft": "conversation", "mpo": "pair", "rl": "question"}


@dataclass(frozen=True)
class Start:
    """What a stage starts from, followed back to what is there: a folder, as it will be used.

    source: the folder that `convert` reads, where the checkpoint is yet to be brought in.
    """

    folder: Path
    source: Path | None = None
    allow_pickle: bool = False


@dataclass(frozen=True)
class Launch:
    """Processes of a training stage: in all, on one machine, and whether weights are sharded."""

    processes: int = 1
    here: int = 1
    sharded: bool = False


class Facts:
    """A recipe and a folder for what is made of it here.

    stages: those that would run, with the optional ones in `extra`. output: where it would write,
    instead of where the recipe says.
    """

    def __init__(
        self,
        recipe: Recipe,
        scratch: Path,
        *,
        extra: Collection[str] = (),
        output: Path | None = None,
    ):
        self.recipe, self.scratch, self.extra = recipe, scratch, tuple(extra)
        self.output = output or recipe.output or Path("runs") / recipe.name
        # every option of a training stage, where its own parser was asked
        self.resolved: Mapping[str, Mapping[str, Any]] = {}
        self.stages = chosen_stages(recipe, extra)

    @property
    def training(self) -> list[StageSpec]:
        """The training stages, in order."""
        return [spec for spec in self.stages.values() if spec.kind in TRAINING]

    # ---- options ----

    def option(self, spec: StageSpec, name: str) -> Any:
        """A training stage's option, or its default.

        Raises `UserError` where a number is asked for and none is given.
        """
        own = {"rl": RL_DEFAULTS, "mpo": MPO_DEFAULTS}.get(spec.kind, {})
        if name in self.resolved.get(spec.name, {}) and name != "sampler":
            return self.resolved[spec.name][name]
        if name in spec.options:
            default = {**DEFAULTS, **own}.get(name)
            return self._number(f"{spec.name}.{name}", spec.options[name], default)
        if name == "sampler" and self.recipe.backend != "auto":
            return self.recipe.backend
        return {**DEFAULTS, **own}[name]

    def plain_options(self, spec: StageSpec) -> dict[str, Any]:
        """A stage's options with its places as paths, where those are there."""
        return {
            name: str(self.path(value)) if isinstance(value, Place) else value
            for name, value in spec.options.items()
        }

    def sampling(self, spec: StageSpec) -> Mapping[str, Any]:
        """The options of the `mmpr sample` whose verdicts a stage takes: its own, or another's."""
        if spec.data is not None:
            return self.sampling(self.recipe.stages[spec.data])
        given = spec.sections.get("sample") or {}
        return self._numbers(f"{spec.name}.sample", SAMPLE_DEFAULTS, given)

    def evaluation(self, spec: StageSpec) -> Mapping[str, Any] | None:
        """The options of a stage's evaluation, or None."""
        own = spec.options if spec.kind == "evaluate" else spec.evaluate
        where = f"{spec.name}.evaluate"
        return None if own is None else self._numbers(where, EVALUATE_DEFAULTS, own)

    def _numbers(
        self, where: str, defaults: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Options over their defaults, numbers where those are."""
        found = {k: self._number(f"{where}.{k}", v, defaults.get(k)) for k, v in given.items()}
        return {**defaults, **found}

    def _number(self, where: str, value: Any, default: Any) -> Any:
        """A value as the number that its default is; YAML reads 1e-5 as a text."""
        if isinstance(default, bool) or not isinstance(default, int | float):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        try:
            return type(default)(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{self.recipe.file}: stages.{where} is {value!r}; give a number"
            ) from None

    def launch(self, spec: StageSpec) -> Launch:
        """How many processes a training stage is started in, by its options and its file.

        Raises `UserError` where the file cannot be read.
        """
        given = dict(spec.launch or {})
        file = given.pop("config_file", None)
        said: dict[str, Any] = {}
        if file is not None:  # where it is not there, recipe.inputs says so
            path = self.path(file) if isinstance(file, Place) else Path(file)
            try:
                said = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except FileNotFoundError:
                said = {}
            except (OSError, yaml.YAMLError) as fault:
                raise UserError(
                    f"launch.config_file {path}: {' '.join(str(fault).split())}"
                ) from None
        said = {**said, **{key.replace("-", "_"): value for key, value in given.items()}}
        processes = self._number(
            f"{spec.name}.launch.num_processes", said.get("num_processes") or 1, 1
        )
        kind = str(said.get("distributed_type", "")).upper()
        sharded = kind in ("FSDP", "DEEPSPEED") or bool(said.get("use_fsdp"))
        return Launch(processes, max(1, processes // int(said.get("num_machines") or 1)), sharded)

    # ---- paths ----

    def path(self, place: Place) -> Path:
        """Where a place is, or where it would be: a world's lies in the scratch folder."""
        if place.stage is None:
            return place.path
        return self.scratch / place.stage / place.path

    def is_there(self, place: Place) -> bool:
        """Whether a place is none of a stage that has yet to make it."""
        return place.stage is None or self.recipe.stages[place.stage].kind == "world"

    def start(self, place: Place) -> Start:
        """The checkpoint behind a model of the recipe."""
        if self.is_there(place):
            return Start(self.path(place))
        spec = self.recipe.stages[str(place.stage)]
        assert spec.model is not None
        if spec.kind != "convert":
            return self.start(spec.model)
        source = self.path(spec.model)
        pickled = bool(spec.options.get("allow-pickle"))
        return Start(self.scratch / spec.name, source, pickled)

    def starts(self) -> list[Start]:
        """The checkpoints that the recipe begins with, in order, each once."""
        found = []
        for spec in self.stages.values():
            if spec.model is not None:
                place = Place(Path(), spec.name) if spec.kind == "convert" else spec.model
                found.append(self.start(place))
        return list(dict.fromkeys(found))

    # ---- data ----

    def files(self) -> list[DataFile]:
        """The data files that are there, each with all stages that read it; others come later."""
        merged: dict[tuple[object, ...], DataFile] = {}
        for file in self._files():
            key = (file.path, file.kind, file.image_root)
            known = merged.get(key, file)
            merged[key] = replace(
                known,
                stages=tuple(dict.fromkeys((*known.stages, *file.stages))),
                answers=known.answers or file.answers,
                trained=known.trained or file.trained,
                room=max(known.room, file.room),
            )
        return list(merged.values())

    def held_out(self) -> set[Path]:
        """The files that stages look at without learning from them."""
        return {file.path for file in self._files() if not file.trained}

    def same_names(self) -> dict[str, list[Path]]:
        """Files of held-out questions by a name that several have in one evaluation."""
        found: dict[str, list[Path]] = {}
        for spec in self.stages.values():
            paths = list(dict.fromkeys(self.path(place) for place in self._held_out_of(spec)))
            for path in paths:
                same = [other for other in paths if other.stem == path.stem]
                if len(same) > 1:
                    found[path.stem] = same
        return found

    def _held_out_of(self, spec: StageSpec) -> Sequence[Place]:
        return spec.questions if spec.kind == "evaluate" else spec.evaluate_questions

    def _files(self) -> Iterator[DataFile]:
        for spec in self.stages.values():
            if spec.kind in TRAINING:
                yield from self._training_files(spec)
            elif spec.kind in ("pairs", "select"):
                options = {**(spec.sections.get("sample") or {}), **spec.options}
                answers = spec.sections.get("verify") is not None
                yield from self._questions(
                    spec.name, spec.questions, options, answers=answers, trained=True
                )
            evaluation = self.evaluation(spec)
            if evaluation is not None:
                name = spec.name if spec.kind == "evaluate" else f"evaluate.{spec.name}"
                held_out = self._held_out_of(spec)
                yield from self._questions(name, held_out, evaluation, answers=True, trained=False)

    def _training_files(self, spec: StageSpec) -> Iterator[DataFile]:
        root = spec.options.get("image_root")
        for name in ("train_file", "eval_file"):
            given = spec.options.get(name)
            for place in given if isinstance(given, list) else [given]:
                if isinstance(place, Place) and self.is_there(place):
                    yield DataFile(
                        self.path(place),
                        _FILES[spec.kind],
                        (spec.name,),
                        self.path(root) if isinstance(root, Place) else None,
                        answers=spec.kind == "rl",
                        trained=name == "train_file",
                        room=self.option(spec, "max_completion_length") if spec.kind == "rl" else 0,
                        max_bad=self.option(spec, "max_bad"),
                    )

    def _questions(
        self,
        name: str,
        places: Sequence[Place],
        options: Mapping[str, Any],
        *,
        answers: bool,
        trained: bool,
    ) -> Iterator[DataFile]:
        root = options.get("image-root")
        for place in places:
            if self.is_there(place):
                yield DataFile(
                    self.path(place),
                    "question",
                    (name,),
                    self.path(root) if isinstance(root, Place) else None,
                    answers=answers,
                    trained=trained,
                    max_bad=float(options.get("max-bad", DEFAULTS["max_bad"])),
                )

    # ---- worlds ----

    def make_worlds(self) -> list[str]:
        """Make a little of each world of the recipe in the scratch folder; returns their names."""
        from cascade.tiny import make_tiny_model
        from cascade.world import WorldOptions, WorldSizes, make_world

        names = [name for name, spec in self.recipe.stages.items() if spec.kind == "world"]
        for name in names:
            given = {k.replace("-", "_"): v for k, v in self.recipe.stages[name].options.items()}
            sizes = asdict(WorldSizes())
            sizes |= {k: v for k, v in given.items() if k in sizes}
            small = {split: min(int(size), WORLD_SAMPLE) for split, size in sizes.items()}
            own = {k: v for k, v in given.items() if k in asdict(WorldOptions())}
            seed, options = self.recipe.seeds[0], WorldOptions(**own)
            make_tiny_model(self.scratch / name / "model", seed=seed, options=options)
            make_world(self.scratch / name, seed=seed, sizes=WorldSizes(**small), options=options)
        return names

    def world_rows(self, path: Path) -> int | None:
        """How many records a world's file will have; None for another file."""
        for name, spec in self.recipe.stages.items():
            if spec.kind == "world" and path.is_relative_to(self.scratch / name):
                from cascade.world import WorldSizes

                sizes = {**asdict(WorldSizes()), **spec.options}
                return int(sizes[path.stem]) if path.stem in sizes else None
        return None
