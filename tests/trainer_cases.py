"""Small runs of each stage's trainer, and what is recorded of them; used alone and by two ranks."""

from __future__ import annotations

import gc
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain import Plain, call_processor, load_plain, noise_image, plain_logprobs
from torch import Tensor
from transformers import TrainerCallback

from internvl.adapters import base_of, put_adapter
from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.errors import DataError
from internvl.sampler import Completion, SampleRequest, SamplingConfig, Score
from mpo.config import MPOConfig
from mpo.reference import ScoredPair
from mpo.trainer import MPOTrainer
from rl.config import RLConfig
from rl.trainer import RLTrainer
from sft.config import SFTConfig
from sft.trainer import SFTTrainer
from training.trainer import PackedTrainer

MAX_TILES = 4
SMALL, LARGE = 120, 100_000  # tokens of a micro-batch: one or two examples, or all of them
COMMON: dict[str, Any] = {
    "train_file": "rows.jsonl",
    "num_train_epochs": 1,
    "learning_rate": 0.02,
    "optim": "sgd",  # Adam would blow rounding up where a gradient is nearly zero
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e6,  # the norm is logged, nothing is clipped
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "max_tiles": MAX_TILES,
    "seed": 3,
}


# ---------------------------------------------------------------- rows


def pictures_of(index: int) -> list[tuple[int, int]]:
    """Sizes of a row's images: none, one tile, three tiles, or two images."""
    return [[], [(56, 56)], [(112, 56)], [(56, 56), (56, 56)]][index % 4]


def write_images(folder: Path, rows: int) -> None:
    """The images of rows 0 .. rows - 1."""
    for index in range(rows):
        for place, (width, height) in enumerate(pictures_of(index)):
            noise_image(width, height, 10 * index + place).save(folder / f"{index}-{place}.png")


def _row(folder: Path, index: int, data: dict[str, Any]) -> Row:
    names = [f"{index}-{place}.png" for place in range(len(pictures_of(index)))]
    return Row({"id": str(index), "image": names, **data}, folder / "rows.jsonl", index, folder)


def question_of(index: int) -> str:
    return "<image>\n" * len(pictures_of(index)) + f"What is {index} + the red bar?"


def pairs(folder: Path, number: int) -> list[Row]:
    """Preference pairs whose completions are 4 to 60 tokens long."""
    out = []
    for index in range(number):
        chosen = "The red bar is 5. " * (1 + 2 * (index % 5)) + "Final Answer: 5"
        rejected = "It looks clear from the chart. " * (index % 3) + f"Final Answer: {index % 9}"
        data = {"question": question_of(index), "chosen": chosen, "rejected": rejected}
        out.append(_row(folder, index, data))
    return out


