"""One stage of a recipe: what it is, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.recipe_reading import Entries
from internvl.errors import UserError

TRAINING = ("sft", "mpo", "rl")
KINDS = ("world", "convert", "merge", *TRAINING, "pairs", "select", "evaluate")
MODELS = ("convert", "merge", *TRAINING)  # kinds whose result is a model
VERDICTS = ("pairs", "select")  # kinds that sample and verify, or take another's verdicts
SECTIONS = {
    "pairs": ("sample", "verify", "pair", "dropout", "check"),
    "select": ("sample", "verify"),
}
# options of the training stages that are paths (they start from the recipe's folder); the
# commands' are those below. A test compares both with what the parsers say
TRAINING_PATHS = frozenset(
    (
        *("train_file", "eval_file", "image_root", "quarantine_file", "reference_cache_dir"),
        *("server_weights_dir", "deepspeed", "fsdp_config", "accelerator_config"),
        *("vision_from", "judge_cache"),
    )
)
COMMAND_PATHS = frozenset(("image-root", "datasets", "judge-cache", "base"))
# of those, the ones that are written or only found again there: they are no inputs
OUTPUT_PATHS = (
    *("quarantine_file", "reference_cache_dir", "server_weights_dir"),
    *("judge-cache", "judge_cache"),
)
# numbers of metrics.json that a gate may look at, besides pass@k, majority@k and what is counted; a
# test compares them with what `cascade evaluate` writes
METRICS = (
    *("sampled", "greedy", "format", "chain_correct", "truncated", "no_answer", "unjudged"),
    *("mean_tokens", "tokens_p50", "tokens_p90", "tokens_p99", "max_tokens"),
    *("greedy_format", "greedy_truncated", "greedy_mean_tokens"),
)
ROOTS = ("image-root", "image_root")  # folders of images, which nobody reads whole
# what a run says itself, and where it is said in the recipe
_SAID = {
    "model_name_or_path": "model",
    "output_dir": "output, at the top",
    "output": "output, at the top",
    "meta": "nothing: the pairs' meta.json lies beside them",
    "quarantine": "nothing: bad rows are put aside beside the output",
    "format": "nothing: a run trains on MMPR's format (`mmpr export` writes others)",
    "embed-images": "nothing: a run trains on MMPR's format (`mmpr export` writes others)",
    "fix": "nothing: a run changes no data (`mmpr check --fix` does)",
    "backend": "backend, at the top",
}


@dataclass(frozen=True)
class Place:
    """A path of a recipe.

    path: from the folder of stage `stage` (an earlier one), or as it is where that is None.
    adapter: the LoRA adapter of that stage, and not the whole weights that were made of it.
    """

    path: Path
    stage: str | None = None
    adapter: bool = False


@dataclass(frozen=True)
class Gate:
    """How far a held-out metric may fall before a run stops.

    metric: a number of metrics.json. max_drop: the largest loss that is borne. against: the
    evaluated stage that is compared with.
    """

    metric: str
    max_drop: float
    against: str


@dataclass(frozen=True)
class StageSpec:
    """One stage of a recipe.

    options: of its own command, the recipe's `common` under them; paths among them are `Place`s.
    sections: a command's options by name, for pairs and select; None where it is not run. data:
    the stage whose result it trains on, or whose verdicts it takes. evaluate: options of its
    evaluation, or None. optional: only run where it is asked for.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any] | None]
    model: Place | None = None
    questions: tuple[Place, ...] = ()
    data: str | None = None
    evaluate: Mapping[str, Any] | None = None
    evaluate_questions: tuple[Place, ...] = ()
    gate: Gate | None = None
    launch: Mapping[str, Any] | None = None
    optional: bool = False

    @property
    def lora(self) -> bool:
        """Whether its result is an adapter."""
        return self.kind in TRAINING and self.options.get("use_peft") is True


def is_evaluated(spec: StageSpec) -> bool:
    """Whether a run leaves eval/<name> of this stage."""
    return spec.kind == "evaluate" or spec.evaluate is not None


