"""All checks of a recipe in order: what one finds out, the next ones use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cascade.doctor.data import DataFile, Scanned, check_files, is_given
from cascade.doctor.environment import (
    Demand,
    check_environment,
    gib,
    has_vllm,
    vllm_on_cpu,
)
from cascade.doctor.facts import Facts
from cascade.doctor.findings import Finding, error, ok, some, warning
from cascade.doctor.leaks import check_gold, check_leak
from cascade.doctor.memory import check_memory, disk_bytes, this_device
from cascade.doctor.options import (
    check_budgets,
    check_lengths,
    check_precision,
    check_references,
)
from cascade.doctor.starts import Checkpoints, Say
from cascade.recipe import StageSpec
from internvl.adapters import is_adapter
from internvl.errors import UserError
from internvl.memory import count_lora

if TYPE_CHECKING:
    from cascade.doctor.engine import Bench
    from internvl.data import Row
    from internvl.encoding import Encoder
    from internvl.sampler import Backend

QUESTIONS = 6  # that trainer and engine are compared on
_COPIES = 3  # of the weights that the engine checks hold: trainer, sampler, what was saved


class Examination:
    """One look at a recipe.

    quick: nothing is started, neither an engine nor a stage. say: told what is done next.
    """

    def __init__(self, facts: Facts, *, quick: bool, say: Say):
        self.facts, self.quick, self._say = facts, quick, say
        self.scanned: list[Scanned] = []
        self.checkpoints = Checkpoints(facts, quick=quick, say=say)
        self._commands: dict[str, list[str]] = {}  # of the run's processes, by their names

    def run(self) -> list[Finding]:
        """The findings of all checks, in order."""
        if self.quick:
            return self._still(self._begin(), [])
        with ThreadPoolExecutor(1) as pool:  # processes of the stages' commands, beside the checks
            asked = pool.submit(self._options)
            checkpoints = self._begin()
            findings = self._still(checkpoints, asked.result())
            return findings + self._engine(pool, findings)

    def _begin(self) -> list[Finding]:
        """What the recipe begins with: its worlds, a little of each, and its checkpoints."""
        self._say("worlds and checkpoints")
        self.facts.make_worlds()
        return self.checkpoints.check()

    def _still(self, checkpoints: list[Finding], options: list[Finding]) -> list[Finding]:
        """What starts nothing, the checkpoints' and options' findings in their place."""
        self._say("environment and recipe")
        findings = self._environment() + options + self._recipe() + checkpoints
        self._say("data")
        findings += self._data()
        self._say("memory")
        return findings + self._memory()

    # ---- seconds ----

    def _environment(self) -> list[Finding]:
        launches = [self.facts.launch(spec) for spec in self.facts.training]
        option = self.facts.option
        workers = [int(option(spec, "dataloader_num_workers")) for spec in self.facts.training]
        busiest = max(
            self.facts.training,
            key=lambda spec: int(option(spec, "dataloader_num_workers")),
            default=None,
        )
        demand = Demand(
            processes=max((launch.here for launch in launches), default=1),
            workers=max(workers, default=0),
            examples=int(option(busiest, "per_device_train_batch_size")) if busiest else 1,
            disk=sum(map(self._disk, self.facts.training)),
        )
        return check_environment(self.facts.output, demand)

    def _disk(self, spec: StageSpec) -> int:
        folder = self.checkpoints.folder_of(spec)
        if folder is None:
            return 0
        config, parts = self.checkpoints.model(folder)
        trained = parameters = sum(parts.values())
        if self.facts.option(spec, "use_peft"):
            trained = count_lora(config, int(self.facts.option(spec, "lora_r")))
        return disk_bytes(self.facts, spec, parameters, trained) * len(self.facts.recipe.seeds)

    def _recipe(self) -> list[Finding]:
        from cascade.inputs import missing_inputs

        facts, found = self.facts, []
        missing: dict[Path, list[str]] = {}  # a file is named by many stages
        for spec in facts.stages.values():
            for key, path in missing_inputs(spec):
                missing.setdefault(path, []).append(f"{spec.name}.{key}")
        for path, keys in missing.items():
            told = f"{path} is not there (stages.{some(keys)})"
            cure = "put it there, or write its path from the recipe's folder"
            found.append(error("recipe.inputs", told, str(facts.recipe.file), cure=cure))
        if facts.recipe.backend == "vllm" and not has_vllm():
            cure = "make .venv VLLM=cpu (or cuda), or backend: auto"
            told = "backend is vllm, which is not installed"
            found.append(error("recipe.backend", told, str(facts.recipe.file), cure=cure))
        found += check_budgets(facts)
        found += check_precision(facts)
        found += check_references(facts)
        return found

    def _options(self) -> list[Finding]:
        """What the stages' own parsers say of their options."""
        from cascade.check_options import check_options
        from cascade.plan import plan

        recipe = self.facts.recipe
        try:
            stages = plan(recipe, self.facts.output, recipe.seeds[0], extra=self.facts.extra)
        except UserError as fault:
            told, cure = str(fault), "put the file there, or change that line"
            return [error("recipe.plan", told, str(recipe.file), cure=cure)]
        checked = check_options(stages, {**recipe.environment, **os.environ})
        self.facts.resolved = checked.options
        self._commands = {stage.name: stage.command for stage in stages}
        cure = "change that line; --help of the stage's command lists its options"
        found = [error("recipe.options", told, name, cure=cure) for name, told in checked.faults]
        told = f"the options of {len(stages)} processes are options of their commands"
        return found or [ok("recipe.options", told, str(recipe.file))]

    # ---- data ----

    def _data(self) -> list[Finding]:
        from rewards.judging import Verifier
        from rewards.pool import VerifierPool

        files = [file for file in self.facts.files() if is_given(file.path)]
        with Verifier(VerifierPool(1)) as verifier:
            found, self.scanned = check_files(files, self._encoder_of, self._answer_fault(verifier))
            for scanned in self.scanned:
                if scanned.file.answers:
                    found += check_gold(scanned, verifier)
        held = self.facts.held_out()
        learned = [one for one in self.scanned if one.file.trained]
        for scanned in self.scanned:
            if scanned.file.path in held:
                found += check_leak(scanned, learned)
        for name, paths in self.facts.same_names().items():
            told = f"{len(paths)} files of held-out questions are named {name}: one data set to an "
            told += "evaluation, which stops where an id stands in both"
            cure = 'name them apart, or give their questions a "dataset"'
            found.append(warning("data.names", told, some([str(p) for p in paths], 2), cure=cure))
        encoder = self.checkpoints.encoder(self.checkpoints.main)
        return found + check_lengths(self.facts, self.scanned, encoder)

    def _answer_fault(self, verifier: Any) -> Callable[[Mapping[str, Any]], str | None]:
        """What keeps a question from being judged; a judge is the recipe's affair."""
        from rewards.judging import names_judge

        return lambda record: None if names_judge(record) else verifier.fault(record)

    def _encoder_of(self, file: DataFile) -> Encoder | None:
        """What counts the tokens of a file's rows as its first stage does."""
        name = file.stages[0].removeprefix("evaluate.")
        spec = self.facts.recipe.stages[name]
        tiles = None
        if spec.kind in ("sft", "mpo", "rl"):
            tiles = int(self.facts.option(spec, "max_tiles"))
        elif spec.kind in ("pairs", "select"):
            tiles = int(self.facts.sampling(spec)["max-tiles"])
        return self.checkpoints.encoder(self.checkpoints.folder_of(spec), tiles or 12)

    # ---- memory ----

    def _memory(self) -> list[Finding]:
        device = this_device()
        if device is None:
            told = "how much memory this machine has cannot be told (no /proc/meminfo)"
            return [warning("memory.stage", told, cure="see internvl info CKPT for the estimate")]
        found: list[Finding] = []
        for spec in self.facts.training:
            folder = self.checkpoints.folder_of(spec)
            if folder is not None:
                found += check_memory(self.facts, spec, *self.checkpoints.model(folder), device)
        return found

    # ---- what starts something ----

    def _engine(self, pool: ThreadPoolExecutor, findings: Sequence[Finding]) -> list[Finding]:
        """Trainer and engine side by side, and beside them one step of each MPO stage.

        findings: so far; a stage whose options are refused, or that has no room, is not started.
        """
        broken = {f.where.removeprefix("stages.") for f in findings if f.level == "error"
                  and f.code in ("recipe.options", "memory.stage")}  # fmt: skip
        folder, rows = self.checkpoints.main, self._questions()
        if folder is None or not rows:
            told = "there is no checkpoint that can be loaded" if folder is None else "no questions"
            cure = "mend what is said above; then the engine can be looked at"
            return [warning("engine.skipped", f"{told}: the engine was not started", cure=cure)]
        if fault := self._no_room(folder):
            return [fault]
        import torch

        self._say("one step of MPO, trainer and engine side by side")
        stages = [spec for spec in self._mpo_stages() if spec.name not in broken]
        steps = [pool.submit(self._first_loss, spec, rows) for spec in stages]
        if torch.cuda.is_available():
            wait(steps)  # one after the other: each takes the GPU's memory
        found, hours = self._side_by_side(folder, rows)
        return found + [finding for step in steps for finding in step.result()] + hours

    def _mpo_stages(self) -> list[StageSpec]:
        """The MPO stages that begin with a checkpoint that is there."""
        return [
            spec
            for spec in self.facts.training
            if spec.kind == "mpo"
            and spec.model is not None
            and self.checkpoints.is_sound(self.facts.start(spec.model))
        ]

    def _first_loss(self, spec: StageSpec, questions: Sequence[Row]) -> list[Finding]:
        from cascade.doctor.first_loss import check_first_loss

        assert spec.model is not None
        start = self.facts.start(spec.model)
        pairs = [one for one in self.scanned
                 if one.file.kind == "pair" and spec.name in one.file.stages]  # fmt: skip
        rows = [pairs[0].rows[n] for n in pairs[0].sample(QUESTIONS)] if pairs else questions
        model = start.folder if is_adapter(start.folder) else self.checkpoints.folders[start]
        return check_first_loss(
            spec.name,
            self.facts.plain_options(spec),
            rows,
            model=model,
            folder=self.facts.scratch / f"first-loss-{spec.name}",
            command=self._commands.get(spec.name, []),
            launch=self.facts.launch(spec),
            environment=self.facts.recipe.environment,
        )

    def _side_by_side(
        self, folder: Path, rows: Sequence[Row]
    ) -> tuple[list[Finding], list[Finding]]:
        """What the engine checks find, and the hours by the speeds that they saw."""
        import torch

        from cascade.doctor.engine import Bench, check_engine
        from cascade.doctor.hours import Hours, measure

        syncs = any(spec.kind == "rl" for spec in self.facts.training)
        try:
            bench = Bench.open(folder, rows, max_tiles=self._tiles(), backend=self._backend())
        except UserError as fault:
            cure = "backend: transformers, or mend the engine: make .venv VLLM=cpu (or cuda)"
            return [error("engine.start", str(fault), str(folder), cure=cure)], []
        try:
            speeds = measure(bench)
            found = check_engine(bench, update=syncs and not self._is_tied(bench, folder))
        except torch.OutOfMemoryError as fault:
            told = f"trainer and engine do not fit beside each other: {str(fault).splitlines()[0]}"
            cure = "free the GPU, or run doctor with a smaller checkpoint of the family"
            return [warning("engine.skipped", told, str(folder), cure=cure)], []
        except UserError as fault:
            return [error("engine.run", str(fault), str(folder), cure="mend what it names")], []
        finally:
            bench.close()
        return found, Hours(self.facts, self.scanned, bench.encoder, speeds).findings()

    def _is_tied(self, bench: Bench, folder: Path) -> bool:
        """Whether an update is known not to reach the engine (told as checkpoint.tied)."""
        tied = bool(self.checkpoints.model(folder)[0].tie_word_embeddings)
        return tied and bench.sampler.name == "vllm" and vllm_on_cpu()

    def _questions(self) -> list[Row]:
        """A few questions of the recipe whose pictures are good; or conversations."""
        from cascade.doctor.questions import as_questions

        kinds = ("question", "pair", "conversation")
        for kind in kinds:
            for scanned in self.scanned:
                if scanned.file.kind == kind and (rows := as_questions(scanned, QUESTIONS)):
                    return rows
        return []

    def _tiles(self) -> int:
        training = self.facts.training
        return int(self.facts.option(training[-1], "max_tiles")) if training else 12

    def _backend(self) -> Backend:
        backend = self.facts.recipe.backend
        online = [spec for spec in self.facts.training if spec.kind == "rl"]
        if backend == "auto" and online:
            asked = self.facts.option(online[-1], "sampler")
            backend = asked if asked in ("vllm", "transformers") else "auto"
        return cast("Backend", backend)

    def _no_room(self, folder: Path) -> Finding | None:
        """Why the weights cannot be held here, or None."""
        device = this_device()
        parameters = sum(self.checkpoints.model(folder)[1].values())
        need = _COPIES * parameters * (2 if device is not None and device.gpu else 4)
        if device is None or need <= device.free:
            return None
        told = f"{gib(need)} GiB are needed to load it as trainer and engine, "
        told += f"{gib(device.free)} are free: the engine was not started"
        cure = "run doctor on the machine that will train"
        return warning("engine.skipped", told, str(folder), cure=cure)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what is made on the way; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cascade-doctor-") as folder:
        yield Path(folder)
