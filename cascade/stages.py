"""The processes of a run: what each one is, what stands for its result, and why it runs anew.

A process has a key: the hash of its command, its configuration, its inputs' contents and the keys
of the processes it needs. One that is finished with the same key is not run again; with another key
its folder is emptied and it runs anew, and so does all that needs it. One that was killed has its
key in the manifest without `done`: its folder is kept, and the command itself goes on where it was.
The run's own folder and the inputs' places are no part of a key, so a run may be moved; folders of
images count by their way from the recipe's folder, so it may be started from any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cascade.manifest import Manifest
from cascade.recipe_stage import OUTPUT_PATHS, ROOTS
from internvl.errors import UserError


@dataclass
class Stage:
    """One process of a run.

    name: unique in the run. command: arguments after the interpreter. folder: what it writes.
    config: options written to `config_file` before the start. needs: names of the processes whose
    results it reads. background: nothing soon needs it. stage, kind: the recipe's stage that it
    is a part of, and what it does there. inputs: files whose content decides. owns: what is removed
    before it runs anew; None: the whole folder. salt: what else decides. home: the folder that
    paths of the recipe start from. gate: called when it is done; raises where the run must not go
    on.
    """

    name: str
    command: list[str]
    folder: Path
    needs: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    config_file: Path | None = None
    background: bool = False
    stage: str = ""
    kind: str = ""
    inputs: tuple[Path, ...] = ()
    owns: tuple[Path, ...] | None = None
    salt: str = ""
    home: Path = Path()
    gate: Callable[[], None] | None = field(default=None, compare=False)

    @cached_property
    def digests(self) -> dict[str, str]:
        """{input: hash of its content}."""
        from cascade.inputs import digest_input

        return {str(path): digest_input(path) for path in self.inputs}

    def key(self, run: Path, keys: Mapping[str, str]) -> str:
        """The hash that stands for this process's result."""
        plain = _Plain(run, self.home, self.digests)
        material: list[Any] = [plain.of(self.command), plain.of(self.config)]
        material += [[keys[name] for name in self.needs], sorted(self.digests.values()), self.salt]
        return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:16]