class StageReading:
    """The reading of one stage; earlier: the stages before it."""

    def __init__(self, top: Entries, name: str, own: Entries, earlier: Mapping[str, StageSpec]):
        self.top, self.name, self.own, self.earlier = top, name, own, earlier
        self.names = [*top.mapping("stages")]
        if not own.has("kind"):
            raise UserError(f"{own.file}: {own.where}: kind is missing, one of {', '.join(KINDS)}")
        self.kind = own.one_of("kind", own.take("kind", None), KINDS)

    def spec(self) -> StageSpec:
        own, kind = self.own, self.kind
        optional = own.take("optional", False)
        if type(optional) is not bool:
            raise own.fault("optional", optional, "give true or false")
        launch = self._launch()
        data = self._data()
        model = self._model(data)
        questions = self._questions(own, data)
        if kind in VERDICTS and data is not None:
            self._refuse_beside_data(data)
        sections = {name: self._section(name) for name in SECTIONS.get(kind, ())}
        evaluate, held_out = self._evaluate()
        gate = self._gate(model, evaluate)
        if kind in VERDICTS:
            self._check_verdicts(sections, data)
        if kind == "pairs":
            own.only(
                ("name", "image-root", "image_root"), also=(*SECTIONS[kind], "questions", "data")
            )
        self._check_adapter(model)
        return StageSpec(
            name=self.name, kind=kind, options=self._options(), sections=sections, model=model,
            questions=questions, data=data, evaluate=evaluate, evaluate_questions=held_out,
            gate=gate, launch=launch, optional=optional,
        )  # fmt: skip

    def _launch(self) -> dict[str, Any] | None:
        if self.kind not in TRAINING:
            return None
        given = {**self.top.mapping("launch"), **self.own.take_mapping("launch")}
        return {
            key: self.place(f"launch.{key}", value, self.own) if key == "config_file" else value
            for key, value in given.items()
        }

    def _data(self) -> str | None:
        """The stage that `data` names: one that makes what this kind reads."""
        wanted = {"mpo": ("pairs",), "rl": ("select",), "pairs": VERDICTS, "select": VERDICTS}
        if not self.own.has("data"):
            return None
        if self.kind not in wanted:
            raise self.own.fault("data", self.own.get("data", None), f"{self.kind} takes no data")
        value = self.own.take("data", None)
        fit = [name for name, spec in self.earlier.items() if spec.kind in wanted[self.kind]]
        kinds = " or ".join(wanted[self.kind])
        if self.kind in TRAINING and self.own.has("train_file"):
            raise self.own.fault("data", value, "train_file is given, too; give one of the two")
        return self.own.one_of("data", value, fit, f"it is an earlier stage of kind {kinds}")

    def _model(self, data: str | None) -> Place | None:
        own, kind = self.own, self.kind
        if kind == "world" or (kind in VERDICTS and data is not None):
            if own.has("model"):
                reason = "data" if data else "a world makes its own"
                raise own.fault("model", own.get("model", None), f"{reason} is given, leave it out")
            return None
        key = "source" if kind == "convert" else "model"
        if not own.has(key):
            raise UserError(f"{own.file}: {own.where}: {key} is missing: a stage or a folder")
        place = self.place(key, own.take(key, None), own, adapter=True)
        if place.stage is not None and place.path == Path():
            made = [name for name, spec in self.earlier.items() if spec.kind in MODELS]
            own.one_of(key, place.stage, made, "it is a stage that makes a model")
        if kind == "merge" and place.stage is not None and not place.adapter:
            raise own.fault(key, place.stage, "its whole weights are made already; leave this out")
        return place

    def _questions(self, own: Entries, data: str | None) -> tuple[Place, ...]:
        if self.kind not in (*VERDICTS, "evaluate"):
            return ()
        given = own.take("questions", None)
        if data is not None:
            if given is not None:
                raise own.fault("questions", given, "data is given, too; give one of the two")
            return ()
        if given is None and self.kind == "evaluate":
            given = self.top.mapping("evaluate").get("questions")
        if given is None:
            raise UserError(f"{own.file}: {own.where}: questions is missing: a file of questions")
        places = self._places("questions", given, own)
        if len(places) > 1 and self.kind != "evaluate":
            raise own.fault("questions", given, "give one file (a meta.json may name several)")
        return places

    def _places(self, key: str, given: object, own: Entries) -> tuple[Place, ...]:
        items = given if isinstance(given, list) else [given]
        if not items:
            raise own.fault(key, given, "give at least one file")
        return tuple(self.place(key, item, own) for item in items)

    def _section(self, name: str) -> dict[str, Any] | None:
        """A command's options under the recipe's own for all of its kind; None: not run."""
        shared = self._shared(name) if name in ("sample", "verify") else {}
        given = self.own.take(name, False if name in ("dropout", "check") else {})
        if given is False:
            return None
        section = self.own.below(f"{self.own.where}.{name}", given)
        return self._command_options({**shared, **section.spelled("-")}, section)

    def _refuse_beside_data(self, data: str) -> None:
        """What another stage has sampled and judged is not sampled or judged once more."""
        for key in ("sample", "verify", "image-root", "image_root"):
            if self.own.has(key):
                wanted = f"data is given: it is said in stages.{data}, leave it out"
                raise self.own.fault(key, self.own.get(key, None), wanted)

    def _check_verdicts(self, sections: Mapping[str, Any], data: str | None) -> None:
        own = self.own
        pairs = self.kind == "pairs"
        if pairs and sections["pair"] is None and sections["dropout"] is None:
            raise UserError(f"{own.file}: {own.where}: pair and dropout are both off: no pairs")
        if sections["sample"] is None:
            raise own.fault("sample", False, "data: STAGE takes the rollouts of another stage")
        if pairs and sections["pair"] is None:
            return  # Dropout-NTP needs no verdicts
        instead = "pair reads verdicts; set pair: false, too" if pairs else "select reads verdicts"
        if data is None and sections["verify"] is None:
            raise own.fault("verify", False, instead)
        source = data
        while source is not None and self.earlier[source].data is not None:
            source = self.earlier[source].data
        if source is not None and self.earlier[source].sections["verify"] is None:
            raise own.fault("data", data, f"stages.{source} has verify: false, but {instead}")

    def _check_adapter(self, model: Place | None) -> None:
        """Refuse to train an adapter on with settings that are not its own."""
        if model is None or not model.adapter or self.kind not in TRAINING:
            return
        options = {**self.top.mapping("common"), **self.own.entries}
        if options.get("use_peft") is not True:
            raise self.own.fault("model", f"{model.stage}.adapter", "use_peft is not set")
        for key in options:
            if key.startswith("lora_"):
                wanted = "an adapter is trained on with settings of its own, leave it out"
                raise self.own.fault(key, options[key], wanted)

    def _evaluate(self) -> tuple[dict[str, Any] | None, tuple[Place, ...]]:
        """The options of the stage's evaluation and the files of its questions."""
        own, top = self.own, self.top
        if self.kind not in MODELS:
            if self.kind != "evaluate" and own.has("evaluate"):
                raise own.fault("evaluate", own.get("evaluate", None), "it makes no model")
            return None, ()
        given = own.take("evaluate", top.has("evaluate") and self.kind in TRAINING)
        if given is False:
            return None, ()
        own_options = own.below(f"{own.where}.evaluate", None if given is True else given)
        options = {**self._shared("evaluate"), **own_options.spelled("-")}
        at = own.below(f"{own.where}.evaluate", options)
        questions = at.take("questions", None)
        if questions is None:
            raise UserError(f"{own.file}: {at.where}: questions is missing: the held-out questions")
        places = self._places("questions", questions, at)
        return self._command_options(at.entries, at), places

    def _gate(self, model: Place | None, evaluate: Mapping[str, Any] | None) -> Gate | None:
        own, top, evaluated = self.own, self.top, evaluate is not None
        given = own.take("gate", None)
        if given is False or (given is None and not top.has("gate")):
            return None
        if given is not None and not evaluated:
            raise own.fault("gate", given, "the stage is not evaluated")
        if self.kind not in TRAINING or top.get("gate", None) is False:
            return None
        own_gate = own.below(f"{own.where}.gate", given).entries
        at = own.below(f"{own.where}.gate", {**top.mapping("gate"), **own_gate})
        at.only(("metric", "max_drop", "against"))
        before = [name for name, spec in self.earlier.items() if is_evaluated(spec)]
        against = at.get("against", model.stage if model is not None else None)
        if given is None and (against not in before or not evaluated):
            return None  # the recipe's gate is for those that can be compared
        if against not in before:
            raise own.fault("gate", given, "the model that it starts from is not evaluated: give "
                            "that stage evaluate: true, or the gate against: STAGE")  # fmt: skip
        drop = at.number("max_drop", at.get("max_drop", 0.02))
        metric = at.one_of("metric", at.get("metric", "sampled"), metric_names(evaluate or {}))
        return Gate(metric, drop, str(against))

    def _options(self) -> dict[str, Any]:
        """What is left of the stage's keys: options of its command."""
        if self.kind not in TRAINING:
            options = self.own.spelled("-")
            if self.kind == "evaluate":
                shared = self._shared("evaluate")
                shared.pop("questions", None)
                options = {**shared, **options}
            return self._command_options(options, self.own)
        options = {**self._shared("common", "_"), **self.own.spelled("_")}
        self._refuse_said(options, self.own)
        return {
            key: self._path_value(key, value, self.own) if key in TRAINING_PATHS else value
            for key, value in options.items()
        }

    def _shared(self, name: str, sign: str = "-") -> dict[str, Any]:
        """The recipe's options for all stages of a kind."""
        return self.top.below(name, self.top.mapping(name)).spelled(sign)

    def _command_options(self, options: Mapping[str, Any], at: Entries) -> dict[str, Any]:
        self._refuse_said(options, at)
        return {
            key: self.place(key, value, at) if key in COMMAND_PATHS else value
            for key, value in options.items()
        }

    def _refuse_said(self, options: Mapping[str, Any], at: Entries) -> None:
        for key, instead in _SAID.items():
            if key in options:
                raise at.fault(key, options[key], f"a run says it itself, by {instead}")

    def _path_value(self, key: str, value: object, at: Entries) -> object:
        if isinstance(value, str):
            return self.place(key, value, at)
        if isinstance(value, list):
            return [self._path_value(key, item, at) for item in value]
        return value  # a mapping, or what the command's own parser will refuse

    def place(self, key: str, value: object, at: Entries, *, adapter: bool = False) -> Place:
        """A path of the recipe; `adapter`: NAME.adapter is understood."""
        if not isinstance(value, str) or not value:
            raise at.fault(key, value, "give a path, or the name of an earlier stage")
        first, _, rest = value.partition("/")
        name = first.removesuffix(".adapter") if adapter and not rest else first
        if name in self.earlier:
            is_adapter = name != first
            if is_adapter and not self.earlier[name].lora:
                raise at.fault(key, value, f"stage {name} trains no adapter (use_peft)")
            return Place(Path(rest), name, is_adapter)
        if name in self.names:
            raise at.fault(key, value, f"stage {name} does not come before {self.name}")
        return Place(at.file.parent / Path(value).expanduser())


