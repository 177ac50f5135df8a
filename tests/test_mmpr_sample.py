"""mmpr sample: a run that survives kills, full disks and changed minds."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sampling_cases import (
    Dying,
    FakeSampler,
    command,
    fake_checkpoint,
    open_batches,
    run_sampling,
    write_questions,
)

from internvl.data import Quarantine, read_rows, write_jsonl
from internvl.data.resumable import meta_path
from internvl.errors import DataError, UserError
from internvl.hashing import model_fingerprint
from internvl.sampler import SamplingConfig
from mmpr.resumable import recover
from mmpr.sample import (
    digest,
    pending_rows,
    question_seed,
)


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    return fake_checkpoint(tmp_path, monkeypatch)


def test_rollout_records(questions, tmp_path):
    report = run_sampling(questions, tmp_path / "r.jsonl")
    assert (report.sampled, report.done_before, report.bad, report.tokens) == (7, 0, 0, 42)
    rollouts = read_rows(tmp_path / "r.jsonl", kind="rollout", quarantine=Quarantine(None, 0))
    assert [(row.data["id"], row.data["sample"]) for row in rollouts[:4]] == [
        ("q0", 0), ("q0", 1), ("q0", 2), ("q1", 0),
    ]  # fmt: skip
    assert rollouts[0].data | {"completion": "", "token_ids": []} == {
        "id": "q0", "image": "a.png", "question": "<image>\nHow many?", "answer": "0",
        "sample": 0, "completion": "", "token_ids": [], "finish_reason": "stop", "model": "m",
        "seed": question_seed(0, "q0"), "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "max_tokens": 16,
    }  # fmt: skip


def test_neither_batches_nor_the_order_of_answers_change_anything(questions, tmp_path):
    run_sampling(questions, tmp_path / "a.jsonl", batch=3)
    run_sampling(questions, tmp_path / "b.jsonl", batch=100, sampler=FakeSampler(backwards=5))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    run_sampling(questions, tmp_path / "c.jsonl", seed=1)
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_a_batch_is_handed_on_once_it_is_on_disk(questions, tmp_path):
    output, sampler = tmp_path / "r.jsonl", FakeSampler()
    batches = open_batches(questions, output, batch=3, sampler=sampler)
    for taken, ids in ((3, "q0 q1 q2"), (6, "q3 q4 t0"), (7, "t1")):
        records = next(batches)
        assert [one["id"] for one in records[::3]] == ids.split()
        assert sampler.taken == taken, "nothing is taken that nobody asked for"
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert written[-len(records) :] == records
    assert next(batches, None) is None
    assert list(open_batches(questions, output, batch=3)) == []


def test_slow_batches_are_written_before_they_are_whole(questions, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpr.sample.FLUSH_SECONDS", 0.0)
    batches = open_batches(questions, tmp_path / "r.jsonl", batch=100)
    assert [len(records) for records in batches] == [3] * 7


def test_who_stops_in_the_middle_keeps_what_is_in_order(questions, tmp_path):
    output, other = tmp_path / "r.jsonl", tmp_path / "s.jsonl"
    batches = open_batches(questions, output, batch=2, sampler=FakeSampler(backwards=7))
    assert len(next(batches)) == 7 * 3  # all were answered before the first was
    batches.close()
    with pytest.raises(UserError, match="no server answers"):
        run_sampling(questions, other, batch=100, sampler=Dying(after=3))
    assert len(recover(other, 3)) == 3
    assert run_sampling(questions, other).sampled == 4
    assert other.read_bytes() == output.read_bytes()


def test_killed_anywhere_resumes_to_the_same_file(questions, tmp_path):
    output = tmp_path / "r.jsonl"
    run_sampling(questions, output)
    whole = output.read_bytes()
    question_ends = [len(b"".join(whole.splitlines(True)[: 3 * k])) for k in range(8)]
    for kept in [0, 1, len(whole) // 3, question_ends[3] - 1, question_ends[3], len(whole) - 1]:
        output.write_bytes(whole[:kept])
        report = run_sampling(questions, output)
        assert output.read_bytes() == whole, f"killed after {kept} bytes"
        done = sum(end <= kept for end in question_ends[1:])
        assert (report.done_before, report.sampled) == (done, 7 - done)


def test_a_changed_run_is_refused(questions, tmp_path):
    output = tmp_path / "r.jsonl"
    run_sampling(questions, output)
    with pytest.raises(UserError, match=r"by another run \(fingerprint was 'f', now 'g'\)"):
        run_sampling(questions, output, fingerprint="g")
    with pytest.raises(UserError, match=r"n was 3, now 4"):
        run_sampling(questions, output, config=SamplingConfig(n=4, max_tokens=16))
    # the same model in another folder is the same model, under the name first given
    assert run_sampling(questions, output, model="elsewhere/m").sampled == 0
    assert json.loads(meta_path(output).read_bytes())["model"] == "m"
    meta_path(output).unlink()
    with pytest.raises(UserError, match="it is not known what made it"):
        run_sampling(questions, output)


def test_changed_questions_are_refused(questions, tmp_path):
    output = tmp_path / "r.jsonl"
    run_sampling(questions, output)
    rows = read_rows(questions, kind="question", quarantine=Quarantine(None))
    done = recover(output, 3, digest)
    assert len(pending_rows(rows, done, output)) == 0
    with pytest.raises(UserError, match="'q0', which is not among the questions"):
        pending_rows(rows[1:], done, output)
    changed = list(rows)
    changed[2].data["answer"] = "77"
    with pytest.raises(UserError, match=r"questions.jsonl:3: 'answer' of question 'q2' has chang"):
        pending_rows(changed, done, output)


def test_a_damaged_middle_is_not_repaired_silently(questions, tmp_path):
    output = tmp_path / "r.jsonl"
    run_sampling(questions, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines[:4], b"{torn\n", *lines[5:]]))
    with pytest.raises(DataError, match=r"r.jsonl:5: not valid JSON"):
        recover(output, 3)
    output.write_bytes(b"".join([*lines[:4], *lines[5:]]))
    with pytest.raises(DataError, match=r"r.jsonl:5: sample 2 of question 'q1' where sample 1"):
        recover(output, 3)


def test_bad_images_and_long_prompts_go_to_the_quarantine(questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[1]["image"] = "missing.png"
    rows[5]["question"] = "too long"
    write_jsonl(questions, rows)
    report = run_sampling(questions, tmp_path / "r.jsonl", batch=4)
    assert (report.sampled, report.bad) == (5, 2)
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(item["line"], item["reason"]) for item in bad] == [
        (2, f"{tmp_path / 'missing.png'}: no such image"),
        (6, "the prompt has 9 tokens"),
    ]


def test_too_many_bad_rows_stop_the_run_but_keep_what_was_sampled(questions, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="5 of 7 rows are bad"):
        run_sampling(questions, tmp_path / "r.jsonl", batch=7)
    assert len(recover(tmp_path / "r.jsonl", 3)) == 2


def test_a_prompt_style_is_part_of_the_run(questions, checkpoint, tmp_path, capsys):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[5]["question"] += " Put your final answer within \\boxed{}."
    write_jsonl(questions, rows)
    output = tmp_path / "r.jsonl"
    sampling = ("sample", questions, "--model", checkpoint[0], "--output", output, "--n", 2)
    assert command(*sampling, "--prompt-style", "final", "--language", "zh") == 0
    assert (
        "1 question(s) asked for a form themselves and kept it: boxed 1" in capsys.readouterr().out
    )
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written[0]["question"].startswith("<image>\nHow many?\n回答之前请先逐步推理")
    assert written[0]["question_orig"] == rows[0]["question"]
    assert [one["prompt_style"] for one in written[::2]] == ["final"] * 5 + ["boxed", "final"]
    assert written[10]["question"] == rows[5]["question"] and "question_orig" not in written[10]
    for words, message in [
        (["--prompt-style", "boxed"], "prompt_style was 'final', now 'boxed'"),
        (["--prompt-style", "final"], "language was 'zh', now 'auto'"),
        ([], "'question' of question 'q0' has changed"),
    ]:
        assert command(*sampling, *words) == 2
        assert message in capsys.readouterr().err


def test_tile_budgets_are_those_of_the_data_sets(questions, tmp_path):
    (tmp_path / "more.jsonl").write_text(
        '{"id": "m0", "question": "?", "answer": "1"}\n'
        '{"id": "m1", "question": "?", "answer": "1", "max_tiles": 2}\n'
    )
    entry = {"root": ".", "repeat_time": 1}
    meta = {
        "few": {**entry, "annotation": "more.jsonl", "max_dynamic_patch": 6},
        "any": {**entry, "annotation": questions.name},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    asked = []

    class Remembering(FakeSampler):
        def answers(self, request, config):
            asked.append((request.max_tiles, request.budget(config.max_tiles)))
            return super().answers(request, config)

    run_sampling(tmp_path / "meta.json", tmp_path / "r.jsonl", sampler=Remembering())
    assert asked[:3] == [(6, 6), (2, 2), (None, 12)]
    rows = read_rows(tmp_path / "r.jsonl", kind="rollout", quarantine=Quarantine(None, 0))
    assert [row.tile_budget(12) for row in rows[:7:3]] == [6, 2, 12]


IN_A_PROCESS = """
import resource, sys
import internvl.sampler, test_mmpr_sample
from mmpr import cli
{first}
internvl.sampler.open_sampler = lambda *_, **__: sampler
cli.main(sys.argv[1:])
"""


def in_a_process(first, *words):
    """Run `mmpr` with a fake sampler that `first` names, as a process of its own."""
    here = Path(__file__).resolve().parent
    code = IN_A_PROCESS.format(first=first)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
        cwd=here.parent, env={**os.environ, "PYTHONPATH": str(here)},
    )  # fmt: skip


def test_a_full_disk_is_told_and_nothing_is_lost(questions, checkpoint, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
    sampling = ("sample", questions, "--model", checkpoint[0], "--n", 6, "--batch-questions", 2)
    assert command(*sampling, "--output", whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    room = len(b"".join(lines[:30]))  # of the third batch, questions 4 and 5, the first fits
    first = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
    first += "sampler = test_mmpr_sample.FakeSampler()"
    full = in_a_process(first, *sampling, "--output", output)
    assert full.returncode == 2
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {output}: cannot be written: File too large. What was sampled before is kept; "
        "make room, and start the same command again to go on"
    ]
    kept = output.read_bytes()
    assert kept == whole.read_bytes()[:room] and len(recover(output, 6)) == 5
    assert command(*sampling, "--output", output) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(questions, checkpoint, tmp_path):
    """SIGKILL between any two answers, or while a batch is written: the same file in the end."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
    rows = [{"id": f"n{i}", "question": "How many?", "answer": str(i % 5)} for i in range(400)]
    write_jsonl(questions, rows)
    sampling = ("sample", questions, "--model", checkpoint[0], "--n", 6, "--batch-questions", 3)
    assert command(*sampling, "--output", whole) == 0
    rng, before = random.Random(0), 0
    for _ in range(20):
        first = f"sampler = test_mmpr_sample.Killed({rng.randrange(3, 15)}, {rng.random()})"
        killed = in_a_process(first, *sampling, "--output", output)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        written = len(output.read_bytes()) if output.exists() else 0
        assert written >= before, "what reached the disk was sampled again"
        before = len(b"".join(output.read_bytes().splitlines(True)[: 6 * len(recover(output, 6))]))
    assert command(*sampling, "--output", output) == 0
    assert output.read_bytes() == whole.read_bytes()


