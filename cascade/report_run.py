"""The folder of a run as its report reads it: its manifest, its stages, and where each began.

The records of a manifest say what each stage is; of the first format, which has names and commands
alone, the rest is read off the commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from cascade.gates import is_borne
from cascade.manifest import is_whole
from cascade.report_data import TONES, GateOutcome, Process, StageInfo, StageResult
from cascade.report_files import get, number, read_object

if TYPE_CHECKING:
    from cascade.recipe import Recipe

TRAINING = ("sft", "mpo", "rl")
LABELS = {"sft-careful": "Careful SFT", "sft": "SFT", "mpo": "MPO", "control": "Control"}
_TONE_OF = {"sft": 1, "mpo": 2, "rl": 3}
_PARTS = (".sample", ".verify", ".dropout", ".check", ".merge")
DEMO_RECIPES = ("demo", "tiny")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its manifest; names: the evaluated stages that its summary reports."""

    path: Path
    manifest: Mapping[str, Any]
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read manifest.json and, where the run came to its end, summary.json."""
        manifest, summary = read_object(path / "manifest.json"), path / "summary.json"
        names: list[str] = []
        if summary.exists():
            found = get(read_object(summary), "stages", list, summary)
            names = [get(stage, "name", str, summary) for stage in found]
        return cls(path, manifest, tuple(names))

    @property
    def file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def name(self) -> str:
        """Of the recipe."""
        key = "recipe" if "recipe" in self.manifest else "preset"
        return str(get(self.manifest, key, str, self.file))

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return list(get(self.manifest, "stages", list, self.file))

    @cached_property
    def processes(self) -> list[Process]:
        """Every process that was begun, in order."""
        return [_process(record, self.file) for record in self.records]

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe that the run keeps a copy of; None of a run of the first format."""
        file = self.path / "recipe.yaml"
        if self.manifest.get("format") is None or not file.exists():
            return None
        from cascade.recipe import load_recipe

        return load_recipe(file)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """{stage: kind} of what was begun, in order; pairs and select are one stage each."""
        kinds: dict[str, str] = {}
        for one in self.processes:
            own = {"pair": "pairs", "dropout": "pairs", "select": "select"}.get(one.kind, one.kind)
            known = kinds.get(one.stage)
            if known is None or (known in ("sample", "verify", "evaluate") and own != "evaluate"):
                kinds[one.stage] = own
        return kinds

    def is_whole(self, process: str) -> bool:
        """Whether a process is done, of what those that it needs have made since."""
        return is_whole({str(record.get("name")): record for record in self.records}, process)

    @cached_property
    def _measured(self) -> list[str]:
        return [p.parent.name for p in sorted(self.path.glob("eval/*/metrics.json"))]

    @cached_property
    def stale(self) -> list[str]:
        """Stages whose metrics are of what has begun anew since."""
        known = {record.get("name") for record in self.records}
        names = [(name, f"evaluate.{name}") for name in self._measured]
        return [name for name, one in names if one in known and not self.is_whole(one)]

    @cached_property
    def evaluated(self) -> list[str]:
        """Stages that have metrics of their own, in the order in which they were run."""
        found = [name for name in self._measured if name not in self.stale]
        order = [*self.kinds]
        return sorted(found, key=lambda name: order.index(name) if name in order else len(order))

    @cached_property
    def stages(self) -> dict[str, StageInfo]:
        """All stages that were begun or evaluated; the reported ones have the first colours."""
        evaluated = self.evaluated
        reported = self.names or tuple(evaluated)
        named = dict.fromkeys([*reported, *evaluated, *self.kinds])
        tones = _tones([name for name in named if self.kinds.get(name, "") in TRAINING
                        or name in evaluated], self.kinds)  # fmt: skip
        order = dict.fromkeys([*self.kinds, *named])
        return {
            name: StageInfo(
                name,
                self._label(name),
                self.kinds.get(name, ""),
                tones.get(name, TONES),
                self.origin(name),
                name not in reported,
            )
            for name in order
        }

    def _label(self, name: str) -> str:
        if name in LABELS:
            return LABELS[name]
        return ("GSPO" if self.name in DEMO_RECIPES else "RL") if name == "rl" else name

    def folder(self, name: str) -> Path:
        """Where a stage's result lies."""
        return self.path / "stages" / name

    def options(self, name: str) -> dict[str, Any]:
        """A training stage's options: as they were used, else as they were given."""
        resolved = self.folder(name) / "config.resolved.json"
        if resolved.exists():
            return read_object(resolved)
        record = next((one for one in self.records if one.get("name") == name), {})
        return dict(record.get("config") or {})

    def origin(self, name: str) -> str | None:
        """The stage whose model a stage began with or asks, read off its options or commands."""
        given = [self.options(name).get("model_name_or_path")]
        for one in self.processes:
            if one.stage == name and one.kind in ("sample", "dropout", "evaluate"):
                given.append(_word_after(one.command, "--model"))
        for model in given:
            found = PurePath(str(model)).name.removesuffix(".merged") if model else ""
            if found in self.kinds and found != name:
                return found
        return None

    def before(self, name: str, evaluated: Sequence[str]) -> str | None:
        """The nearest evaluated stage from whose weights a stage's come."""
        seen = {name}
        found = self.origin(name)
        while found is not None and found not in evaluated and found not in seen:
            seen.add(found)
            found = self.origin(found)
        return found if found in evaluated else None

    # -- what was not done, and the gates -------------------------------------------------------

    def waiting(self) -> list[str]:
        """Stages of the recipe that were not begun; optional ones count only when asked for."""
        if self.recipe is None:
            return []
        return [n for n, s in self.recipe.stages.items() if n not in self.kinds and not s.optional]

    def gates(self, results: Sequence[StageResult]) -> list[GateOutcome]:
        """What became of the recipe's gates."""
        if self.recipe is None:
            return []
        known = {result.name for result in results}
        outcomes = []
        for name, spec in self.recipe.stages.items():
            if spec.gate is None or name not in self.kinds:
                continue
            gate = spec.gate
            before, after = (
                self._metric(one, gate.metric) if one in known else None
                for one in (gate.against, name)
            )
            if before is None or after is None:
                state = "not reached"
            elif is_borne(before, after, gate):
                state = "passed"
            else:
                went_on = any(
                    name in _needed(self, p.stage) and self.is_whole(p.name) for p in self.processes
                )
                state = "closed, passed by" if went_on else "closed"
            found = (gate.metric, gate.max_drop, before, after, state)
            outcomes.append(GateOutcome(name, gate.against, *found))
        return outcomes

    def _metric(self, name: str, metric: str) -> float | None:
        path = self.path / "eval" / name / "metrics.json"
        metrics = read_object(path)
        return number(metrics, metric, path) if metric in metrics else None