class _Plain:
    """Values with the run's folder and the inputs' places taken out."""

    def __init__(self, run: Path, home: Path, digests: Mapping[str, str]):
        self.run, self.home, self.digests = str(run), home, digests

    def of(self, value: Any, option: str = "") -> Any:
        """A value as it stands in a key; option: the one whose value it is."""
        if isinstance(value, list):
            before = [option, *value]
            return [self.of(item, str(word)) for word, item in zip(before, value, strict=False)]
        if isinstance(value, dict):
            return {key: self.of(item, key) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        if value in self.digests:
            return f"sha256:{self.digests[value]}"
        if value == self.run or value.startswith(f"{self.run}/"):
            return "{run}" + value[len(self.run) :]
        return self._from_home(value) if option.removeprefix("--") in _NOT_READ else value

    def _from_home(self, value: str) -> str:
        """A path whose content is not looked at: the same from wherever a run is started."""
        way = os.path.relpath(value, self.home)
        return os.path.abspath(value) if way.split(os.sep)[0] == os.pardir else f"./{way}"


_NOT_READ = (*ROOTS, *OUTPUT_PATHS)


@dataclass(frozen=True)
class Choice:
    """Which processes a start may run.

    names: these only, the others are taken as they are; None: all.
    """

    names: Collection[str] | None = None


class Decision(NamedTuple):
    """What becomes of a process, and why.

    skip: it is done. leave: it was not asked for. start: it begins anew. resume: it goes on.
    """

    action: Literal["skip", "leave", "start", "resume"]
    why: str


def decide(
    stages: Sequence[Stage], manifest: Manifest, choice: Choice
) -> tuple[list[Decision], dict[str, str]]:
    """What a start does with each process, and their keys.

    Raises `UserError` where a process that is asked for needs one that is neither asked for nor
    done, and where its folder holds what no run is known to have made.
    """
    keys: dict[str, str] = {}
    running: set[str] = set()
    decisions = []
    run = manifest.path.parent
    for stage in stages:
        record = manifest.entry(stage.name)
        if choice.names is not None and stage.name not in choice.names:
            done = record is not None and record["done"]
            if done:
                assert record is not None
                keys[stage.name] = record["key"]
            why = "not asked for; done before" if done else "not asked for"
            decisions.append(Decision("leave", why))
            continue
        for need in stage.needs:
            if need not in keys:
                raise UserError(f"{stage.name} needs {need}, which has not been run to its end")
        if record is None:
            _refuse_others(stage, manifest)
        key = keys[stage.name] = stage.key(run, keys)
        decisions.append(_decision(stage, record, key, keys, running))
        if decisions[-1].action in ("start", "resume"):
            running.add(stage.name)
    return decisions, keys


def _refuse_others(stage: Stage, manifest: Manifest) -> None:
    """A folder is emptied before a process starts: not one that this run did not make."""
    if stage.owns is not None or any(r["stage"] == stage.stage for r in manifest.data["stages"]):
        return
    if stage.folder.is_dir() and any(stage.folder.iterdir()):
        raise UserError(
            f"{stage.folder} is there, {manifest.path} does not know it, and {stage.name} would "
            "empty it; move it away, or choose another --output"
        )


def _decision(
    stage: Stage,
    record: Mapping[str, Any] | None,
    key: str,
    keys: Mapping[str, str],
    running: Collection[str],
) -> Decision:
    if record is None:
        return Decision("start", "has not been run")
    if record["key"] == key and record["done"]:
        if stage.folder.exists():
            return Decision("skip", f"done before ({record['seconds']:.0f} s)")
        return Decision("start", f"its folder {stage.folder} is gone")
    if record["key"] == key:
        return Decision("resume", "was begun, goes on")
    if not record["key"]:
        return Decision("start", "is to be run anew")
    return Decision("start", _differences(stage, record, keys, running))


def _differences(
    stage: Stage,
    record: Mapping[str, Any],
    keys: Mapping[str, str],
    running: Collection[str],
) -> str:
    """In a few words: what is not as it was when the record was made."""
    found = [
        f"{need} {'runs' if need in running else 'ran'} anew"
        for need in stage.needs
        if record["needs"].get(need) != keys[need]
    ]
    before, now = record["config"] or {}, stage.config or {}
    found += [
        f"{name} was {before.get(name, 'not given')!r}, is {now.get(name, 'not given')!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if record["command"] != stage.command:
        was = [word for word in record["command"] if word not in stage.command]
        is_now = [word for word in stage.command if word not in record["command"]]
        found.append(f"command: {' '.join(was) or '-'} -> {' '.join(is_now) or '-'}")
    old = set(record["inputs"].values())
    found += [f"{path} has changed" for path, h in stage.digests.items() if h not in old]
    return "; ".join(found) or "what decides its result has changed"


def new_record(
    stage: Stage, before: Mapping[str, Any] | None, key: str, keys: Mapping[str, str], started: str
) -> dict[str, Any]:
    """The manifest's record of a process that is about to start; before: of one that goes on."""
    spent = before or {"seconds": 0.0, "cpu_seconds": 0.0, "starts": 0, "timed": 0}
    return {
        "name": stage.name,
        "stage": stage.stage or stage.name,
        "kind": stage.kind,
        "command": stage.command,
        "config": stage.config,
        "needs": {name: keys[name] for name in stage.needs},
        "inputs": stage.digests,
        "key": key,
        "done": False,
        "started": started,
        # a start whose driver was killed with it is counted, but its time is not known
        "starts": spent["starts"] + 1,
        "timed": spent["timed"],
        "seconds": spent["seconds"],
        "cpu_seconds": spent["cpu_seconds"],
    }
