"""How long each stage will take: what it has to do, by the speeds that were measured just now.

An estimate, and it says from what: a sampler that holds more requests than the few of the
measurement is faster, and so is a trainer on fuller micro-batches; a start of a process and the
optimizer's step come on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from cascade.doctor.data import Scanned
from cascade.doctor.engine import Bench
from cascade.doctor.facts import Facts
from cascade.doctor.findings import Finding, ok
from cascade.doctor.options import mean_tokens, reply_lengths
from cascade.recipe import StageSpec
from internvl.encoding import Encoder
from internvl.packing import pack

SAMPLES = 8  # a question
_QUESTIONS = 32  # that are measured, the few there are once more
_LONGEST = 64  # tokens of a measured completion
_BACKWARD = 2  # a forward's cost


@dataclass(frozen=True)
class Speeds:
    """What was measured. engine: tokens sampled a second. trainer: tokens a second, forward and
    backward. reply: mean tokens of a completion. prompt: of a prompt, images included.
    """

    engine: float
    trainer: float
    reply: float
    prompt: float


def measure(bench: Bench) -> Speeds:
    """Sample and train on the bench's questions, each once to warm up and once for the clock."""
    many = replace(bench, rows=(list(bench.rows) * _QUESTIONS)[:_QUESTIONS])
    config = bench.config(n=SAMPLES, tokens=_LONGEST)
    bench.sample(config)
    clock = Clock()
    sampled = many.sample(config)
    seconds = clock.seconds()
    lengths = [len(done.token_ids) for group in sampled for done in group]
    examples = [
        bench.encoder.completions(row, [list(done.token_ids) for done in group])
        for row, group in zip(bench.rows, sampled[: len(bench.rows)], strict=True)
    ]
    tokens = sum(example.num_tokens for example in examples)
    _train(bench, examples)
    clock = Clock()
    _train(bench, examples)
    trained = clock.seconds()
    prompts = sum(len(example.prompt_ids) for example in examples)
    return Speeds(
        engine=sum(lengths) / seconds,
        trainer=tokens / trained,
        reply=sum(lengths) / len(lengths),
        prompt=prompts / len(examples),
    )


class Clock:
    """Seconds that work takes: by the wall, or of this process where other work held it up."""

    def __init__(self) -> None:
        self._wall, self._own = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """Since the clock was made; a GPU's work is not the process's own, so the wall counts."""
        wall = time.perf_counter() - self._wall
        own = time.process_time() - self._own
        return wall if torch.cuda.is_available() else min(wall, own)


def _train(bench: Bench, examples: list[Any]) -> None:
    """One forward and backward over the examples in one micro-batch."""
    from internvl.chat import normalize_tiles

    batch = pack(examples).on(bench.model.device)
    tiles = batch.tiles if len(batch.tiles) else batch.tiles.new_zeros(1, *batch.tiles.shape[1:])
    pixels = normalize_tiles(bench.encoder.processor, tiles).to(bench.model.dtype)
    with torch.enable_grad():
        bench.model(packed=batch, pixel_values=pixels).logprobs.sum().backward()
    bench.model.zero_grad()
    if bench.model.device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Amount:
    """What a stage does: tokens to sample and tokens to train on, and how that came about."""

    sampled: float
    trained: float
    told: str