def _needed(run: RunFolder, name: str) -> set[str]:
    """The stages whose models a stage's comes from."""
    found: set[str] = set()
    origin = run.origin(name)
    while origin is not None and origin not in found:
        found.add(origin)
        origin = run.origin(origin)
    return found


def _tones(names: Sequence[str], kinds: Mapping[str, str]) -> dict[str, int]:
    """A colour each: that of its kind where it is free, then the next; the last for the rest."""
    free = [tone for tone in range(1, TONES) if tone not in _TONE_OF.values()]
    taken: dict[str, int] = {}
    for name in names:
        own = _TONE_OF.get(kinds.get(name, name), 0)
        if own and own not in taken.values():
            taken[name] = own
        else:
            taken[name] = free.pop(0) if free else TONES
    return taken


def _process(record: dict[str, Any], path: Path) -> Process:
    name = str(get(record, "name", str, path))
    command = tuple(str(part) for part in get(record, "command", list, path))
    cpu = record.get("cpu_seconds")
    inputs = record.get("inputs") or {}
    return Process(
        name=name,
        stage=str(record.get("stage") or _stage_of(name)),
        kind=str(record.get("kind") or _kind_of(command, name)),
        command=command,
        done=bool(record.get("done", True)),
        seconds=number(record, "seconds", path),
        cpu_seconds=None if cpu is None else number(record, "cpu_seconds", path),
        inputs={str(key): str(value) for key, value in inputs.items()},
    )


def _stage_of(name: str) -> str:
    """The stage of a record of the first format."""
    stem = name.removeprefix("evaluate.")
    for part in _PARTS:
        stem = stem.removesuffix(part)
    return "pairs" if stem == "pair" else stem


def _kind_of(command: Sequence[str], name: str) -> str:
    """What a process does, by its command: the last module, or the command of our command lines.

    >>> _kind_of(["-m", "accelerate.commands.launch", "-m", "mpo", "--config", "c.yaml"], "control")
    'mpo'
    >>> _kind_of(["-m", "mmpr", "sample", "q.jsonl"], "pairs.sample")
    'sample'
    """
    modules = [place for place, word in enumerate(command[:-1]) if word == "-m"]
    if not modules:
        return name
    module = command[modules[-1] + 1]
    if module in ("mmpr", "cascade", "internvl") and len(command) > modules[-1] + 2:
        return command[modules[-1] + 2]
    return module


def _word_after(command: Sequence[str], option: str) -> str | None:
    for word, after in pairwise(command):
        if word == option:
            return after
    return None
