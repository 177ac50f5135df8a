"""Kill a stage anywhere, start it again: it ends with the weights of the uninterrupted run.

Every kill is a SIGKILL of a real process, every comparison one of bytes, on the CPU with one
thread. The quick one stays in `make test`; the others are slow.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import AtFileOperation, InResult, InSave, InStep, Kill, StageRun

from training import checkpoints

KILLED = -signal.SIGKILL
Make = Callable[..., StageRun]


@pytest.fixture(scope="session")
def pairs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 preference pairs on the charts of the world's rl split."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with file.open("w") as out:
        for line in (tiny_world / "rl.jsonl").read_text().splitlines():
            row = json.loads(line)
            keep = {name: row[name] for name in ("id", "image", "question")}
            careless = "It looks clear from the chart. Final Answer: 11"
            pair = {**keep, "chosen": row["solution"], "rejected": careless, "answer_gt": "11"}
            out.write(json.dumps(pair) + "\n")
    return file


@pytest.fixture(scope="session")
def options(tiny_model: Path, tiny_world: Path, pairs: Path) -> dict[str, dict[str, Any]]:
    """Each stage on a handful of rows, with saves in the middle of an epoch or rollout batch."""
    common = {
        "model_name_or_path": str(tiny_model),
        "image_root": str(tiny_world),
        "learning_rate": 1.0e-3,
        "max_tokens_per_microbatch": 256,  # several micro-batches a step
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
    }
    return {
        # 2 epochs of 4 steps
        "sft": {
            **common,
            "train_file": str(tiny_world / "sft.jsonl"),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
        },
        # 2 epochs of 4 steps
        "mpo": {
            **common,
            "train_file": str(pairs),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
        },
        # 3 rollout batches of 2 mini-steps; checkpoint-3 lies between the second one's
        "rl": {
            **common,
            "train_file": str(tiny_world / "rl.jsonl"),
            "per_device_train_batch_size": 2,
            "num_generations": 4,
            "steps_per_generation": 2,
            "max_steps": 6,
            "max_completion_length": 8,
            "sampler": "transformers",
        },
    }


@pytest.fixture
def make(options: dict[str, dict[str, Any]], tmp_path: Path) -> Make:
    """A stage's run in a folder of this test's own, with some options changed."""

    def run(stage: str, name: str = "killed", **changes: Any) -> StageRun:
        return StageRun(stage, {**options[stage], "output_dir": str(tmp_path / name), **changes})

    return run


@pytest.fixture(scope="session")
def uninterrupted(
    options: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], StageRun]:
    """Each stage's run without a kill, made once."""
    runs: dict[str, StageRun] = {}

    def get(stage: str) -> StageRun:
        if stage not in runs:
            folder = str(tmp_path_factory.mktemp(stage) / "reference")
            runs[stage] = StageRun(stage, {**options[stage], "output_dir": folder})
            runs[stage].finish()
            assert changed(runs[stage])
        return runs[stage]

    return get


def assert_same_result(run: StageRun, reference: StageRun) -> None:
    """The same bytes of weights and the same logged values, the count of tokens among them."""
    assert run.weights() == reference.weights()
    assert run.logged() == reference.logged()
    assert run.logged()[-1]["num_tokens"] > 0


def changed(reference: StageRun) -> bool:
    """Whether the run moved the weights at all, so that equal ones mean something."""
    start = Path(reference.options["model_name_or_path"]) / "model.safetensors"
    return start.read_bytes() != reference.weights()


def test_mpo_killed_while_it_saves(make: Make, uninterrupted: Callable[[str], StageRun]) -> None:
    """Inside the save of step 6: checkpoint-6 is whole but for its marker, so 3 is the newest."""
    run = make("mpo")
    assert run.start(InSave(6)).code == KILLED
    half = run.folder / "checkpoint-6"
    assert (half / "model.safetensors").is_file()
    assert checkpoints.newest_complete(run.folder) == run.folder / "checkpoint-3"

    text = run.finish().text
    assert f"{half}: half-written, removed" in text
    assert f"going on from {run.folder / 'checkpoint-3'}" in text
    assert "first loss" not in text  # announced at step 1 only
    assert_same_result(run, uninterrupted("mpo"))


