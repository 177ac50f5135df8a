"""Stages as processes, and the manifest that lets a killed run go on.

A stage is a command with a key: the hash of its command, its configuration and the keys of the
stages it needs. A finished stage with the same key is not run again; with another key its folder
is emptied and it runs anew, and so does all that needs it. A stage that was killed has its key in
the manifest without `done`: its folder is kept, and the command itself goes on where it was.

A stage marked `background` (an evaluation) runs beside the next ones where there is a second core,
its output in `logs/`; the run ends when all have. `run.lock` is held by the driver and by every
stage that it started, so a stage that outlives a killed driver is not started twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from internvl.data import write_json
from internvl.errors import UserError


@dataclass
class Stage:
    """One process of a run.

    name: unique in the run. command: arguments after the interpreter. folder: what the stage
    writes (emptied before it runs anew). config: options written to `config_file` before the
    start. needs: names of the stages whose results it reads. background: nothing soon needs it.
    """

    name: str
    command: list[str]
    folder: Path
    needs: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    config_file: Path | None = None
    background: bool = False

    def key(self, keys: dict[str, str]) -> str:
        """The hash that stands for this stage's result."""
        material = [self.command, self.config, [keys[name] for name in self.needs]]
        return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:16]


class Manifest:
    """`manifest.json` of a run: what ran, by which key, for how long."""

    def __init__(self, path: Path, seed: int, preset: str):
        self.path = path
        self.data: dict[str, Any] = {"seed": seed, "preset": preset, "seconds": 0.0, "stages": []}
        if path.is_file():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            same = (self.data["seed"], self.data["preset"]) == (seed, preset)
            if not same:
                raise UserError(
                    f"{path.parent} holds a run with seed {self.data['seed']} and preset "
                    f"{self.data['preset']!r}; choose another --output, or remove the folder"
                )

    def entry(self, name: str) -> dict[str, Any] | None:
        """A stage's record, or None."""
        return next((s for s in self.data["stages"] if s["name"] == name), None)

    def put(self, record: dict[str, Any]) -> None:
        """Add or replace a stage's record, and write the file."""
        stages = self.data["stages"]
        for place, stage in enumerate(stages):
            if stage["name"] == record["name"]:
                stages[place] = record
                break
        else:
            stages.append(record)
        write_json(self.path, self.data)

    def add_time(self, seconds: float) -> None:
        """Add to the run's wall time, over all the starts that it took."""
        self.data["seconds"] = round(self.data["seconds"] + seconds, 1)
        write_json(self.path, self.data)

    @property
    def seconds(self) -> float:
        """The run's wall time; stages that overlap are not counted twice."""
        return float(self.data["seconds"])


def _prepare(stage: Stage, manifest: Manifest, key: str) -> dict[str, Any]:
    """The record of a stage about to start, or to go on; empties the folder of another key's."""
    before = manifest.entry(stage.name)
    if before is None or before["key"] != key:
        if before is not None:  # a kill from here on must not leave the old result for done
            manifest.put({**before, "key": "", "done": False})
        if stage.folder.exists():
            shutil.rmtree(stage.folder)
        before = {"name": stage.name, "seconds": 0.0}
    stage.folder.mkdir(parents=True, exist_ok=True)
    if stage.config is not None:
        assert stage.config_file is not None
        stage.config_file.parent.mkdir(parents=True, exist_ok=True)
        stage.config_file.write_text(yaml.safe_dump(stage.config, sort_keys=False))
    return {
        **before,
        "command": stage.command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "key": key,
        "done": False,
    }


@contextmanager
def run_lock(run: Path) -> Iterator[int]:
    """Hold the run's lock; its descriptor is for the stages to inherit.

    Raises `UserError` while another driver, or a stage that outlived one, holds it.
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


@dataclass
class _Running:
    """A stage's process, its record, and when it was started."""

    stage: Stage
    record: dict[str, Any]
    process: subprocess.Popen[bytes]
    start: float
    log: Path | None
    end: float | None = None

    def wait(self) -> int:
        """Wait for the process and note when it ended; returns its exit code."""
        code = self.process.wait()
        if self.end is None:
            self.end = time.monotonic()
        return code


class Driver:
    """Runs stages in order, at most one of them in the background.

    manifest: of the run. can_overlap: whether a background stage may run beside another one (by
    default where there are two cores). env: added to the stages' environment where it has no value.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        can_overlap: bool | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.manifest = manifest
        self.env = {**(env or {}), **os.environ}
        self.run = manifest.path.parent
        self.can_overlap = (os.cpu_count() or 1) > 1 if can_overlap is None else can_overlap
        self._behind: _Running | None = None

    def run_stages(self, stages: Sequence[Stage]) -> None:
        """Run the stages that are not done; raises `UserError` when one fails."""
        keys: dict[str, str] = {}
        start = time.monotonic()
        with run_lock(self.run) as lock:
            try:
                for stage in stages:
                    keys[stage.name] = stage.key(keys)
                    self._run_one(stage, keys[stage.name], lock)
                self._finish_background()
            finally:
                if self._behind is not None:
                    self._behind.process.terminate()
                    self._behind.process.wait()
                self.manifest.add_time(time.monotonic() - start)

    def _run_one(self, stage: Stage, key: str, lock: int) -> None:
        before = self.manifest.entry(stage.name)
        if before is not None and before["key"] == key and before["done"]:
            print(f"== {stage.name}: done before ({before['seconds']:.0f} s), not run again")
            return
        if self._behind is not None and (
            stage.background or self._behind.stage.name in stage.needs
        ):
            self._finish_background()
        record = _prepare(stage, self.manifest, key)
        self.manifest.put(record)
        running = self._start(stage, record, lock)
        if running.log is None:
            self._finish(running)
        else:
            self._behind = running
            Thread(target=running.wait, daemon=True).start()  # notes the end when it comes

    def _start(self, stage: Stage, record: dict[str, Any], lock: int) -> _Running:
        hidden = stage.background and self.can_overlap
        log = self.run / "logs" / f"{stage.name}.log" if hidden else None
        where = f" (in the background, see {log})" if log else ""
        print(f"\n== {stage.name}{where}: python {' '.join(stage.command)}", flush=True)
        command = [sys.executable, *stage.command]
        start = time.monotonic()
        if log is None:
            return _Running(
                stage, record, subprocess.Popen(command, pass_fds=[lock], env=self.env), start, None
            )
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, pass_fds=[lock], env=self.env, stdout=out, stderr=subprocess.STDOUT
            )
        return _Running(stage, record, process, start, log)

    def _finish_background(self) -> None:
        if self._behind is not None:
            running, self._behind = self._behind, None
            self._finish(running)

    def _finish(self, running: _Running) -> None:
        """Wait for a stage and write down how it ended."""
        try:
            code = running.wait()
        except BaseException:  # an interrupt is the stage's, too: it has got it from the terminal
            running.process.terminate()
            running.process.wait()
            raise
        record = running.record
        record["done"] = code == 0
        assert running.end is not None
        record["seconds"] = round(record["seconds"] + running.end - running.start, 1)
        self.manifest.put(record)
        if code:
            shown = f"; its output is in {running.log}" if running.log else ""
            raise UserError(
                f"stage {running.stage.name} ended with code {code}{shown}. Start the same "
                "command again to go on from there"
            )
