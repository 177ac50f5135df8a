"""From a recipe to the processes of a run: their commands, configurations and folders.

Every stage's own command, in the recipe's order, each evaluation behind its stage:

    <run>/stages/<stage>   what it makes (a world: <run>/<stage>)    <run>/configs/<stage>.yaml
    <run>/eval/<stage>     its evaluation                            <run>/logs   of the background
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cascade.gates import check_gate
from cascade.inputs import input_paths
from cascade.recipe import Recipe, StageSpec
from cascade.recipe_stage import TRAINING, Place, evaluation_places, places_of
from cascade.stages import Stage
from internvl.data import input_folder, open_source
from internvl.errors import UserError

# one process, no questions asked; what accelerate would otherwise warn about, and without its own
# traceback below a stage's one line
LAUNCH = ["--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
_MANY = ("multi_gpu", "cpu", "use_deepspeed", "use_fsdp", "use_parallelism_config")
# options of our commands that are given once a value (`--count a=b --count c=d`), and those whose
# false is a word of its own; a test compares both with what the parsers say
REPEATED = ("count", "dataset", "server")
ON_OFF = ("format-negatives",)
_IMAGES = ("image", "images")


def plan(
    recipe: Recipe,
    run: Path,
    seed: int,
    *,
    backend: str | None = None,
    extra: Collection[str] = (),
) -> list[Stage]:
    """The processes of a run, in order; the last evaluation is not in the background.

    backend: instead of the recipe's. extra: optional stages that are wanted. Raises `UserError`
    for a stage that needs an optional one which is not.
    """
    return _Planner(recipe, run, seed, backend or recipe.backend, extra).stages()


def chosen_stages(recipe: Recipe, extra: Collection[str]) -> dict[str, StageSpec]:
    """The stages of a run with these optional ones."""
    for name in extra:
        spec = recipe.stages.get(name)
        if spec is None or not spec.optional:
            known = [key for key, one in recipe.stages.items() if one.optional]
            listed = ", ".join(known) or "none"
            raise UserError(f"{recipe.file}: --with {name}: its optional stages are: {listed}")
    return {n: s for n, s in recipe.stages.items() if not s.optional or n in extra}


class _Planner:
    def __init__(self, recipe: Recipe, run: Path, seed: int, backend: str, extra: Collection[str]):
        self.recipe, self.run, self.seed, self.backend = recipe, run, seed, backend
        self.specs = chosen_stages(recipe, extra)
        self.made: list[Stage] = []

    def stages(self) -> list[Stage]:
        makers: dict[str, Callable[[StageSpec], None]] = {
            "world": self._world, "convert": self._convert, "merge": self._merge,
            "pairs": self._pairs, "select": self._select, "evaluate": self._evaluate_alone,
            **dict.fromkeys(TRAINING, self._train),
        }  # fmt: skip
        for spec in self.specs.values():
            self._refuse_missing(spec)
            makers[spec.kind](spec)
            if spec.evaluate is not None:
                model = Place(Path(), spec.name)
                options = (spec.evaluate, spec.evaluate_questions, evaluation_places(spec))
                self._evaluate(spec, model, *options)
        if not self.made:
            listed = ", ".join(self.recipe.stages)
            raise UserError(f"{self.recipe.file}: every stage is optional: add --with ({listed})")
        self.made[-1] = replace(self.made[-1], background=False)
        return self.made

    def _refuse_missing(self, spec: StageSpec) -> None:
        named = {place.stage for _, place in places_of(spec)} | {spec.data}
        if spec.gate is not None:
            named.add(spec.gate.against)
        for name in sorted(name for name in named if name and name not in self.specs):
            raise UserError(
                f"{self.recipe.file}: stages.{spec.name} needs {name}, which is optional: "
                f"add --with {name}"
            )

    # ---- places ----

    def folder(self, name: str) -> Path:
        """Where a stage's result lies."""
        return self.run / name if self.specs[name].kind == "world" else self.run / "stages" / name

    def path(self, place: Place) -> Path:
        """A place of the recipe in this run; of a LoRA stage: the whole weights made of it."""
        if place.stage is None:
            return place.path
        folder = self.folder(place.stage)
        whole = self.specs[place.stage].lora and not place.adapter and place.path == Path()
        return folder.with_name(f"{folder.name}.merged") if whole else folder / place.path

    def maker(self, place: Place) -> str | None:
        """The process that makes what lies there."""
        if place.stage is None:
            return None
        spec = self.specs[place.stage]
        if spec.kind in ("pairs", "select"):
            return self._last_of(spec)
        merged = spec.lora and not place.adapter and place.path == Path()
        return f"{spec.name}.merge" if merged else spec.name

    def _last_of(self, spec: StageSpec) -> str:
        last = [stage.name for stage in self.made if stage.stage == spec.name]
        return last[-1]

    def _add(
        self,
        name: str,
        spec: StageSpec,
        kind: str,
        command: Sequence[str],
        folder: Path,
        *needs: str | None,
        places: Sequence[tuple[str, Place]] = (),
        **more: Any,
    ) -> None:
        """Add a process; places: of the recipe, whose makers it needs or which are its inputs."""
        wanted = [*needs, *(self.maker(place) for _, place in places)]
        found = dict.fromkeys(name for name in wanted if name is not None)
        self.made.append(
            Stage(
                name=name, command=["-m", *command], folder=folder, needs=tuple(found),
                stage=spec.name, kind=kind, inputs=input_paths(places),
                home=self.recipe.file.parent, **more,
            )
        )  # fmt: skip

    def _words(self, options: Mapping[str, Any]) -> list[str]:
        """A command's options as it reads them."""
        return [word for key, value in options.items() for word in self._option(key, value)]

    def _option(self, key: str, value: Any) -> list[str]:
        if isinstance(value, bool):
            if key in ON_OFF:
                return [f"--{key}", "on" if value else "off"]
            return [f"--{key}"] if value else []
        if isinstance(value, dict):
            value = [f"{name}={text}" for name, text in value.items()]
        if isinstance(value, list):
            items = [self._text(item) for item in value]
            if key in REPEATED:
                return [word for item in items for word in (f"--{key}", item)]
            return [f"--{key}", *items]
        return [f"--{key}", self._text(value)]

    def _text(self, value: Any) -> str:
        return str(self.path(value)) if isinstance(value, Place) else str(value)

    def _resolved(self, value: Any) -> Any:
        """An option's value in a configuration file."""
        if isinstance(value, list):
            return [self._resolved(item) for item in value]
        return str(self.path(value)) if isinstance(value, Place) else value

    # ---- one kind each ----

    def _world(self, spec: StageSpec) -> None:
        folder = self.folder(spec.name)
        words = self._words({"seed": self.seed, **spec.options})
        self._add(spec.name, spec, "world", ["cascade", "world", str(folder), *words], folder)

    def _convert(self, spec: StageSpec) -> None:
        assert spec.model is not None
        folder = self.folder(spec.name)
        words = [str(self.path(spec.model)), str(folder), "--to", "hf", *self._words(spec.options)]
        command = ["internvl", "convert", *words]
        self._add(spec.name, spec, "convert", command, folder, places=places_of(spec))

    def _merge(self, spec: StageSpec) -> None:
        assert spec.model is not None
        folder = self.folder(spec.name)
        words = [str(self.path(spec.model)), str(folder), *self._words(spec.options)]
        command = ["internvl", "merge", *words]
        self._add(spec.name, spec, "merge", command, folder, places=places_of(spec))

    def _train(self, spec: StageSpec) -> None:
        assert spec.model is not None
        folder = self.folder(spec.name)
        data = self.specs[spec.data] if spec.data is not None else None
        options: dict[str, Any] = {
            "model_name_or_path": self._text(spec.model),
            "output_dir": str(folder),
            "seed": self.seed,
        }
        if data is not None:
            name = "meta.json" if spec.kind == "mpo" else "questions.jsonl"
            options["train_file"] = str(self.folder(data.name) / name)
        if data is not None and spec.kind == "rl":
            options["image_root"] = str(self._image_root(data))
        if spec.kind == "rl":
            options["sampler"] = self.backend
        config = options | {key: self._resolved(value) for key, value in spec.options.items()}
        file = self.run / "configs" / f"{spec.name}.yaml"
        command = ["accelerate.commands.launch", *self._launch(spec), "-m", spec.kind]
        need = self._last_of(data) if data is not None else None
        own = [item for item in places_of(spec) if not item[0].startswith("evaluate.")]
        self._add(
            spec.name, spec, spec.kind, [*command, "--config", str(file)], folder, need,
            places=own, config=config, config_file=file,
        )  # fmt: skip
        if spec.lora:
            merged = self.path(Place(Path(), spec.name))
            base = self._text(self._base(spec))
            words = ["internvl", "merge", str(folder), str(merged), "--base", base]
            self._add(f"{spec.name}.merge", spec, "merge", words, merged, spec.name)

    def _base(self, spec: StageSpec) -> Place:
        """The whole weights below a stage's adapter."""
        assert spec.model is not None
        if spec.model.adapter:
            assert spec.model.stage is not None
            return self._base(self.specs[spec.model.stage])
        return spec.model

    def _launch(self, spec: StageSpec) -> list[str]:
        given = dict(spec.launch or {})
        words = self._words(given)
        if "config_file" in given:
            return ["--quiet", *words]
        defaults = dict(zip(LAUNCH[1::2], LAUNCH[2::2], strict=True))
        several = given.get("num_processes", 1) != 1
        if several and not any(given.get(name) for name in _MANY):
            words = ["--multi_gpu", *words]
        kept = [w for k, v in defaults.items() if k[2:] not in given for w in (k, v)]
        return ["--quiet", *kept, *words]

    def _pairs(self, spec: StageSpec) -> None:
        folder, sections = self.folder(spec.name), spec.sections
        verdicts, before = self._verdicts(spec)
        root, name = str(self._image_root(spec)), str(spec.options.get("name", spec.name))
        meta = folder / "meta.json"
        shared = {"seed": self.seed, "meta": str(meta)}
        dropped = sections["dropout"]
        if sections["pair"] is not None:
            output = folder / "pairs.jsonl"
            words = ["mmpr", "pair", str(verdicts), "--output", str(output)]
            words += self._words({**shared, "name": name, "image-root": root, **sections["pair"]})
            # meta.json is made anew here: what dropout enters in it comes after
            salt = "before dropout" if dropped is not None else ""
            self._add_step(spec, spec.name, "pair", words, before, [output, meta], salt=salt)
            before = spec.name
        if dropped is not None:
            output = folder / "dropout.jsonl"
            words = ["mmpr", "dropout", str(verdicts), "--model", self._text(self._asked(spec))]
            words += ["--output", str(output), "--backend", self.backend]
            named = {**shared, "name": f"{name}_dropout", "image-root": root}
            words += self._words({**named, **dropped})
            kept = [output.with_name(f"{output.name}.{end}.jsonl") for end in _OF_DROPOUT]
            owned = [output, *kept] + ([] if sections["pair"] is not None else [meta])
            self._add_step(spec, f"{spec.name}.dropout", "dropout", words, before, owned)
            before = f"{spec.name}.dropout"
        if sections["check"] is not None:
            counted = {"max-length", "max-tiles"} & sections["check"].keys()
            model = ["--model", self._text(self._asked(spec))] if counted else []
            words = ["mmpr", "check", str(meta), *model, *self._words(sections["check"])]
            self._add_step(spec, f"{spec.name}.check", "check", words, before, [])

    def _select(self, spec: StageSpec) -> None:
        verdicts, before = self._verdicts(spec)
        output = self.folder(spec.name) / "questions.jsonl"
        words = ["mmpr", "select", str(verdicts), "--output", str(output)]
        words += self._words({k: v for k, v in spec.options.items() if k != "image-root"})
        self._add_step(spec, spec.name, "select", words, before, [output])

    def _add_step(
        self, spec: StageSpec, name: str, kind: str, words: list[str], before: str,
        owned: Sequence[Path], **more: Any,
    ) -> None:  # fmt: skip
        """A process among several that write into one folder: only its own files are its own."""
        owns = [file for path in owned for file in (path, *_beside(path))]
        section = (spec.sections.get(kind) or {}) if kind != "select" else spec.options
        places = [(key, value) for key, value in section.items() if isinstance(value, Place)]
        folder = self.folder(spec.name)
        self._add(name, spec, kind, words, folder, before, places=places, owns=tuple(owns), **more)

    def _verdicts(self, spec: StageSpec) -> tuple[Path, str]:
        """The file that pairs or a selection are made from, and the process that makes it.

        Adds sample and verify, unless the verdicts are another stage's; rollouts where nothing is
        verified.
        """
        if spec.data is not None:
            return self._verdicts_of(self.specs[spec.data])
        assert spec.model is not None
        folder, sections = self.folder(spec.name), spec.sections
        rollouts, verdicts = folder / "rollouts.jsonl", folder / "verdicts.jsonl"
        words = ["mmpr", "sample", self._text(spec.questions[0]), "--model", self._text(spec.model)]
        words += ["--output", str(rollouts)]
        root = {k: v for k, v in spec.options.items() if k == "image-root"}
        own = {"seed": self.seed, "backend": self.backend, **root, **(sections["sample"] or {})}
        words += self._words(own)
        named = ("model", "questions", "image-root")
        places = [item for item in places_of(spec) if item[0] in named or "sample." in item[0]]
        first = f"{spec.name}.sample"
        self._add(first, spec, "sample", words, folder, places=places)
        if sections["verify"] is None:
            return rollouts, first
        words = ["mmpr", "verify", str(rollouts), "--output", str(verdicts)]
        words += self._words(sections["verify"])
        self._add_step(spec, f"{spec.name}.verify", "verify", words, first, [verdicts])
        return verdicts, f"{spec.name}.verify"

    def _verdicts_of(self, spec: StageSpec) -> tuple[Path, str]:
        if spec.data is not None:
            return self._verdicts_of(self.specs[spec.data])
        verified = spec.sections["verify"] is not None
        name, step = ("verdicts", "verify") if verified else ("rollouts", "sample")
        return self.folder(spec.name) / f"{name}.jsonl", f"{spec.name}.{step}"

    def _asked(self, spec: StageSpec) -> Place:
        """The model whose completions a stage's rollouts are."""
        if spec.data is not None:
            return self._asked(self.specs[spec.data])
        assert spec.model is not None
        return spec.model

    def _image_root(self, spec: StageSpec) -> Path:
        """Where image paths of a stage's rollouts start."""
        if spec.data is not None:
            return self._image_root(self.specs[spec.data])
        given = spec.options.get("image-root")
        if isinstance(given, Place):
            return self.path(given)
        questions = self.path(spec.questions[0])
        if questions.suffix not in (".jsonl", ".json") and _holds_images(questions):
            return self.folder(spec.name)  # they are written beside the rollouts
        return input_folder(questions)

    def _evaluate_alone(self, spec: StageSpec) -> None:
        assert spec.model is not None
        self._evaluate(spec, spec.model, spec.options, spec.questions, places_of(spec))

    def _evaluate(
        self,
        spec: StageSpec,
        model: Place,
        options: Mapping[str, Any],
        questions: Sequence[Place],
        places: Sequence[tuple[str, Place]],
    ) -> None:
        folder = self.run / "eval" / spec.name
        words = ["cascade", "evaluate", *map(self._text, questions), "--model", self._text(model)]
        words += ["--output", str(folder)]
        words += self._words({"seed": self.seed, "backend": self.backend, **options})
        gate = partial(check_gate, self.run, spec.name, spec.gate) if spec.gate else None
        self._add(
            f"evaluate.{spec.name}", spec, "evaluate", words, folder,
            places=[("model", model), *places], background=True, gate=gate,
        )  # fmt: skip


_OF_DROPOUT = ("continuations", "likelihood")


def _beside(path: Path) -> list[Path]:
    """What the commands of mmpr write beside their output."""
    return [path.with_name(path.name + end) for end in (".stats.json", ".quarantine.jsonl")]


def _holds_images(questions: Path) -> bool:
    """Whether the images of a table of questions are bytes in it."""
    if not questions.exists() and "*" not in questions.name:
        return False  # it is said before anything starts
    source = open_source(questions, quiet=True)
    record = source.read(0)[0] if len(source) else None  # an empty one is told when it is read
    if not isinstance(record, dict):
        return False
    images = next((record[name] for name in _IMAGES if record.get(name)), None)
    first = images[0] if isinstance(images, list) else images
    return isinstance(first, bytes) or (isinstance(first, dict) and bool(first.get("bytes")))