def metric_names(evaluate: Mapping[str, Any]) -> list[str]:
    """The numbers that an evaluation by these options has."""
    samples, count = evaluate.get("samples", 2), evaluate.get("count")
    sizes = list[int]()
    if type(samples) is int and samples > 0:  # anything else is refused by the command's parser
        sizes = sorted({2**power for power in range(samples.bit_length())} | {samples})
    of_samples = [f"pass@{size}" for size in sizes] + [f"majority@{size}" for size in sizes[1:]]
    return [*METRICS, *of_samples, *(count if isinstance(count, dict) else ())]


def places_of(spec: StageSpec) -> list[tuple[str, Place]]:
    """Every path that a stage names, by the key where it stands."""
    model = "source" if spec.kind == "convert" else "model"
    named: dict[str, Any] = {model: spec.model, "questions": list(spec.questions)}
    named |= spec.options
    named |= {f"launch.{key}": value for key, value in (spec.launch or {}).items()}
    for section, options in spec.sections.items():
        named |= {f"{section}.{key}": value for key, value in (options or {}).items()}
    return [*_places(named), *evaluation_places(spec)]


def evaluation_places(spec: StageSpec) -> list[tuple[str, Place]]:
    """The paths that a stage's evaluation names."""
    named: dict[str, Any] = {"evaluate.questions": list(spec.evaluate_questions)}
    named |= {f"evaluate.{key}": value for key, value in (spec.evaluate or {}).items()}
    return _places(named)


def _places(named: Mapping[str, Any]) -> list[tuple[str, Place]]:
    return [
        (key, item)
        for key, value in named.items()
        for item in (value if isinstance(value, list) else [value])
        if isinstance(item, Place)
    ]