class Killed(FakeSampler):
    """Kills its process after so many answers, by half of the chances while a batch is written."""

    def __init__(self, after, chance):
        super().__init__()
        self.after = after
        if chance < 0.5:
            os.fsync = lambda _: self.after <= 0 and os.kill(os.getpid(), signal.SIGKILL)
        self.waits = chance < 0.5

    def answers(self, request, config):
        self.after -= 1
        if self.after < 0 and not self.waits:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answers(request, config)


class Weighing(FakeSampler):
    """Weighs its process: MiB of memory when 2,000 questions were taken, and at the end."""

    def stream(self, requests, config, *, ahead=None):
        for number, answer in super().stream(requests, config, ahead=ahead):
            yield number, answer
            if number == 2000:
                begin = self.weigh()
        print(f"grown by {self.weigh() - begin:.1f} MiB")

    def weigh(self):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_memory_is_flat_over_50_000_questions(checkpoint, tmp_path):
    """Pictures of 0.2 MB: 50,000 would be 10 GB, and a batch that waits for the sampler 50 MB."""
    Image.effect_noise((256, 256), 60).convert("RGB").save(tmp_path / "a.jpg")
    ask = "<image>\nHow many bars of this chart are red, and how many of them are blue?"
    rows = (
        {"id": f"q{i}", "image": "a.jpg", "question": ask, "answer": "3"} for i in range(50_000)
    )
    write_jsonl(tmp_path / "q.jsonl", rows)
    words = ("sample", tmp_path / "q.jsonl", "--model", checkpoint[0], "--n", 2)
    words += ("--output", tmp_path / "r.jsonl", "--prompt-style", "final")
    done = in_a_process("sampler = test_mmpr_sample.Weighing(backwards=64)", *words)
    assert done.returncode == 0, done.stderr
    grown = float(re.search(r"grown by (-?[\d.]+) MiB", done.stdout)[1])
    assert grown < 15, done.stdout
    assert sum(1 for _ in (tmp_path / "r.jsonl").open()) == 100_000


def test_model_fingerprint(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert model_fingerprint(one) == model_fingerprint(two)
    # same size, other weights
    (tmp_path / "two" / "model.safetensors").write_bytes(b"heavier")
    assert model_fingerprint(one) != model_fingerprint(two)
    with pytest.raises(UserError, match=r"no config.json there"):
        model_fingerprint(str(tmp_path / "three"))


def test_fingerprint_of_a_large_file_sees_a_small_change(tmp_path, monkeypatch):
    monkeypatch.setattr("internvl.hashing._WHOLE_FILE", 100)
    monkeypatch.setattr("internvl.hashing._BLOCK_BYTES", 32)
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(os.urandom(5000))
    prints = set()
    for place in (None, 0, 2499, 4999):
        changed = bytearray(weights)
        if place is not None:
            changed[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        prints.add(model_fingerprint(str(tmp_path)))
    assert len(prints) >= 3  # both ends are always seen; between blocks a byte may be missed
