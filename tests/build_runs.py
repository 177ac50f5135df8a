"""`mmpr build` in a process of its own, by a slow sampler without a model, or by a real one.

The fork server has everything imported, so a start costs a fraction of a second. What kills it is a
real SIGKILL after some seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl.errors import DataError
from internvl.hashing import stable_hash
from internvl.sampler import Completion

SECONDS = 120  # more is a hang
PRELOAD = ["mmpr.cli", "mmpr.sample", "internvl.sampler", "yaml"]
ENGINE = ["torch", "transformers", "internvl.hf_sampler"]
FORMULAS = ("\\frac{1}{2}", "\\sqrt{4}", "x^2", "9")


class SeededSampler:
    """Answers from the request alone, a little later; says in `asked` what it was asked."""

    name = "transformers"

    def __init__(self, asked: Path, pause: float):
        self.asked, self.pause = asked, pause

    def stream(
        self, requests: Iterable[Any], config: Any, *, ahead: int | None = None
    ) -> Iterator[tuple[int, list[Completion] | DataError]]:
        for number, request in enumerate(requests):
            with self.asked.open("a") as out:
                out.write(f"{request.seed}\n")
            time.sleep(self.pause)
            try:
                list(request.images)  # decoded here, as the real ones do
            except DataError as error:
                yield number, error
                continue
            yield number, [self.answer(request.seed, index) for index in range(config.n)]

    def answer(self, seed: int, index: int) -> Completion:
        value = stable_hash(seed, index) % 5
        text = f"I see é and {FORMULAS[value % 4]}."
        if value < 4:
            text += f" Final Answer: {FORMULAS[(value + index) % 4]}"
        return Completion(text, (value, 7), (-0.5, -0.1), "stop")

    def close(self) -> None:
        pass


class Listed:
    """A real sampler that says in `asked` what it was asked."""

    def __init__(self, sampler: Any, asked: Path):
        self.sampler, self.asked, self.name = sampler, asked, sampler.name

    def stream(self, requests: Iterable[Any], config: Any, **more: Any) -> Any:
        return self.sampler.stream(self._listed(requests), config, **more)

    def _listed(self, requests: Iterable[Any]) -> Iterator[Any]:
        for request in requests:
            with self.asked.open("a") as out:
                out.write(f"{request.seed}\n")
            yield request

    def close(self) -> None:
        self.sampler.close()


def _child(recipe: Path, asked: Path, pause: float | None, log: Path) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from internvl import sampler
    from mmpr import cli

    real = sampler.open_sampler

    def open_sampler(*args: Any, **kwargs: Any) -> Any:
        if pause is None:
            return Listed(real(*args, **kwargs), asked)
        return SeededSampler(asked, pause)

    sampler.open_sampler = open_sampler  # type: ignore[assignment]
    cli.main(["build", str(recipe)])


@dataclass
class BuildRun:
    """One build, started as often as it is killed.

    pause: seconds of the slow sampler's question; None for the model that the recipe names.
    """

    recipe: Path
    pause: float | None = 0.0

    def start(self, seconds: float | None = None) -> tuple[int, str]:
        """Run to the end or until a SIGKILL after `seconds`; the exit code and what was printed.

        Asserts that no question is asked again whose completions were on disk.
        """
        folder = self.recipe.parent
        asked, log = folder / "asked.txt", folder / "build.log"
        asked.unlink(missing_ok=True)
        on_disk = self.whole_questions()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD if self.pause is not None else [*PRELOAD, *ENGINE])
        process = context.Process(target=_child, args=(self.recipe, asked, self.pause, log))
        process.start()
        process.join(SECONDS if seconds is None else seconds)
        hung = process.is_alive() and seconds is None
        process.kill()
        process.join()
        assert not hung, log.read_text()
        again = set(asked.read_text().split()) if asked.exists() else set[str]()
        assert not again & on_disk
        assert process.exitcode is not None
        return process.exitcode, log.read_text() if log.exists() else ""

    def whole_questions(self) -> set[str]:
        """The seeds of the questions whose completions are on disk, all of them."""
        rollouts = self.recipe.parent / "out" / "rollouts.jsonl"
        if not rollouts.exists():
            return set()
        seeds: list[str] = []
        for line in rollouts.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                seeds.append(str(json.loads(line)["seed"]))
        return {seed for seed in seeds if seeds.count(seed) == SAMPLES}


SAMPLES = 3
