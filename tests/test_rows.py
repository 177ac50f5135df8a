"""Rows on their way to a stage: what is put aside, and that trainer and sampler see one prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import noise_image
from trainer_cases import SampleOnly

from internvl.chat import load_processor, render_prompt
from internvl.data import (
    DataError,
    Quarantine,
    find_fault,
    load_image,
    read_rows,
    usable_rows,
)
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.sampler import Completion, SampleRequest, SamplingConfig, open_sampler
from mmpr.pairs import PairConfig, build_pairs
from mmpr.sample import make_request
from rewards import Outcome, Verdict, request_fault
from rewards.functions import RewardTerm, accuracy_reward
from rl.config import RLConfig
from rl.rewarding import Rewarder
from rl.rollouts import RolloutMaker, RolloutSettings
from training.cli import ModelArguments
from training.stage import Stage, open_stage

QUESTION = {"id": "q", "image": "0.png", "question": "<image>\nHow many?", "answer": "3"}
SYSTEM = "Answer in one word."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise_image(56, 56, 0).save(tmp_path / "0.png")
    return tmp_path


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def stage(folder: Path, tiny_model: Path) -> Stage:
    args = RLConfig(
        *(str(folder / "out"),),
        train_file="t",
        max_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    encoder = Encoder(load_processor(str(tiny_model)), max_length=60)
    model: Any = None
    return Stage(model, encoder.processor, encoder, args, folder / "quarantine.jsonl")


def reasons(folder: Path) -> list[str]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


def test_max_bad_holds_for_each_file(folder: Path, stage: Stage) -> None:
    """3 bad rows of 100 are borne; they are no reason to refuse a second file of 10 good ones."""
    rows = [{**QUESTION, "id": str(index)} for index in range(97)]
    bad = [{**QUESTION, "id": f"bad-{index}", "answer": {}} for index in range(3)]
    assert len(stage.rows(str(write(folder / "train.jsonl", [*rows, *bad])), "question")) == 97
    assert len(stage.rows(str(write(folder / "eval.jsonl", rows[:10])), "question")) == 10
    assert len(reasons(folder)) == 3


def test_rows_that_the_online_stage_cannot_use(folder: Path, stage: Stage) -> None:
    """An unknown matcher, or no room for a completion, is found before the first rollout."""
    rows = [
        {**QUESTION, "id": "good", "matcher": "number"},
        {**QUESTION, "id": "matcher", "matcher": "psychic"},
        {**QUESTION, "id": "options", "options": "A B"},
        {**QUESTION, "id": "long", "question": "<image>\n" + "red " * 20},
    ]
    file = str(write(folder / "train.jsonl", rows))
    stage.args.max_bad = 3
    good = stage.rows(file, "question", room=30, record_fault=request_fault)
    assert [row.data["id"] for row in good] == ["good"]
    matcher, options, long = reasons(folder)
    assert matcher.startswith("matcher 'psychic' is unknown; one of: exact, ")
    assert options == "field 'options' is not a list of strings"
    assert " tokens and 30 for its completion, over max_length 60" in long


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"video": 3}, "field 'video' is int, expected a path"),
        ({"system": 3}, "field 'system' is int, expected a string"),
        ({"system": SYSTEM, "video": None}, None),
    ],
)
def test_faults_of_fields(change: dict[str, Any], fault: str | None) -> None:
    assert find_fault({**QUESTION, **change}, "question") == fault


def test_ids_of_conversations_may_repeat(folder: Path) -> None:
    """As they do in published sets; those of questions may not: seeds and groups go by them."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    file = write(folder / "chats.jsonl", [{"id": "-1", "conversations": turns}] * 2)
    quarantine = Quarantine(folder / "quarantine.jsonl", max_bad=2)
    assert len(read_rows(file, kind="conversation", quarantine=quarantine)) == 2
    file = write(folder / "questions.jsonl", [QUESTION, QUESTION])
    assert len(read_rows(file, kind="question", quarantine=quarantine)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_augment": "x"}, "data_augment is 'x'; give true or false"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0; give a whole number of tiles"),
        ({"max_dynamic_patch": "6"}, "max_dynamic_patch is '6'; give a whole number of tiles"),
        ({"repeat_time": "x"}, "repeat_time is 'x'; give a number of 0 or more"),
        ({"annotation": "gone.jsonl"}, "gone.jsonl: no such file"),
    ],
)
def test_entries_of_meta_json_that_cannot_be_honoured(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    write(folder / "pairs.jsonl", [{"question": "Q", "chosen": "a", "rejected": "b"}])
    entry = {"root": ".", "annotation": "pairs.jsonl", "repeat_time": 1, "data_augment": False}
    meta = folder / "meta.json"
    quarantine = Quarantine(None)
    meta.write_text(json.dumps({"charts": entry}))
    assert len(read_rows(meta, kind="pair", quarantine=quarantine)) == 1
    meta.write_text(json.dumps({"charts": {**entry, **change}}))
    with pytest.raises(DataError, match=f"data set 'charts'.*{message}"):
        read_rows(meta, kind="pair", quarantine=quarantine)


def test_a_completion_that_holds_an_image_token(folder: Path, tiny_model: Path) -> None:
    """Trained on, it would be sampled, and no image would be behind it."""
    encoder = Encoder(load_processor(str(tiny_model)))
    pair = {"question": "Which?", "chosen": "the <IMG_CONTEXT>", "rejected": "none"}
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<IMG_CONTEXT>"}]
    cases: list[tuple[Any, dict[str, Any]]] = [("pair", pair)]
    cases.append(("conversation", {"conversations": turns}))
    for kind, row in cases:
        file = write(folder / "rows.jsonl", [row])
        quarantine = Quarantine(folder / "quarantine.jsonl", max_bad=1)
        rows = read_rows(file, kind=kind, quarantine=quarantine)
        with pytest.raises(DataError, match="no usable row is left"):
            usable_rows(rows, encoder, kind, quarantine, quiet=True)
    assert all("holds the control token '<IMG_CONTEXT>'" in reason for reason in reasons(folder))


def test_an_image_that_pillow_stumbles_over(folder: Path) -> None:
    """Its decoders raise more than their documented errors; each is a corrupt image."""
    whole = (folder / "0.png").read_bytes()
    broken = bytearray(whole)
    broken[11] = 5  # the length of the header chunk: Pillow raises a ValueError
    (folder / "0.png").write_bytes(broken)
    with pytest.raises(DataError, match=r"0\.png: corrupt image: Truncated IHDR"):
        load_image(folder / "0.png")


# ---------------------------------------------------------------- one prompt for all


class Remembering(SampleOnly):
    """A sampler that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        self.asked = [*requests, *self.asked]  # it is asked from the last to the first
        return [[Completion("3", (1,), (-0.5,), "stop")] * config.n for _ in requests]


def make_rollouts(row: Any, questions: int) -> list[SampleRequest]:
    sampler = Remembering()
    settings = RolloutSettings(SamplingConfig(n=2), questions, 1, 0, 0, 1, True)
    verdict = Verdict(Outcome.CORRECT, "3", "exact", 1.0, True)
    terms = [RewardTerm("accuracy", accuracy_reward)]
    rewarder = Rewarder([row], terms, lambda asked: [verdict] * len(asked))
    RolloutMaker([row], sampler, settings, rewarder).make(0, 0)
    return sampler.asked


def test_the_system_prompt_reaches_sampler_and_trainer(folder: Path, tiny_model: Path) -> None:
    """What is sampled is what is trained on: the ids of both prompts are equal."""
    file = write(folder / "questions.jsonl", [{**QUESTION, "system": SYSTEM}])
    (row,) = read_rows(file, kind="question", quarantine=Quarantine(None))
    (rolled,) = make_rollouts(row, 1)
    sampled = make_request(row, seed=0)
    assert rolled.system == sampled.system == SYSTEM
    processor = load_processor(str(tiny_model))
    trained = Encoder(processor).completions(row, [[1]]).prompt_ids
    tokenizer: Any = processor.tokenizer
    assert SYSTEM in render_prompt(processor, rolled.question, rolled.system)
    assert tokenizer(SYSTEM)["input_ids"][1] in trained

    sampler = open_sampler(tiny_model, backend="transformers", max_model_len=128)
    config = SamplingConfig(temperature=0.0, max_tokens=4)
    ((answer,),) = sampler.sample([rolled], config)
    ((other,),) = sampler.sample([SampleRequest(rolled.question, rolled.images, 0)], config)
    assert answer.logprobs != other.logprobs

    verdict = {**row.data, "sample": 0, "completion": "x", "outcome": "correct", "extracted": "3"}
    wrong = {**verdict, "sample": 1, "completion": "y", "outcome": "wrong", "extracted": "4"}
    (pair,), _ = build_pairs([[{**v, "format_ok": True} for v in (verdict, wrong)]], PairConfig())
    assert pair["system"] == SYSTEM


def test_a_question_that_comes_twice_in_a_rollout_batch(folder: Path) -> None:
    """With fewer questions than places, its second group is not the first one again."""
    file = write(folder / "questions.jsonl", [QUESTION])
    (row,) = read_rows(file, kind="question", quarantine=Quarantine(None))
    seeds = [request.seed for request in make_rollouts(row, 3)]
    assert len(set(seeds)) == 3
    assert seeds[0] == make_rollouts(row, 1)[0].seed


def test_lengths_are_those_of_the_examples(folder: Path, tiny_model: Path) -> None:
    """The check before the first step counts what is then packed."""
    encoder = Encoder(load_processor(str(tiny_model)))
    turns = [("human", "<image>\nHi"), ("gpt", "It is 3."), ("human", "And?"), ("gpt", "Sure.")]
    conversations = [{"from": who, "value": text} for who, text in turns]
    file = write(folder / "c.jsonl", [{"image": "0.png", "conversations": conversations}])
    (row,) = read_rows(file, kind="conversation", quarantine=Quarantine(None))
    example = encoder.conversation(row)
    assert encoder.length(row, "conversation") == example.num_tokens
    assert example.tiles.dtype == torch.uint8


def test_more_tokens_than_the_model_allows(tiny_model: Path, folder: Path) -> None:
    """Before anything is sampled or trained, and by both samplers in the same words."""
    for length in (0, 4097):
        with pytest.raises(UserError, match=f"max_model_len is {length}; this model allows 1 to"):
            open_sampler(tiny_model, backend="transformers", max_model_len=length)
    args = RLConfig(output_dir=str(folder / "out"), train_file="t", max_steps=1, max_length=4097)
    with pytest.raises(UserError, match="max_length is 4097, over the model's own limit of 4096"):
        open_stage(ModelArguments(str(tiny_model)), args)