class Hours:
    """The hours of a recipe's stages.

    scanned: the data files that could be read. speeds: of one process.
    """

    def __init__(self, facts: Facts, scanned: list[Scanned], encoder: Encoder, speeds: Speeds):
        self.facts, self.encoder, self.speeds = facts, encoder, speeds
        self.by_path = {file.file.path: file for file in scanned}
        replies = [n for file in scanned if file.file.kind == "conversation"
                   for n in reply_lengths(file, encoder)]  # fmt: skip
        # what it is taught is a better guess than what an untrained model says
        self.reply = sum(replies) / len(replies) if replies else speeds.reply

    def findings(self) -> list[Finding]:
        """One line for each stage, and one for all of them."""
        found, total = [], 0.0
        for spec in self.facts.stages.values():
            amount = self._amount(spec)
            seconds = self._seconds(spec, amount) if amount is not None else 0.0
            looked = self._evaluation(spec)
            extra = looked / self.speeds.engine
            total += seconds + extra
            if amount is None and not looked:
                continue
            told = f"{duration(seconds)}: {amount.told}" if amount is not None else ""
            if looked:
                told += f"{'; ' if told else ''}its evaluation {duration(extra)}"
            found.append(ok("hours.stage", told, f"stages.{spec.name}"))
        seeds = len(self.facts.recipe.seeds)
        told = f"about {duration(total)}" + (f" a seed, {seeds} seeds" if seeds > 1 else "")
        told += (
            f", an estimate from {self.speeds.engine:,.0f} sampled and {self.speeds.trainer:,.0f} "
            "trained tokens a second, measured on a few questions; starts of processes come on top"
        )
        return [*found, ok("hours.all", told)]

    def _rows(self, path: Any) -> tuple[int, float]:
        """(rows, mean tokens) of a file."""
        file = self.by_path.get(path)
        if file is None:
            return 0, 0.0
        rows = self.facts.world_rows(path)
        return len(file.rows) if rows is None else rows, mean_tokens(file, self.encoder)

    def _asked(self, spec: StageSpec) -> int:
        """The number of questions that a stage samples for."""
        limit = self.facts.sampling(spec).get("limit")
        rows = sum(self._rows(self.facts.path(place))[0] for place in spec.questions)
        return min(rows, int(limit)) if limit else rows

    def _amount(self, spec: StageSpec) -> Amount | None:
        if spec.kind in ("pairs", "select"):
            return self._sampling(spec)
        if spec.kind == "rl":
            return self._online(spec)
        return self._offline(spec) if spec.kind in ("sft", "mpo") else None

    def _sampling(self, spec: StageSpec) -> Amount | None:
        if spec.data is not None:
            return None
        number, n = self._asked(spec), int(self.facts.sampling(spec)["n"])
        tokens = number * n * self.reply
        return Amount(tokens, 0, f"{number:,} questions x {n} x {self.reply:.0f} tokens sampled")

    def _online(self, spec: StageSpec) -> Amount:
        option = self.facts.option
        size, group = int(option(spec, "num_generations")), self.speeds.prompt
        steps, processes = int(option(spec, "max_steps")), self.facts.launch(spec).processes
        groups = steps * int(option(spec, "per_device_train_batch_size")) * processes
        replies = groups * size * self.reply
        # the old log-probabilities are a forward more
        trained = (groups * group + replies) * (1 + 1 / (1 + _BACKWARD))
        told = f"{steps:,} steps, {groups:,} groups of {size} x {self.reply:.0f} tokens"
        return Amount(replies, trained, told)

    def _offline(self, spec: StageSpec) -> Amount:
        option = self.facts.option
        rows, tokens = self._training_rows(spec)
        examples = rows * float(option(spec, "num_train_epochs"))
        steps = int(option(spec, "max_steps"))
        if steps > 0:
            size = int(option(spec, "per_device_train_batch_size"))
            examples = steps * size * self.facts.launch(spec).processes
        trained = examples * tokens
        told = f"{examples:,.0f} {'pairs' if spec.kind == 'mpo' else 'conversations'} x "
        told += f"{tokens:,.0f} tokens"
        if spec.kind == "mpo" and option(spec, "precompute_ref_log_probs"):
            trained += min(rows, examples) * tokens / (1 + _BACKWARD)
            told += ", the reference once"
        return Amount(0, trained, told)

    def _training_rows(self, spec: StageSpec) -> tuple[int, float]:
        """(rows, mean tokens) of what a stage trains on; at most so many, of pairs to be made."""
        if spec.data is not None:
            source = self.facts.recipe.stages[spec.data]
            pair = source.sections.get("pair") or {}
            most = int(pair.get("max-pairs-per-question", 15))
            while source.data is not None:
                source = self.facts.recipe.stages[source.data]
            n = int(self.facts.sampling(source)["n"])
            return self._asked(source) * min(most, n // 2), self.speeds.prompt + 2 * self.reply
        given = spec.options.get("train_file")
        found = [
            self._rows(self.facts.path(place))
            for place in (given if isinstance(given, list) else [given])
            if place is not None and not isinstance(place, str)
        ]
        rows = sum(number for number, _ in found)
        return rows, sum(number * tokens for number, tokens in found) / max(1, rows)

    def _evaluation(self, spec: StageSpec) -> float:
        """Tokens that the stage's evaluation samples."""
        options = self.facts.evaluation(spec)
        if options is None:
            return 0.0
        places = spec.questions if spec.kind == "evaluate" else spec.evaluate_questions
        rows = sum(self._rows(self.facts.path(place))[0] for place in places)
        return rows * (1 + int(options["samples"])) * self.reply

    def _seconds(self, spec: StageSpec, amount: Amount) -> float:
        processes = self.facts.launch(spec).processes if spec.kind in ("sft", "mpo", "rl") else 1
        sampled = amount.sampled / self.speeds.engine
        return (sampled + amount.trained / self.speeds.trainer) / processes


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(40), duration(200), duration(9000)
    ('40 s', '3.3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
