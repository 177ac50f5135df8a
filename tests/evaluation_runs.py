"""`cascade evaluate` with a sampler that knows no model, and what it wrote."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cascade.cli import main
from internvl.data import write_jsonl
from internvl.errors import DataError, UserError
from internvl.hashing import stable_hash
from internvl.sampler import Completion


class FakeSampler:
    """Answers from the request and the settings alone, as a sampler with seeds does.

    The likelier answer is the gold one, which the question spells; asked for one word, or at
    temperature 0, it is often another one. backwards: so many are answered in reverse order.
    """

    name = "fake"

    def __init__(self, backwards: int = 3):
        self.backwards = backwards
        self.asked: list[str] = []
        self.closed = False

    def stream(self, requests: Any, config: Any, *, ahead: int) -> Any:
        numbered = enumerate(requests)
        while block := list(islice(numbered, self.backwards)):
            for number, request in reversed(block):
                self.asked.append(request.question)
                list(request.images)  # decoded, as a sampler does
                if "too long" in request.question:
                    yield number, DataError("the prompt has 9 tokens, and max_model_len is 8")
                else:
                    yield number, [self.answer(request, config, n) for n in range(config.n)]

    def answer(self, request: Any, config: Any, n: int) -> Completion:
        drawn = stable_hash(request.seed, n, config.temperature, request.question) % 10
        gold = request.question.split("is ")[1].split("?")[0]
        direct = "single word" in request.question
        value = gold if drawn < (3 if direct else 7) else str(drawn)
        text = value if direct else f"I see é.\nFinal answer: {value}"
        return Completion(text, (1,) * (2 + drawn), (), "length" if drawn == 9 else "stop")

    def close(self) -> None:
        self.closed = True


class Dying(FakeSampler):
    """Fails for good after some answers."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def stream(self, requests: Any, config: Any, *, ahead: int) -> Any:
        for answer in super().stream(requests, config, ahead=ahead):
            if not self.after:
                raise UserError("no server answers")
            self.after -= 1
            yield answer


def questions(folder: Path, number: int = 12, *, name: str = "heldout", **more: Any) -> Path:
    """A question file: the gold answers are 20, 21, .."""
    rows = [
        {"id": f"q{i}", "question": f"What is {20 + i}?", "answer": str(20 + i), **more}
        for i in range(number)
    ]
    write_jsonl(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def checkpoint(folder: Path) -> Path:
    """What looks like a checkpoint until it is opened."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def evaluate(
    monkeypatch: pytest.MonkeyPatch, files: Any, output: Path, *words: str, sampler: Any = None
) -> FakeSampler:
    """Run the command; returns the sampler that it was given (it need not have been opened)."""
    sampler = sampler or FakeSampler()
    monkeypatch.setattr("internvl.sampler.open_sampler", lambda *_, **__: sampler)
    paths = [files] if isinstance(files, Path) else files
    model = checkpoint(output.parent)
    main(
        [
            "evaluate",
            *map(str, paths),
            f"--model={model}",
            f"--output={output}",
            "--workers=1",
            *words,
        ]
    )
    return sampler  # type: ignore[no-any-return]


def predictions(folder: Path) -> list[dict[str, Any]]:
    """The prediction records of a folder."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json holds."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(capsys: pytest.CaptureFixture[str], run: Any) -> str:
    """What a command says that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    return capsys.readouterr().err
