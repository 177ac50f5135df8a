"""Runs the processes of a run, and writes down what became of them.

A process marked `background` (an evaluation) runs beside the next ones where the machine has room,
its output in `logs/`; the run ends when all have. `run.lock` is held by the driver and by every
process that it started, so one that outlives a killed driver is not started twice.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import yaml

from cascade.manifest import Manifest
from cascade.processes import end_tree
from cascade.stages import Choice, Decision, Stage, decide, new_record
from internvl.errors import UserError


@contextmanager
def run_lock(run: Path) -> Iterator[int]:
    """Hold the run's lock; its descriptor is for the processes to inherit.

    Raises `UserError` while another driver, or a process that outlived one, holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / "run.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run}: another process of this run is alive; wait for it, or end it first"
            ) from None
        yield file.fileno()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM raises SystemExit in the block, so that what was started is ended, too."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Running:
    """A process, its record, and when it was started; code is None while it runs."""

    stage: Stage
    record: dict[str, Any]
    process: subprocess.Popen[bytes]
    start: float
    log: Path | None
    code: int | None = None

    def has_ended(self) -> bool:
        """Whether the process has been waited for."""
        return self.code is not None

    def wait(self, ended: SimpleQueue[_Running]) -> None:
        """Wait for the process; its time and that of all that it waited for go into the record."""
        _, status, usage = os.wait4(self.process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        record = self.record
        record["done"] = code == 0
        record["timed"] += 1
        record["seconds"] = round(record["seconds"] + time.monotonic() - self.start, 1)
        cpu = usage.ru_utime + usage.ru_stime
        record["cpu_seconds"] = round(record["cpu_seconds"] + cpu, 1)
        self.process.returncode = self.code = code
        ended.put(self)


class Driver:
    """Runs processes in order, at most one of them in the background.

    manifest: of the run. can_overlap: whether a background process may run beside another one. env:
    added to the processes' environment where it has no value. gates: whether they are looked at.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        can_overlap: bool,
        env: Mapping[str, str] | None = None,
        gates: bool = True,
    ):
        self.manifest = manifest
        self.env = {**(env or {}), **os.environ}
        self.run = manifest.path.parent
        self.can_overlap = can_overlap
        self.gates = gates
        self._ended: SimpleQueue[_Running] = SimpleQueue()
        self._alive: list[_Running] = []
        self._behind: _Running | None = None
        self._failed: UserError | None = None

    def run_stages(self, stages: Sequence[Stage], choice: Choice | None = None) -> None:
        """Run the processes that are not done, under the run's lock.

        Raises `UserError` when one fails or a gate does not let the run go on.
        """
        with run_lock(self.run) as lock:
            self.run_locked(stages, lock, choice)

    def run_locked(self, stages: Sequence[Stage], lock: int, choice: Choice | None = None) -> None:
        """The same where the lock is held already."""
        start = time.monotonic()
        try:
            with ended_by_sigterm():
                decisions, keys = decide(stages, self.manifest, choice or Choice())
                for stage, decision in zip(stages, decisions, strict=True):
                    self._run_one(stage, decision, keys, lock)
                self._finish_background()
        finally:
            self._end_all()
            self.manifest.add_time(time.monotonic() - start)

    def _run_one(
        self, stage: Stage, decision: Decision, keys: Mapping[str, str], lock: int
    ) -> None:
        if decision.action in ("skip", "leave"):
            if decision.action == "skip":
                print(f"== {stage.name}: {decision.why}, not run again")
                if stage.gate is not None:
                    self._finish_background()  # the gate may look at what it writes
                self._check_gate(stage)
            return
        if self._failed is not None:
            raise self._failed
        if self._behind is not None and (
            stage.background
            or stage.gate is not None  # it looks at an earlier evaluation, too
            or self._behind.stage.name in stage.needs
        ):
            self._finish_background()
        record = self._prepare(stage, decision, keys)
        self.manifest.put(record)
        running = self._start(stage, record, lock)
        if running.log is None:
            self._wait_for(running)
        else:
            self._behind = running

    def _prepare(self, stage: Stage, decision: Decision, keys: Mapping[str, str]) -> dict[str, Any]:
        """The record of a process about to start, or to go on; removes what another key's left."""
        before = self.manifest.entry(stage.name)
        if decision.action == "start":
            self.manifest.forget(stage.name)  # a kill from here on: the old result is not done
            before = None
            if stage.owns is None and stage.folder.exists():
                shutil.rmtree(stage.folder)
            for path in stage.owns or ():
                path.unlink(missing_ok=True)
        stage.folder.mkdir(parents=True, exist_ok=True)
        if stage.config is not None:
            assert stage.config_file is not None
            stage.config_file.parent.mkdir(parents=True, exist_ok=True)
            stage.config_file.write_text(config_text(stage.config))
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return new_record(stage, before, keys[stage.name], keys, started)

    def _start(self, stage: Stage, record: dict[str, Any], lock: int) -> _Running:
        hidden = stage.background and self.can_overlap
        log = self.run / "logs" / f"{stage.name}.log" if hidden else None
        where = f" (in the background, see {log})" if log else ""
        print(f"\n== {stage.name}{where}: python {' '.join(stage.command)}", flush=True)
        command = [sys.executable, *stage.command]
        start = time.monotonic()
        if log is None:
            process = subprocess.Popen(command, pass_fds=[lock], env=self.env)
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, pass_fds=[lock], env=self.env, stdout=out, stderr=subprocess.STDOUT
                )
        running = _Running(stage, record, process, start, log)
        self._alive.append(running)
        Thread(target=running.wait, args=[self._ended], daemon=True).start()
        return running

    def _wait_for(self, awaited: _Running) -> None:
        """Wait until this process has ended; what ends beside it is written down at once.

        A gate that closes meanwhile ends the process: it goes on when the run does.
        """
        while True:
            ended = self._ended.get()
            self._alive.remove(ended)
            self.manifest.put(ended.record)
            if ended is self._behind:
                self._behind = None
            if ended.code:
                error = _failure(ended)
                if ended is awaited:
                    raise error
                self._failed = error  # told when what runs now is done: nothing of it is lost
            else:
                self._check_gate(ended.stage)
            if ended is awaited:
                return

    def _finish_background(self) -> None:
        if self._behind is not None:
            self._wait_for(self._behind)
        if self._failed is not None:
            raise self._failed

    def _check_gate(self, stage: Stage) -> None:
        if self.gates and stage.gate is not None:
            stage.gate()

    def _end_all(self) -> None:
        """End what still runs, with all that it started."""
        for running in self._alive:
            if running.code is None:
                end_tree(running.process.pid, running.has_ended)
        while self._alive:
            ended = self._ended.get()
            self._alive.remove(ended)
            self.manifest.put(ended.record)


def config_text(config: Mapping[str, Any]) -> str:
    """A process's configuration file."""
    return str(yaml.safe_dump(dict(config), sort_keys=False))


def _failure(ended: _Running) -> UserError:
    shown = f"; its output is in {ended.log}" if ended.log else ""
    return UserError(
        f"stage {ended.stage.name} ended with code {ended.code}{shown}. Start the same "
        "command again to go on from there"
    )
