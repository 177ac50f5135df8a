"""mmpr dropout: which replies are started, which pairs come of it, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from plain import Plain, call_processor, load_plain, plain_logits
from published import make_published
from sampling_cases import command

from internvl.chat import encode_reply, eos_token_id, load_processor, render_prompt
from internvl.conversion.convert import convert
from internvl.data import Quarantine, Row, read_rows, write_jsonl
from internvl.errors import UserError
from internvl.sampler import Completion
from mmpr.dropout import (
    DropoutConfig,
    DropoutReport,
    Starter,
    choose_rollouts,
    without_image,
)
from mmpr.likelihood import LESS_LIKELY

REPLY = "The red bar is 5 and the blue bar is 7. Final Answer: 5"
PREFIX = "The red bar is 5 and the"  # half of its tokens


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


# ---------------------------------------------------------------- the start


def encode(processor: Any, text: str) -> list[int]:
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_published_tokenizers_of_both_kinds(family: str, tmp_path: Path) -> None:
    """SentencePiece and byte-level BPE: what was started and goes on as it did is the original."""
    make_published(tmp_path / family, family)
    convert(tmp_path / family, tmp_path / "hf", to="hf", progress=False)
    processor = load_processor(str(tmp_path / "hf"))
    end = eos_token_id(processor)
    for text in (REPLY, "红色的柱子是七，蓝色的是十二。", " two   spaces\n\nand 👍🏽 the end\n"):
        for ratio in (0.2, 0.5, 0.8):
            starter = Starter(processor, DropoutConfig(start_ratio=ratio))
            row = Row(rollout(text=text), Path("r.jsonl"), 1, tmp_path)
            asked = starter.ask("q-0", row, tmp_path / "p.jsonl")
            assert asked is not None and text.startswith(asked.record["prefix"])
            started = asked.request.started
            ids = encode_reply(processor, render_prompt(processor, "What of q?"), text)
            assert ids[-1] == end and list(started) == ids[: len(started)]
            rest = Completion("", tuple(ids[len(started) :]), (), "stop")
            assert starter.rejected(asked, rest) == text
            # the tokens that were sampled are taken as they are
            sampled = Row({**row.data, "token_ids": ids}, row.file, 1, tmp_path)
            again = starter.ask("q-0", sampled, tmp_path / "p.jsonl")
            assert again is not None and again.request == asked.request


# ---------------------------------------------------------------- which rollouts


def rollout(question_id: str = "q", sample: int = 0, text: str = REPLY, **more: Any) -> Any:
    return {
        "id": question_id, "image": "a.png", "question": f"<image>\nWhat of {question_id}?",
        "answer": "", "sample": sample, "completion": text, "finish_reason": "stop", **more,
    }  # fmt: skip


def chosen_of(records: list[Any], **options: Any) -> tuple[list[str], DropoutReport]:
    rows = [Row(record, Path("r.jsonl"), n + 1, Path()) for n, record in enumerate(records)]
    report = DropoutReport()
    return list(choose_rollouts(rows, DropoutConfig(**options), report)), report


def test_rollouts_that_ended_by_themselves_and_are_not_known_to_be_wrong() -> None:
    outcomes = ("correct", "wrong", "no_answer", "cannot_judge", "timeout")
    records = [rollout(name, outcome=name) for name in outcomes]
    records += [
        rollout("cut", finish_reason="length"),
        rollout("blank", text=" \n"),
        rollout("twice", text="It is red."),
        rollout("twice", 1, text=" It is red. "),
    ]
    chosen, report = chosen_of(records)
    assert chosen == [f"{q}-dropout-0" for q in ("correct", "cannot_judge", "timeout", "twice")]
    assert report.left_out == {
        "outcome is wrong": 1, "outcome is no_answer": 1, "empty completion": 1,
        "finish_reason is 'length', not 'stop'": 1, "duplicate completion": 1,
    }  # fmt: skip
    assert (report.rollouts, report.chosen) == (9, 4)
    chosen, _ = chosen_of(records, outcomes=("wrong",))
    assert chosen == ["wrong-dropout-0", "twice-dropout-0"]


def test_the_draw_within_a_question_is_the_seeds() -> None:
    records = [rollout("q", i, f"It is {i}.") for i in range(9)]
    drawn = [chosen_of(records, max_pairs=3, seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3
    assert drawn[0] == sorted(drawn[0])
    assert chosen_of(records, max_pairs=3)[1].left_out == {"over the pairs per question": 6}
    for wrong in ({"start_ratio": 1.0}, {"max_pairs": 0}, {"outcomes": ("right",)}):
        with pytest.raises(UserError):
            DropoutConfig(**wrong)


def test_placeholders_leave_the_question() -> None:
    assert without_image("<image> and <image>\nWhich?") == "and \nWhich?"  # as published
    assert without_image("<video>\nWhat?") == "What?"


# ---------------------------------------------------------------- the command


class Continuing:
    """Answers a request with what `said` has for its question."""

    name = "transformers"

    def __init__(self, processor: Any, said: dict[str, str]):
        self.processor, self.said = processor, said
        self.requests: list[Any] = []

    def sample(self, requests: Any, config: Any, progress: bool = False) -> Any:
        self.requests += requests
        return [[self.answer(request)] for request in requests]

    def answer(self, request: Any) -> Completion:
        text = self.said.get(request.question, f" is no {request.seed % 97}.")
        reason: Any = "length" if text.endswith("...") else "stop"
        ids = encode(self.processor, text)
        ids += [] if reason == "length" else [eos_token_id(self.processor)]
        return Completion(text, tuple(ids), (0.0,) * len(ids), reason)

    def close(self) -> None:
        pass


@pytest.fixture
def opened(processor: Any, monkeypatch: pytest.MonkeyPatch) -> list[Continuing]:
    """The samplers that were opened; each says the same."""
    found: list[Continuing] = []
    said = {
        "What of same?": REPLY.removeprefix(PREFIX),
        "What of start?": " blue bar",
        "What of nothing?": " \n",
        "What of long?": " green...",
        "What of good?": " green bar is 9.",
    }

    def open_sampler(*args: Any, **options: Any) -> Continuing:
        found.append(Continuing(processor, said))
        return found[-1]

    monkeypatch.setattr("internvl.sampler.open_sampler", open_sampler)
    return found


KINDS = ("same", "start", "nothing", "long", "good")


def test_pairs_and_what_makes_none(
    opened: list[Continuing], processor: Any, tiny_model: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    ids = [*encode(processor, REPLY), eos_token_id(processor)]
    records = [rollout(kind, token_ids=ids, answer=["5", "five"]) for kind in KINDS]
    records += [rollout("short", text="Yes"), rollout("control", text="Say <img> now, please")]
    write_jsonl(tmp_path / "r.jsonl", records)
    pairs, meta = tmp_path / "pairs.jsonl", tmp_path / "meta.json"
    words = ("dropout", tmp_path / "r.jsonl", "--model", tiny_model, "--output", pairs)
    assert command(*words, "--meta", meta, "--max-bad", 1) == 0
    (pair,) = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert pair == {
        "id": "good-dropout-0", "image": "a.png", "question": "<image>\nWhat of good?",
        "chosen": REPLY, "rejected": f"{PREFIX} green bar is 9.", "answer_gt": "5",
        "kind": "dropout",
    }  # fmt: skip
    stats = json.loads((tmp_path / "pairs.jsonl.stats.json").read_text())
    assert stats["left_out"] == {
        "too short to be cut": 1,
        "the continuation is the original": 1,
        "the continuation is a beginning of the original": 1,
        "the continuation is empty": 1,
        "the continuation was cut off": 1,
    }
    bad = json.loads((tmp_path / "pairs.jsonl.quarantine.jsonl").read_text())
    assert bad["line"] == 7 and "holds the control token '<img>'" in bad["reason"]
    # without the image, from the original's own tokens, each with a seed of its own
    (sampler,) = opened
    for request in sampler.requests:
        assert not request.images and "<image>" not in request.question
        assert list(request.started) == ids[: len(request.started)]
    assert len({request.seed for request in sampler.requests}) == 5
    rows = read_rows(meta, kind="pair", quarantine=Quarantine(None, 0))
    assert [str(path) for path in rows[0].image_sources()] == [str(tmp_path / "a.png")]


def test_killed_anywhere_it_goes_on_to_the_same_files(
    opened: list[Continuing], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [rollout(f"q{i % 4}", i, f"{REPLY} or {i}") for i in range(9)]
    write_jsonl(tmp_path / "r.jsonl", [*records, rollout("short", text="Yes")])
    pairs = tmp_path / "pairs.jsonl"
    made = tmp_path / "pairs.jsonl.continuations.jsonl"
    words = ("dropout", tmp_path / "r.jsonl", "--model", tiny_model, "--output", pairs)
    assert command(*words, "--batch", 2) == 0
    result, whole = pairs.read_bytes(), made.read_bytes()
    stats = (tmp_path / "pairs.jsonl.stats.json").read_bytes()
    assert result.count(b"\n") == 9
    ends = [len(b"".join(whole.splitlines(True)[:k])) for k in range(10)]
    for kept in (0, 1, ends[3] - 1, ends[3], ends[8] + 9, len(whole) - 1):
        made.write_bytes(whole[:kept])
        pairs.unlink()
        opened.clear()
        assert command(*words) == 0
        assert made.read_bytes() == whole and pairs.read_bytes() == result
        assert (tmp_path / "pairs.jsonl.stats.json").read_bytes() == stats
        assert len(opened[0].requests) == 9 - sum(end <= kept for end in ends[1:])
    opened.clear()
    assert command(*words) == 0 and not opened, "nothing was left to do"
    assert command(*words, "--start-ratio", 0.4) == 2
    assert "by another run (start_ratio was 0.5, now 0.4)" in capsys.readouterr().err
    write_jsonl(tmp_path / "r.jsonl", [{**records[0], "completion": "Else."}, *records[1:]])
    assert command(*words) == 2
    assert "r.jsonl:1: the rollout of 'q0-dropout-0' has changed" in capsys.readouterr().err
    write_jsonl(tmp_path / "r.jsonl", records[1:])
    assert command(*words) == 2
    assert "'q0-dropout-0', whose rollout is not among" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tiles", "4"], "no meaning without --filter-by-likelihood"),
        (["--batch", "0"], "--batch is 0"),
        (["--name", "a"], "give --meta too"),
        (["--format", "trl"], "name it *.parquet"),
        (["--embed-images"], "is an option of --format trl"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--outcomes", "right"], "outcome 'right' is unknown; one of: correct, wrong"),
        (["--outcomes", "wrong"], "r.jsonl holds rollouts; `mmpr verify` gives outcomes"),
    ],
)
def test_options_that_cannot_be_honoured(
    words: list[str], message: str, tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    write_jsonl(tmp_path / "r.jsonl", [rollout()])
    fixed = ("dropout", tmp_path / "r.jsonl", "--model", tiny_model, "--output", tmp_path / "p")
    assert command(*fixed, *words) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- with a real model


def test_with_a_real_model_and_the_filter(
    processor: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The filter keeps exactly the pairs for which transformers' own forward says so."""
    model, plain_processor = load_plain(tiny_model)
    eos = eos_token_id(processor)
    with torch.no_grad():
        model.lm_head.weight[eos] *= 8  # or an untrained model would rarely end a reply
    shutil.copytree(tiny_model, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    Image.effect_noise((56, 56), 80).convert("RGB").save(tmp_path / "a.png")
    replies = [f"{REPLY.replace('5', str(i))} or so" for i in range(12)]
    write_jsonl(tmp_path / "r.jsonl", [rollout(f"q{i}", 0, r) for i, r in enumerate(replies)])
    words = ["dropout", tmp_path / "r.jsonl", "--model", tmp_path / "model", "--max-tokens", 300]
    words += ["--backend", "transformers", "--dtype", "float32"]
    assert command(*words, "--output", tmp_path / "all.jsonl") == 0
    rows = read_rows(tmp_path / "all.jsonl", kind="pair", quarantine=Quarantine(None, 0))
    assert len(rows) >= 6
    expected = {}
    model.eval()
    for row in rows:
        prompt = [{"role": "user", "content": row.data["question"]}]
        ids, pixels = call_processor(plain_processor, prompt, row.load_images(), 12)
        means = []
        both = [[*encode(processor, row.data[name]), eos] for name in ("chosen", "rejected")]
        shared = next(i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
        for completion in both:
            with torch.no_grad():
                logits = plain_logits(model, Plain(ids, pixels, both, []), completion)
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            means.append(float(logprobs[shared:].mean()))
        expected[row.data["id"]] = means
    assert command(*words, "--output", tmp_path / "few.jsonl", "--filter-by-likelihood") == 0
    assert (tmp_path / "few.jsonl.likelihood.jsonl").is_file()
    for line in (tmp_path / "few.jsonl.likelihood.jsonl").read_text().splitlines():
        found = json.loads(line)
        values = [found["chosen_logprob"], found["rejected_logprob"]]
        assert values == pytest.approx(expected[found["id"]], abs=1e-5)
    kept = [json.loads(line)["id"] for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    assert kept == [name for name, (chosen, rejected) in expected.items() if rejected < chosen]
    stats = json.loads((tmp_path / "few.jsonl.stats.json").read_text())
    assert stats["left_out"].get(LESS_LIKELY, 0) == len(rows) - len(kept)


@pytest.mark.slow
def test_sigkill_of_the_process(tiny_model: Path, tmp_path: Path) -> None:
    """Killed as its file grows, it samples nothing again and ends with the same bytes."""
    records = [rollout(f"q{i}", 0, f"{REPLY} or {i}") for i in range(30)]
    write_jsonl(tmp_path / "r.jsonl", records)

    def start(name: str) -> subprocess.Popen[bytes]:
        words = ["dropout", tmp_path / "r.jsonl", "--model", tiny_model, "--max-tokens", 40]
        words += ["--backend", "transformers", "--batch", 1, "--output", tmp_path / name]
        return subprocess.Popen(
            [sys.executable, "-m", "mmpr", *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    assert start("whole.jsonl").wait(120) == 0
    made = tmp_path / "killed.jsonl.continuations.jsonl"
    before = b""
    for lines in (1, 9, 20):
        process = start("killed.jsonl")
        while process.poll() is None and (not made.exists() or _lines(made) < lines):
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert made.read_bytes().startswith(before), "what was on disk was sampled again"
        before = made.read_bytes()[: made.read_bytes().rfind(b"\n") + 1]
    assert start("killed.jsonl").wait(120) == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
