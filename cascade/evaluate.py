"""Held-out accuracy of a checkpoint: greedy and sampled, under one or several prompt sets.

    questions -> prompt set -> sampler (greedy; k samples) -> rewards -> predictions.jsonl
                                                                          |-> metrics.json
                                                                          `-> summary.md

Completions are on disk as they come (`cascade.completions`), so an evaluation that is killed goes
on where it was and ends with the same bytes. The first prompt set's evaluation lies in the output
folder, that of each further one in a folder of its name inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.comparison import compare_results
from cascade.completions import Pace, Pass
from cascade.metrics import Result, result_of, summarise
from cascade.questions import AskedRows, PromptSet, ReasoningStyle, key_of
from cascade.report_files import read_lines
from internvl.data import Quarantine, Row, store_images, write_json, write_jsonl
from internvl.data.fingerprint import fingerprint
from internvl.data.resumable import check_same_run
from internvl.errors import DataError

if TYPE_CHECKING:
    from internvl.sampler import SamplingConfig, StreamSampler
    from rewards import Verdict
    from rewards.judging import Verifier

JUDGED_TOGETHER = 256  # questions
PREDICTIONS, METRICS, SETTINGS = "predictions.jsonl", "metrics.json", "settings.json"


@dataclass(frozen=True)
class EvaluationConfig:
    """How to evaluate.

    samples: k completions a question, at temperature, top_p (1: off) and top_k (0: off).
    max_tokens: of a completion. max_tiles: of a prompt whose data name none. seed: of the sampling.
    prompts: the sets that each question is asked under. cot_style: the form that `cot` asks for.
    count: {name: text}; for each, the share of sampled completions that hold the text is reported
    under the name.
    """

    samples: int = 2
    max_tokens: int = 1024
    max_tiles: int = 12
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    prompts: tuple[PromptSet, ...] = ("as_is",)
    cot_style: ReasoningStyle = "final"
    count: dict[str, str] = field(default_factory=dict)

    def sampling(self) -> tuple[SamplingConfig, SamplingConfig]:
        """The greedy pass and the sampled one; `UserError` for what cannot be honoured."""
        from internvl.sampler import SamplingConfig

        limits: dict[str, Any] = {"max_tokens": self.max_tokens, "max_tiles": self.max_tiles}
        return (
            SamplingConfig(temperature=0.0, **limits),
            SamplingConfig(self.samples, self.temperature, self.top_p, self.top_k, **limits),
        )


def prompt_folder(output: Path, config: EvaluationConfig, prompt: PromptSet) -> Path:
    """Where the evaluation of a prompt set lies."""
    return output if prompt == config.prompts[0] else output / prompt


def has_finished_one(output: Path, config: EvaluationConfig) -> bool:
    """Whether a prompt set's predictions are there: of it nothing is sampled or judged any more."""
    folders = (prompt_folder(output, config, prompt) for prompt in config.prompts)
    return any((folder / PREDICTIONS).exists() for folder in folders)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation to be run.

    rows: the questions. facts: what the completions and verdicts depend on besides (the model,
    its fingerprint, the verifier's options), for settings.json. verifier: judges the completions
    of many questions at once. open_sampler: called once, where anything has to be sampled. output:
    the folder.
    """

    rows: Sequence[Row]
    config: EvaluationConfig
    facts: dict[str, Any]
    verifier: Verifier
    open_sampler: Callable[[], StreamSampler]
    quarantine: Quarantine
    output: Path

    def run(self) -> tuple[dict[str, Any], Pace]:
        """Evaluate; returns what metrics.json of the output folder holds, and the pace.

        With several prompt sets the metrics have `prompts`, the metrics of each, and `gap`: how the
        first does against each of the others, on the questions that both have.
        """
        pace, total = Pace(), len(self.rows) + self.quarantine.count
        found: dict[PromptSet, tuple[dict[str, Any], list[Result]]] = {}
        for prompt in self.config.prompts:
            folder = prompt_folder(self.output, self.config, prompt)
            found[prompt] = self._evaluate(prompt, folder, pace, total)
            self.quarantine.check(total)
        first, *others = self.config.prompts
        metrics = found[first][0]
        if others:
            metrics = {
                **metrics,
                "prompts": {prompt: metrics for prompt, (metrics, _) in found.items()},
                "gap": {
                    other: compare_results(found[other][1], found[first][1], self.config.seed)
                    for other in others
                },
            }
            write_json(self.output / METRICS, metrics)
        return metrics, pace

    def _evaluate(
        self, prompt: PromptSet, folder: Path, pace: Pace, total: int
    ) -> tuple[dict[str, Any], list[Result]]:
        """The metrics and results of one prompt set; they are on disk then."""
        rows = AskedRows(self.rows, prompt, self.config.cot_style)
        predictions = folder / PREDICTIONS
        model = check_same_run(predictions, self._settings(prompt), folder / SETTINGS)
        greedy, sampled = (
            Pass(folder / f"completions-{name}.jsonl", rows, config, self.config.seed)
            for name, config in zip(("greedy", "sampled"), self.config.sampling(), strict=True)
        )
        if not predictions.exists():
            opened = self._opener(prompt, folder)
            for one in (greedy, sampled):
                now = one.run(opened, self.quarantine, total)
                pace.tokens, pace.seconds = pace.tokens + now.tokens, pace.seconds + now.seconds
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(predictions, self._predictions(rows, greedy, sampled, prompt))
        results = [result_of(record, self.config.count) for record in read_lines(predictions)]
        if not results:
            told = f"; the reasons are in {self.quarantine.path}" if self.quarantine.count else ""
            raise DataError(f"{folder}: there is no question that could be asked{told}")
        name = self.output.name if folder == self.output else f"{self.output.name}/{prompt}"
        metrics = summarise(
            results,
            name=name,
            model=model,
            prompt=prompt,
            own_form=rows.own_forms(),
        )
        write_json(folder / METRICS, metrics)
        for one in (greedy, sampled):
            one.path.unlink(missing_ok=True)
        return metrics, results

    def _settings(self, prompt: PromptSet) -> dict[str, Any]:
        """All that the predictions of a prompt set depend on, but for the sampler's kind."""
        config = asdict(self.config)
        del config["prompts"], config["count"]
        if prompt != "cot":
            del config["cot_style"]
        return {**self.facts, **config, "prompt": prompt, "questions": fingerprint(self.rows)}

    def _opener(self, prompt: PromptSet, folder: Path) -> Callable[[], StreamSampler]:
        """Open the sampler, and note in settings.json what it is before anything is sampled."""

        def opened() -> StreamSampler:
            sampler = self.open_sampler()
            settings = {**self._settings(prompt), "backend": sampler.name}
            settings["model"] = check_same_run(folder / PREDICTIONS, settings, folder / SETTINGS)
            write_json(folder / SETTINGS, settings)
            return sampler

        return opened

    def _predictions(
        self, rows: AskedRows, greedy: Pass, sampled: Pass, prompt: PromptSet
    ) -> Iterator[dict[str, Any]]:
        """The prediction records, in the rows' order; questions without completions have none."""
        from tqdm import tqdm

        answered = zip(rows, greedy.answers(), sampled.answers(), strict=True)
        bar = tqdm(total=len(rows), desc="judging", unit="question", delay=1)
        with bar:
            while part := list(islice(answered, JUDGED_TOGETHER)):
                bar.update(len(part))
                whole = []
                for row, one, many in part:
                    if isinstance(one, str) or isinstance(many, str):
                        reason = one if isinstance(one, str) else str(many)
                        self.quarantine.add(row.file, row.line, reason, row.data)
                    else:
                        whole.append((row, [*one, *many]))
                yield from self._judged(whole, prompt)

    def _judged(
        self, answered: Sequence[tuple[Row, list[dict[str, Any]]]], prompt: PromptSet
    ) -> Iterator[dict[str, Any]]:
        """The prediction records of some questions; the first completion is the greedy one."""
        asked = ((row.data, done["text"]) for row, many in answered for done in many)
        verdicts = iter([*self.verifier.verdicts(asked)])
        judged = [
            [_judged(done, verdict) for done, verdict in zip(many, verdicts, strict=False)]
            for _, many in answered
        ]
        votes = self.verifier.votes(
            (row.data, [one["extracted"] for one in found[1:]])
            for (row, _), found in zip(answered, judged, strict=True)
        )
        for (row, _), (first, *sampled), classes in zip(answered, judged, votes, strict=True):
            for one, vote in zip(sampled, classes, strict=True):
                one["vote"] = vote
            yield {**self._question(row), "prompt": prompt, "greedy": first, "sampled": sampled}

    def _question(self, row: Row) -> dict[str, Any]:
        """What a prediction record repeats of its question."""
        files = row.image_sources()
        if any(isinstance(file, bytes) for file in files):
            files = [*store_images(row, self.output)]
        dataset, question_id = key_of(row.data)
        return {
            "dataset": dataset,
            "id": question_id,
            "image": [str(file.resolve()) for file in files if isinstance(file, Path)],
            "question": row.data["question"],
            "answer": row.data["answer"],
            **({"solution": row.data["solution"]} if "solution" in row.data else {}),
        }


def _judged(done: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    cut = done["finish_reason"] != "stop"
    return {
        "completion": done["text"],
        "outcome": str(verdict.outcome),
        "extracted": verdict.extracted,
        # one that was cut never followed the format, whatever it holds
        "format_ok": verdict.format_ok and not cut,
        "truncated": cut,
        "tokens": done["tokens"],
    }
