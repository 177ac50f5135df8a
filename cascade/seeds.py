"""A recipe with several seeds: a run each in <output>/seed-N, some at a time; then the ablation.

Each is a `cascade run` of its own, its output in seed-N/run.log; here stands which process it is
at. One that fails does not stop the others: what became of it is told, and stands in ablation.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cascade.driver import ended_by_sigterm, run_lock
from cascade.gates import GateError
from cascade.processes import cores, end_tree
from cascade.recipe import Recipe
from cascade.run import RunOptions
from internvl.data import write_json
from internvl.errors import UserError

_PAUSE = 0.2  # seconds between two looks at the runs


def seed_folder(output: Path, seed: int) -> Path:
    """Where the run of a seed lies."""
    return output / f"seed-{seed}"


def run_seeds(recipe: Recipe, output: Path, options: RunOptions) -> None:
    """Run what is left of every seed, and write what the recipe's arms came to.

    Raises `UserError` when all have ended and one has failed; `GateError` where nothing but gates
    stopped them.
    """
    with run_lock(output) as lock, ended_by_sigterm():
        runs = _Runs(recipe, output, options, lock)
        failed = runs.run_all()
    for seed, reason in failed.items():
        print(f"seed {seed} failed: {reason}", file=sys.stderr)
    if recipe.arms:
        from cascade.ablation import write_ablation

        print(write_ablation(recipe, output, failed))
    from cascade.report import write_report

    print(f"the page over all seeds: {write_report(output, many=True)}")
    if failed:
        seeds = ", ".join(map(str, failed))
        gated = runs.codes == {GateError.exit_code}
        raise (GateError if gated else UserError)(
            f"seed {seeds} of {output} failed; start the same command again to go on from there"
        )


@dataclass
class _Run:
    seed: int
    process: subprocess.Popen[bytes]
    log: Path
    said: int  # bytes of the log that earlier starts wrote
    told: int  # bytes of the log whose processes were told
    start: float


class _Runs:
    def __init__(self, recipe: Recipe, output: Path, options: RunOptions, lock: int):
        self.recipe, self.output, self.options, self.lock = recipe, output, options, lock
        self.anew = _Anew(output / "anew.json", recipe.seeds, options.start)
        self.alive: list[_Run] = []
        self.failed: dict[int, str] = {}
        self.codes: set[int] = set()

    def run_all(self) -> dict[int, str]:
        """{seed: why it failed}."""
        waiting = list(self.recipe.seeds)
        try:
            while waiting or self.alive:
                while waiting and len(self.alive) < self.recipe.parallel:
                    self.alive.append(self._start(waiting.pop(0)))
                time.sleep(_PAUSE)
                for run in self.alive:
                    _tell_processes(run)
                for run in [run for run in self.alive if run.process.poll() is not None]:
                    self._finish(run)
        finally:
            for run in self.alive:
                process = run.process
                end_tree(process.pid, lambda process=process: process.poll() is not None)  # type: ignore[misc]
        return dict(sorted(self.failed.items()))

    def _start(self, seed: int) -> _Run:
        folder = seed_folder(self.output, seed)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "run.log"
        said = log.stat().st_size if log.exists() else 0
        options = replace(self.options, start=self.anew.start_of(seed))
        command = [sys.executable, *seed_command(self.recipe, folder, seed, options)]
        print(f"== seed {seed} (see {log}): python {' '.join(command[1:])}", flush=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
                env=self._environment(),
            )
        return _Run(seed, process, log, said, said, time.monotonic())

    def _environment(self) -> Mapping[str, str]:
        """Several runs on one machine have a thread a process, unless it is said otherwise."""
        threads = {"OMP_NUM_THREADS": "1"} if self.recipe.parallel > 1 else {}
        return {**threads, **self.recipe.environment, **os.environ}

    def _finish(self, run: _Run) -> None:
        self.alive.remove(run)
        _tell_processes(run)
        seconds = f"{time.monotonic() - run.start:.0f} s"
        if run.process.returncode:
            self.codes.add(run.process.returncode)
            reason = _last_error(run.log, run.said)
            self.failed[run.seed] = f"{reason} (code {run.process.returncode})"
            print(f"== seed {run.seed} failed after {seconds}: {self.failed[run.seed]}", flush=True)
        else:
            if not self.options.only:
                self.anew.end(run.seed)
            print(f"== seed {run.seed} is done ({seconds})", flush=True)


class _Anew:
    """Which seeds have still to begin anew, after a --from that did not end well for all of them.

    Given once more, it is handed to those alone: what the others have made of it stays.
    """

    def __init__(self, file: Path, seeds: Sequence[int], start: str | None):
        self.file, self.start = file, start
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.left: list[int] = known.get("left", [])
        if start is not None and known.get("start") != start:
            self.left = list(seeds)
            write_json(file, {"start": start, "left": self.left})
        self._start = known.get("start") if start is None else start

    def start_of(self, seed: int) -> str | None:
        """--from for this seed, or None."""
        return self.start if seed in self.left else None

    def end(self, seed: int) -> None:
        """The seed's run has ended well."""
        if seed in self.left:
            self.left.remove(seed)
            write_json(self.file, {"start": self._start, "left": self.left})
        if not self.left:
            self.file.unlink(missing_ok=True)


def seed_command(recipe: Recipe, folder: Path, seed: int, options: RunOptions) -> Sequence[str]:
    """The arguments of a `cascade run` of one seed, after the interpreter."""
    words = ["-m", "cascade", "run", str(recipe.file), "--seed", str(seed)]
    words += ["--output", str(folder)]
    words += [word for name in options.extra for word in ("--with", name)]
    words += [word for name in options.only for word in ("--only", name)]
    words += ["--from", options.start] if options.start is not None else []
    words += ["--backend", options.backend] if options.backend is not None else []
    words += [] if options.gates else ["--no-gate"]
    overlap = options.overlap if options.overlap is not None else recipe.overlap
    if overlap is None and recipe.parallel >= cores():
        overlap = False
    if overlap is not None:
        words += ["--overlap", "on" if overlap else "off"]
    return words


def _tell_processes(run: _Run) -> None:
    """A line for each process that has begun, or was done before, since the last look."""
    size = run.log.stat().st_size
    if size == run.told:
        return
    with run.log.open("rb") as file:
        file.seek(run.told)
        lines, end, _ = file.read(size - run.told).rpartition(b"\n")
    run.told += len(lines) + len(end)
    for line in lines.decode(errors="replace").splitlines():
        name, colon, rest = line.removeprefix("== ").partition(":")
        if line.startswith("== ") and colon:
            done = ": done before" if rest.startswith(" done before") else ""
            print(f"seed {run.seed}: {name}{done}", flush=True)


def _last_error(log: Path, start: int) -> str:
    """What a run ended with, in what it wrote from this byte on."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or ["it said nothing"])[-1]