def refusal(run: StageRun) -> str:
    """The one error line of a run that must be refused."""
    ended = run.start()
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    (line,) = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_that_had_ended(make: Make, tiny_world: Path, tmp_path: Path) -> None:
    """Started again it trains nothing; with anything else changed it is refused."""
    data = tmp_path / "sft.jsonl"
    data.write_text((tiny_world / "sft.jsonl").read_text())
    # half an epoch: transformers' own resume would add a step
    run = make("sft", max_steps=2, train_file=str(data))
    run.finish()
    weights, logged = run.weights(), run.logged()
    last = run.folder / "checkpoint-2"
    assert f"going on from {last}" in run.finish().text
    assert run.weights() == weights
    assert run.logged() == logged

    changes = {"max_steps": 2, "train_file": str(data)}
    said = refusal(make("sft", **changes, learning_rate=2e-3))
    assert f"{last} was made with other settings (learning_rate: 0.001 then, 0.002 now)." in said
    as_it_was = data.read_text()
    data.write_text(as_it_was.replace("Final", "final"))  # as many rows, under the same name
    said = refusal(run)
    assert f"{last} was made with other settings (content of train_file: '" in said
    data.write_text(as_it_was)
    assert refusal(make("sft", **changes, resume="never")) == (
        f"error: {run.folder} holds checkpoints and resume is 'never'"
    )

    file = last / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refusal(run) == f"error: {last}: the weights that were loaded are not those of the save"
    file.write_bytes(whole[: len(whole) // 2])
    assert refusal(run).startswith(f"error: {last}: the weights cannot be loaded: ")


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    """A half-written folder is no reason to delete the one before it."""
    for step in (3, 6, 9, 12):
        checkpoints.begin(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoint-final").mkdir()  # somebody's own
    for step in (3, 6, 9):
        checkpoints.mark_complete(tmp_path / f"checkpoint-{step}", {"step": step})
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-9"
    checkpoints.keep_newest(tmp_path, None)
    checkpoints.keep_newest(tmp_path, 1)
    assert checkpoints.all_checkpoints(tmp_path) == [
        tmp_path / "checkpoint-9",
        tmp_path / "checkpoint-12",
    ]
    assert checkpoints.read_marker(tmp_path / "checkpoint-9") == {"step": 9}
    assert checkpoints.remove_incomplete(tmp_path) == [tmp_path / "checkpoint-12"]
    assert (tmp_path / "checkpoint-final").is_dir()


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (3, 6, 9, 12)]
    for folder in folders:
        checkpoints.begin(folder)
        checkpoints.mark_complete(folder, {})
    checkpoints.keep_newest(tmp_path, 3, best=folders[0])
    assert checkpoints.all_checkpoints(tmp_path) == [folders[0], *folders[2:]]
    checkpoints.keep_newest(tmp_path, 1, best=folders[3])
    assert checkpoints.all_checkpoints(tmp_path) == [folders[3]]


def test_checkpoints_of_another_program_are_left_alone(make: Make) -> None:
    """output_dir may be one that was used with transformers or TRL before."""
    run = make("sft", max_steps=1)
    theirs = run.folder / "checkpoint-500"
    theirs.mkdir(parents=True)
    (theirs / "trainer_state.json").write_text("{}")
    assert refusal(run) == (
        f"error: {theirs} is no checkpoint of this program, which can neither go on from it nor "
        "delete it; choose another output_dir, or move the folder away"
    )
    assert (theirs / "trainer_state.json").is_file()


@pytest.mark.slow
def test_other_pairs_or_another_reference_are_refused(
    make: Make, pairs: Path, tmp_path: Path
) -> None:
    run = make("mpo")
    assert run.start(InStep(4)).code == KILLED
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text())
    run.options["train_file"] = str(other)
    assert "train_file: " in refusal(run)
    run.options["train_file"] = str(pairs)
    run.options["model_name_or_path"] = str(run.folder / "checkpoint-3")
    assert refusal(run) == (
        f"error: {run.folder}: its checkpoint was made from another model_name_or_path or from "
        "other pairs; go back to them, or choose another output_dir"
    )


@pytest.mark.slow
def test_checkpoints_without_an_optimizer_are_refused(make: Make) -> None:
    run = make("sft", save_only_model=True)
    assert run.start(InStep(5)).code == KILLED
    assert refusal(run) == (
        f"error: {run.folder / 'checkpoint-3'} was saved with save_only_model, so nothing can go "
        "on from it; choose another output_dir, or remove the folder"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kill", "goes_on_from"),
    [
        ("sft", InStep(5), 3),  # resumes in the middle of the first epoch
        ("sft", InStep(8), 6),  # resumes in the middle of the second
        ("sft", InStep(2), None),  # nothing saved yet
        ("sft", InSave(6), 3),
        ("sft", InSave(6, before="optimizer"), 3),
        ("mpo", InStep(8), 6),
        ("mpo", InSave(3, before="optimizer"), None),
        ("rl", InStep(4), 3),  # the rollout batch's second mini-step, from its stored groups
        ("rl", InStep(6), 3),  # and the rollout batch after it, sampled again
        ("rl", InSave(6), 3),
        ("rl", InSave(3), None),
        ("sft", InResult(), 8),
        ("mpo", InResult(), 8),
        ("rl", InResult(), 6),  # its stream has no end of its own
    ],
    ids=str,
)
def test_killed_once(
    make: Make,
    uninterrupted: Callable[[str], StageRun],
    stage: str,
    kill: Kill,
    goes_on_from: int | None,
) -> None:
    run = make(stage)
    assert run.start(kill).code == KILLED
    text = run.finish().text
    start = f"going on from {run.folder}/checkpoint-{goes_on_from}\n"
    assert ("going on from" not in text) if goes_on_from is None else (start in text)
    assert_same_result(run, uninterrupted(stage))


@pytest.mark.slow
def test_rl_saves_the_rollouts_not_yet_taken(make: Make) -> None:
    run = make("rl")
    assert run.start(InStep(4)).code == KILLED
    state = json.loads((run.folder / "checkpoint-3" / "rollouts_0.json").read_text())
    assert state["next_batch"] == 2
    (groups,) = state["pending"]
    assert len(groups) == 2
    assert {group["weight_version"] for group in groups} == {2}
    assert any(len(set(group["advantages"])) > 1 for group in groups)


@pytest.mark.slow
def test_lora_killed_while_it_saves(make: Make) -> None:
    reference, run = make("mpo", "reference", use_peft=True), make("mpo", use_peft=True)
    reference.finish()
    assert run.start(InSave(6)).code == KILLED
    run.finish()
    assert_same_result(run, reference)


OWN_REWARD = """
def even(prompts, completions, *, completion_ids, answer, trainer_state, **columns):
    assert len(answer) == len(prompts) and 0 <= trainer_state.global_step < trainer_state.max_steps
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
"""


def test_rl_with_a_reward_of_ones_own(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself, judging by rules: a module of the working directory, and all built in."""
    (tmp_path / "mine.py").write_text(OWN_REWARD)
    monkeypatch.chdir(tmp_path)
    names = ["accuracy", "format", "overlong", "repetition", "mine:even"]
    changes: dict[str, Any] = {"max_steps": 2, "soft_punish_cache": 4, "log_completions": True}
    changes |= {"reward_funcs": names, "repetition_ngram": 1, "logging_steps": 1}
    run = replace(make("rl", **changes), by_parity=False)
    run.finish()
    lines = (run.folder / "rollouts" / "rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 4
    for record in records:
        terms = record["terms"]
        assert list(terms) == ["accuracy", "format", "overlong", "repetition", "even"]
        for index, ids in enumerate(record["completions"]):
            assert terms["overlong"][index] == min(0.0, (4 - len(ids)) / 4)
            assert terms["repetition"][index] == pytest.approx(len(set(ids)) / len(ids) - 1)
            assert terms["even"][index] == float(sum(ids) % 2 == 0)
            weighted = zip((1, 0.1, 1, 1, 1), (terms[name][index] for name in terms), strict=True)
            assert record["rewards"][index] == pytest.approx(sum(w * v for w, v in weighted))
    first = run.logged()[0]
    evens = [value for record in records for value in record["terms"]["even"]]
    assert first["rewards/even/mean"] == pytest.approx(sum(evens) / len(evens))
    assert first["outcomes/no_answer"] + first["outcomes/wrong"] == 1.0
    assert first["grad_norm"] > 0
    # what a judge is asked through may change when a run goes on; what is rewarded may not
    others = {**run.options, "verifier_workers": 3, "repetition_ngram": 2}
    ended = replace(run, options=others).start()
    assert ended.code == 2 and "repetition_ngram: 1 then, 2 now" in ended.text
    assert "verifier_workers" not in ended.text


@pytest.mark.slow
def test_sft_killed_in_its_cool_down(make: Make, tiny_world: Path) -> None:
    """The step at which the cool-down began is part of the checkpoint."""
    adaptive = {
        "eval_file": str(tiny_world / "probe.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "stop_gold_probability": 1e-38,
        "cooldown_steps": 4,
        "max_steps": 40,
    }
    reference, run = make("sft", "reference", **adaptive), make("sft", **adaptive)
    reference.finish()
    rates = [entry["learning_rate"] for entry in reference.logged() if "loss" in entry]
    assert len(rates) < 40
    assert rates[-4:] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert run.start(InStep(len(rates))).code == KILLED
    run.finish()
    assert_same_result(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "mpo", "rl"])
def test_counted_kills(make: Make, stage: str) -> None:
    """A dozen kills in a row, at drawn file operations and moments; no checkpoint is ever lost."""
    changes = {"save_total_limit": 1, "save_steps": 1}
    if stage != "rl":
        changes["dataloader_num_workers"] = 1
    reference, run = make(stage, "reference", **changes), make(stage, **changes)
    reference.finish()
    rng = random.Random(stage)
    newest, kills = 0, 0
    for _ in range(12):
        if rng.random() < 0.7:
            ended = run.start(AtFileOperation(rng.randint(1, 40)))
        else:
            ended = run.start(seconds=rng.uniform(0.5, 3.0))
        assert ended.code in (0, KILLED), ended.text
        kills += ended.code == KILLED
        complete = checkpoints.newest_complete(run.folder)
        assert newest == 0 or complete is not None, ended.text
        now = 0 if complete is None else checkpoints.step_of(complete)
        assert now >= newest
        newest = now
    assert kills >= 6
    run.finish()
    assert_same_result(run, reference)
    assert [path.name for path in checkpoints.all_checkpoints(run.folder)] == [
        path.name for path in checkpoints.all_checkpoints(reference.folder)
    ]