def conversations(folder: Path, number: int) -> list[Row]:
    """Conversations of two exchanges, the images in the second one."""
    out = []
    for index in range(number):
        turns = ["What is 4 + 5?", "Final Answer: 9", question_of(index)]
        turns.append("The blue bar is 2. " * (1 + 3 * (index % 4)) + "Final Answer: 2")
        named = [
            {"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(turns)
        ]
        out.append(_row(folder, index, {"conversations": named}))
    return out


# ---------------------------------------------------------------- a sampler that samples nothing

RIGHT, WRONG = "The red bar is 5. Final Answer: 5", "Final Answer: 6"
NO_ANSWER = "It looks clear from the chart."
# question -> its completions; rewards: 1 for correct + 0.1 for the format, which completion CUT
# never followed
SCRIPT = {
    "mixed": [RIGHT, WRONG, WRONG, NO_ANSWER],
    "other": [WRONG, "Final Answer: 5", RIGHT, NO_ANSWER],
    "equal": [NO_ANSWER] * 4,  # no spread
    "unjudged": [RIGHT, WRONG, RIGHT, WRONG],  # gold is not a number: all None
}
REWARDS: dict[str, list[float | None]] = {
    "mixed": [1.1, 0.1, 0.0, 0.0],
    "other": [0.1, 1.1, 1.0, 0.0],
    "equal": [0.0] * 4,
    "unjudged": [None] * 4,
}
CUT = 2  # this completion of a group was cut by the length limit: it has no end-of-turn token


def questions(folder: Path, kinds: Sequence[str]) -> list[Row]:
    out = []
    for index, kind in enumerate(kinds):
        answer = "nothing at all" if kind == "unjudged" else "5"
        question = f"{question_of(index)} {kind}"
        data = {"question": question, "answer": answer, "matcher": "number"}
        out.append(_row(folder, index, data))
    return out


class SampleOnly:
    """What a sampler needs beside `sample` where its weights mean nothing."""

    name = "by rote"
    takes_adapters = False

    def stream(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, *, ahead: int | None = None
    ) -> Generator[Any]:
        """The last request is answered first: nothing may depend on the order."""
        for number, request in reversed(list(enumerate(requests))):
            try:
                yield number, self.sample([request], config)[0]
            except DataError as error:
                yield number, error

    def sample(self, requests: Any, config: Any, progress: bool = False) -> list[list[Completion]]:
        raise NotImplementedError

    def score(
        self, requests: Sequence[SampleRequest], config: SamplingConfig
    ) -> dict[str, list[Score]]:
        """No engine: nothing is compared."""
        return {}

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        pass

    def update_adapter(self, folder: Path) -> None:
        raise AssertionError("it takes no adapters")

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def put_sampler(trainer: Any, sampler: Any) -> None:
    """Another sampler in the place of a trainer's own."""
    trainer.sampler = trainer.maker.sampler = trainer._sync.sampler = sampler


class ScriptedSampler(SampleOnly):
    """Returns SCRIPT's completions with their log-probabilities under the weights it was given.

    The log-probabilities are plain transformers' (see plain.py), so a gap to the trainer's own is
    a defect. versions: a copy of the weights of every update.
    """

    name = "scripted"

    def __init__(self, folder: Path):
        self.model, self.processor = load_plain(folder)
        self.versions: list[dict[str, Tensor]] = []

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        weights = {name: weight.detach().clone() for name, weight in named_parameters}
        self.model.load_state_dict(weights, strict=True)
        self.versions.append(weights)

    def plain(self, request: SampleRequest, max_tiles: int) -> Plain:
        tokenizer = self.processor.tokenizer
        completions = [
            [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            for text in SCRIPT[request.question.split()[-1]]
        ]
        completions[CUT].pop()
        message = {"role": "user", "content": request.question}
        ids, pixels = call_processor(self.processor, [message], request.images, max_tiles)
        return Plain(ids, pixels, completions, [[True] * len(ids) for ids in completions])

    @torch.no_grad()
    def score(
        self, requests: Sequence[SampleRequest], config: SamplingConfig
    ) -> dict[str, list[Score]]:
        forbidden = [self.processor.tokenizer.convert_tokens_to_ids(t) for t in FORBIDDEN]
        scores = []
        for request in requests:
            message = {"role": "user", "content": request.question}
            ids, pixels = call_processor(
                self.processor, [message], list(request.images), config.max_tiles
            )
            plain = Plain(ids, pixels, [list(request.started)], [[True] * len(request.started)])
            (logprobs,) = plain_logprobs(self.model, plain, config.temperature, forbidden)
            scores.append(Score(len(ids), tuple(logprobs.tolist())))
        return {self.name: scores}

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        assert config.n == 4
        out = []
        for request in requests:
            plain = self.plain(request, config.max_tiles)
            forbidden = [self.processor.tokenizer.convert_tokens_to_ids(t) for t in FORBIDDEN]
            scores = plain_logprobs(self.model, plain, config.temperature, forbidden)
            out.append(
                [
                    Completion(
                        self.processor.tokenizer.decode(ids, skip_special_tokens=True),
                        *(tuple(ids), tuple(score.tolist())),
                        "length" if index == CUT else "stop",
                    )
                    for index, (ids, score) in enumerate(
                        zip(plain.completions, scores, strict=True)
                    )
                ]
            )
        return out


FORBIDDEN = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")


# ---------------------------------------------------------------- runs


@dataclass
class Recorded:
    """What a run did, one entry an optimizer step.

    gradients: of every trainable parameter, as the optimizer saw them. weights: before the step.
    rows: ids of the rows that this rank trained on, in order. microbatches: how many of its own it
    had; samples: how many examples were in them. old_logprobs: GSPO's, one entry a micro-batch.
    delta: BCO's at the end.
    """

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    microbatches: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    old_logprobs: list[Tensor] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    delta: float = math.nan
    trainer: Any = None


class _Recorder(TrainerCallback):
    def __init__(self, recorded: Recorded):
        self.recorded = recorded

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = [(n, p) for n, p in kwargs["model"].named_parameters() if p.requires_grad]
        self.recorded.gradients.append({name: p.grad.clone() for name, p in named})
        self.recorded.weights.append({name: p.detach().clone() for name, p in named})


def _watched(kind: type[PackedTrainer], recorded: Recorded) -> Any:
    """The trainer's class, with its inputs and losses written down."""

    class Watched(kind):  # type: ignore[valid-type,misc]
        def encode(self, row: Any) -> Any:
            if isinstance(row, Row | ScoredPair):
                data = row.data if isinstance(row, Row) else row.row.data
                recorded.rows.append(data["id"])
            return super().encode(row)

        def loss(self, scores: Any, batch: Any, counts: Any) -> Any:
            if "old_logprobs" in batch.token_values and batch.real:
                recorded.old_logprobs.append(batch.token_values["old_logprobs"].clone())
            return super().loss(scores, batch, counts)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            recorded.losses.append(float(loss))
            microbatches = inputs["step"].microbatches
            recorded.microbatches.append(len(microbatches))
            recorded.samples.append(sum(len(batch.example_index) for batch in microbatches))
            return loss

    return Watched


STAGES: dict[str, tuple[type, type[PackedTrainer]]] = {
    "sft": (SFTConfig, SFTTrainer),
    "mpo": (MPOConfig, MPOTrainer),
    "rl": (RLConfig, RLTrainer),
}


def make_trainer(
    stage: str,
    model: Path,
    output: Path,
    rows: Sequence[Row],
    recorded: Recorded,
    /,
    *,
    peft_config: Any = None,
    **options: Any,
) -> Any:
    """A trainer of the tiny model (or an adapter of it) on CPU; `options` over COMMON."""
    config, kind = STAGES[stage]
    base = base_of(model)
    processor = load_processor(str(base))
    started: Any = load_model(base)
    if base != model:
        started = put_adapter(started, model, base=base, trainable=True)
    extra: dict[str, Any] = {}
    if stage == "rl":
        extra["sampler"] = ScriptedSampler(model)
        options = {"freeze_vit": False, **options}
        if "eval_rows" in options:
            extra["eval_dataset"] = options.pop("eval_rows")
    else:
        extra["eval_dataset"] = rows[: options.pop("eval_rows", 3)] or None
    return _watched(kind, recorded)(
        model=started,
        args=config(output_dir=str(output), **{**COMMON, **options}),
        train_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[_Recorder(recorded)],
        **extra,
    )


def train(
    stage: str, model: Path, output: Path, rows: Sequence[Row], /, **options: Any
) -> Recorded:
    """Train to the end and return what was recorded."""
    recorded = Recorded()
    trainer = make_trainer(stage, model, output, rows, recorded, **options)
    gc.freeze()  # Trainer collects garbage when it starts: not through all libraries, each time
    try:
        trainer.train()
    finally:
        gc.unfreeze()
    recorded.logs = [log for log in trainer.state.log_history if "loss" in log]
    recorded.norms = [log["grad_norm"] for log in recorded.logs]
    recorded.trainer = trainer
    if stage != "rl":
        trained_on = list(recorded.rows)
        values = trainer.evaluate()
        recorded.rows = trained_on
        recorded.evaluation = {k: v for k, v in values.items() if "per_second" not in k}
        recorded.evaluation.pop("eval_runtime")
    if stage == "mpo":
        recorded.delta = trainer.shift.delta
    return recorded
