"""The recipe of `cascade run`: one YAML file that names the stages of a run, in order.

    recipe = load_recipe(Path("recipe.yaml"))
    recipe.stages["mpo"].options["learning_rate"]

Every key is told in docs/cascade.md. What is read here is only put in order: whether the files that
it names exist is asked by `cascade.inputs`, and whether a stage's options are options of its
command by that command's own parser, before the first stage starts (`cascade.check_options`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade.recipe_reading import Entries, read_entries
from cascade.recipe_stage import Gate, Place, StageReading, StageSpec, is_evaluated
from internvl.errors import UserError

__all__ = ["Gate", "Place", "Recipe", "StageSpec", "is_evaluated", "load_recipe"]

BACKENDS = ("auto", "vllm", "transformers")
PROCESSES = (  # kinds of a run's processes
    *("world", "convert", "merge", "sft", "mpo", "rl"),
    *("sample", "verify", "pair", "dropout", "check", "select", "evaluate"),
)
_NOT_A_NAME = ("eval", "stages", "configs", "logs", "run")
TOP_KEYS = (
    *("output", "seed", "seeds", "parallel", "backend", "overlap", "environment", "launch"),
    *("common", "sample", "verify", "evaluate", "gate", "report"),
    *("arms", "compute_from", "start_seconds"),
    "stages",
)


@dataclass(frozen=True)
class Recipe:
    """What a recipe says; see docs/cascade.md.

    many: whether it names `seeds`, each of which is a run in a folder of its own. overlap: None
    where the machine decides. report: the evaluated stages that summary and report show. text: of
    the file.
    """

    file: Path
    output: Path | None
    seeds: tuple[int, ...]
    many: bool
    parallel: int
    backend: str
    overlap: bool | None
    environment: Mapping[str, str]
    stages: Mapping[str, StageSpec]
    report: tuple[str, ...]
    arms: Mapping[str, str]
    compute_from: str | None
    start_seconds: Mapping[str, float]
    text: str

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem


def load_recipe(file: Path) -> Recipe:
    """Read a recipe.

    Raises `UserError`, one line with the file, the key, its value and the nearest known name, for
    what is not understood. Whether the files that it names are there is not asked.
    """
    text, top = read_entries(file)
    top.only(TOP_KEYS)
    stages = _stages(top)
    _check_gate(top, stages)
    seeds, many = _seeds(top)
    arms = {name: str(value) for name, value in top.mapping("arms").items()}
    evaluated = [name for name, spec in stages.items() if is_evaluated(spec)]
    if arms and not many:
        raise top.fault("arms", arms, "they need seeds: [0, 1, ...]")
    for arm, stage in arms.items():
        top.one_of(f"arms.{arm}", stage, evaluated, "it is an evaluated stage")
    overlap = top.get("overlap", "auto")
    if overlap not in ("auto", True, False):
        raise top.fault("overlap", overlap, "give auto, true or false")
    return Recipe(
        file=file,
        output=None if top.get("output", None) is None else Path(top.text("output")).expanduser(),
        seeds=seeds,
        many=many,
        parallel=top.whole("parallel", 1, least=1),
        backend=top.one_of("backend", top.get("backend", "auto"), BACKENDS),
        overlap=None if overlap == "auto" else bool(overlap),
        environment=_environment(top),
        stages=stages,
        report=_report(top, stages),
        arms=arms,
        compute_from=_compute_from(top, arms, stages),
        start_seconds=_start_seconds(top),
        text=text,
    )  # fmt: skip


def _environment(top: Entries) -> dict[str, str]:
    """What processes find in their environment; YAML reads true and false as more than words."""
    found = {}
    for name, value in top.mapping("environment").items():
        if not isinstance(value, str | int | float):
            raise top.fault(f"environment.{name}", value, "give a text or a number")
        found[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def _start_seconds(top: Entries) -> dict[str, float]:
    """CPU seconds by kind of process."""
    found = {}
    for kind, value in top.mapping("start_seconds").items():
        if kind not in PROCESSES:
            listed = f"kinds of processes are: {', '.join(PROCESSES)}"
            raise top.fault(f"start_seconds.{kind}", value, listed)
        found[kind] = top.number(f"start_seconds.{kind}", value)
    return found


def _check_gate(top: Entries, stages: Mapping[str, StageSpec]) -> None:
    """Refuse a gate that no stage would have."""
    own = [one.get("gate") for one in top.mapping("stages").values() if isinstance(one, dict)]
    given = top.get("gate", False)
    if given is not False and False not in own and not any(s.gate for s in stages.values()):
        raise top.fault(
            "gate", given, "no stage has one: it is for training stages that are "
            "evaluated and start from an evaluated stage (evaluate: true), or name one (against)"
        )  # fmt: skip


def _seeds(top: Entries) -> tuple[tuple[int, ...], bool]:
    if not top.has("seeds"):
        if top.has("parallel"):
            raise top.fault("parallel", top.get("parallel", None), "it needs seeds: [0, 1, ...]")
        return (top.whole("seed", 0, least=0),), False
    if top.has("seed"):
        raise top.fault("seed", top.get("seed", None), "seeds are given, too; give one of the two")
    seeds = top.get("seeds", [])
    good = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise top.fault("seeds", seeds, "give a list of whole numbers, 0 or more, each once")
    return tuple(seeds), True


def _report(top: Entries, stages: Mapping[str, StageSpec]) -> tuple[str, ...]:
    evaluated = [n for n, spec in stages.items() if is_evaluated(spec) and not spec.optional]
    given = top.get("report", evaluated)
    if not isinstance(given, list) or (top.has("report") and not given):
        raise top.fault("report", given, "give a list of evaluated stages")
    return tuple(top.one_of("report", name, evaluated, "evaluated stages") for name in given)


def _compute_from(
    top: Entries, arms: Mapping[str, str], stages: Mapping[str, StageSpec]
) -> str | None:
    """The stage from which an arm's compute counts."""
    if not arms:
        if top.has("compute_from"):
            raise top.fault("compute_from", top.get("compute_from", None), "it needs arms")
        return None
    given = top.get("compute_from", next(iter(arms)))
    if given in arms:
        return arms[given]
    return top.one_of("compute_from", given, [*arms, *stages], "it is an arm or a stage")


# ---- stages ----


def _stages(top: Entries) -> dict[str, StageSpec]:
    if not top.has("stages"):
        raise UserError(f"{top.file}: stages is missing: the stages of the run, in order")
    entries = top.mapping("stages")
    if not entries:
        raise top.fault("stages", entries, "give at least one")
    known: dict[str, StageSpec] = {}
    for name in entries:
        sound = name.replace("-", "").replace("_", "").isalnum()
        if not sound or name != name.lower() or name in _NOT_A_NAME:
            raise UserError(
                f"{top.file}: stages: {name!r} is no name for a stage: small letters, digits, - "
                f"and _, and none of {', '.join(_NOT_A_NAME)}"
            )
        known[name] = StageReading(
            top, name, top.below(f"stages.{name}", entries[name]), known
        ).spec()
    return known
