"""No option is accepted and ignored: each is acted on, or is an error before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_cases import Recorded, conversations, make_trainer, pairs, train, write_images

from internvl.errors import UserError
from mpo.config import MPOConfig
from rl.config import RLConfig
from sft.config import SFTConfig
from training.arguments import PackedTrainingArguments
from training.cli import ModelArguments, parse_config
from training.refusals import refuse_lone_ranks
from training.stage import check_eval_file

CONFIGS = {"sft": SFTConfig, "mpo": MPOConfig, "rl": RLConfig}
ADAPTIVE = {
    "stop_gold_probability": 0.3,
    "eval_file": "probe.jsonl",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "max_steps": 100,
}


def parse(stage: str, **options: Any) -> tuple[PackedTrainingArguments, ModelArguments]:
    """A stage's options as its command reads them from flags."""
    words = ["--model_name_or_path", "m", "--train_file", "t", "--use_cpu", "true"]
    words += ["--max_steps", "1"] if stage == "rl" else []
    for name, value in options.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [text])]
    args, model = parse_config([CONFIGS[stage], ModelArguments], stage, words)
    return args, model


NOT_HERE = "which is not supported here"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"accelerator_config": {"split_batches": True}}, NOT_HERE),
    ("sft", {"auto_find_batch_size": True}, NOT_HERE),
    ("sft", {"average_tokens_across_devices": False}, NOT_HERE),
    ("sft", {"dataloader_drop_last": True}, NOT_HERE),
    ("sft", {"dataloader_in_order": False}, NOT_HERE),
    ("sft", {"dataloader_persistent_workers": True}, NOT_HERE),
    ("sft", {"dataloader_prefetch_factor": 4}, NOT_HERE),
    ("sft", {"dataloader_multiprocessing_context": "spawn"}, "workers are forked"),
    ("mpo", {"do_predict": True}, NOT_HERE),
    ("mpo", {"enable_jit_checkpoint": True}, NOT_HERE),
    ("mpo", {"eval_accumulation_steps": 2}, NOT_HERE),
    ("sft", {"include_num_input_tokens_seen": True}, NOT_HERE),
    ("sft", {"label_names": ["labels"]}, NOT_HERE),
    ("sft", {"label_smoothing_factor": 0.1}, NOT_HERE),
    ("sft", {"load_best_model_at_end": True}, NOT_HERE),
    ("sft", {"neftune_noise_alpha": 5}, NOT_HERE),
    ("sft", {"save_on_each_node": True}, NOT_HERE),
    ("sft", {"torch_compile": True}, NOT_HERE),
    ("sft", {"torch_compile_mode": "default"}, NOT_HERE),
    ("sft", {"torch_empty_cache_steps": 3}, NOT_HERE),
    ("sft", {"train_sampling_strategy": "group_by_length"}, NOT_HERE),
    ("sft", {"use_cache": True}, NOT_HERE),
    ("sft", {"optim": "lomo"}, "optim is 'lomo', which does not fit a packed step"),
    ("sft", {"optim": "galore_adamw_layerwise"}, "does not fit a packed step"),
    ("sft", {"optim": "schedule_free_adamw"}, "does not fit a packed step"),
    ("sft", {"ignore_data_skip": True}, "ignore_data_skip is True: a resumed run would not"),
    ("rl", {"ignore_data_skip": False}, "ignore_data_skip is False: a resumed run would not"),
    ("sft", {"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; it must be at"),
    ("sft", {"max_tiles_per_microbatch": 0}, "max_tiles_per_microbatch is 0; it must be at"),
    ("sft", {"max_length": 0}, "max_length is 0; it must be at least 1"),
    ("mpo", {"precompute_ref_batch_size": 0}, "precompute_ref_batch_size is 0, at least 1"),
    (
        *("mpo", {"precompute_ref_log_probs": False, "reference_cache_dir": "x"}),
        "reference_cache_dir is 'x', but precompute_ref_log_probs is false",
    ),
    (
        *("mpo", {"precompute_ref_log_probs": False, "precompute_ref_batch_size": 8}),
        "precompute_ref_batch_size is 8, but precompute_ref_log_probs is false",
    ),
    (
        *("mpo", {"loss_type": ["orpo", "sft"], "reference_cache_dir": "x"}),
        "reference_cache_dir is 'x', but loss_type ['orpo', 'sft'] reads no reference",
    ),
    (
        "mpo",
        {"save_total_limit": 1, "metric_for_best_model": "loss"},
        "give at least 2: the best checkpoint and the newest",
    ),
    ("rl", {"eval_strategy": "epoch"}, "rollouts have none: give"),
    ("rl", {"save_strategy": "epoch"}, 'save_strategy is "epoch"; rollouts have none: give'),
    ("rl", {"logging_strategy": "epoch"}, 'logging_strategy is "epoch"; rollouts have none'),
    ("rl", {"data_seed": 3}, "the order of the questions follows seed"),
    ("sft", {**ADAPTIVE, "lr_scheduler_type": "cosine"}, "brings its own learning rate schedule"),
    ("sft", {**ADAPTIVE, "eval_on_start": True}, "eval_on_start looks again at every restart"),
    ("sft", {**ADAPTIVE, "cooldown_steps": 0}, "cooldown_steps is 0; it must be at least 1"),
    ("mpo", {"lora_r": 8}, "lora_r is given, but use_peft is not"),
    ("mpo", {"lora_target_modules": ["q_proj"]}, "lora_target_modules is given, but use_peft"),
]


@pytest.mark.parametrize(("stage", "options", "message"), REFUSED, ids=str)
def test_an_option_that_nothing_acts_on_is_refused(
    stage: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        parse(stage, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_as_they_should_be() -> None:
    for stage, config in CONFIGS.items():
        assert isinstance(parse(stage)[0], config)
    args, _ = parse("sft", **ADAPTIVE, lr_scheduler_type="constant_with_warmup", warmup_steps=5)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant_with_warmup", 5)
    args, _ = parse("mpo", save_total_limit=2, metric_for_best_model="loss")
    assert (args.save_total_limit, args.metric_for_best_model) == (2, "loss")
    _, model_args = parse("mpo", use_peft=True, lora_r=8)
    assert (model_args.use_peft, model_args.lora_r) == (True, 8)


def test_held_out_rows_that_nothing_would_look_at_are_refused() -> None:
    args, _ = parse("mpo", eval_file="held.jsonl")
    with pytest.raises(UserError, match='eval_file is given, but eval_strategy is "no"'):
        check_eval_file(args, "held.jsonl")
    args, _ = parse("mpo", eval_file="held.jsonl", eval_strategy="epoch")
    check_eval_file(args, "held.jsonl")
    with pytest.raises(UserError, match="asks for evaluations: give an eval_file"):
        check_eval_file(args, None)
    args, _ = parse("mpo")
    check_eval_file(args, None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 4)
    return folder


def test_mpo_evaluates_while_it_trains(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """eval_strategy reaches MPO's held-out pairs, with their own reference."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 2}
    run = train("mpo", tiny_model, tmp_path, pairs(images, 4), **options)
    history = run.trainer.state.log_history
    evaluations = [log["eval_loss"] for log in history if "eval_loss" in log]
    assert len(evaluations) == 3  # after each of two steps, and once by hand
    assert evaluations[1] == evaluations[2] < evaluations[0]


def test_the_reference_is_scored_in_the_policys_precision(
    tiny_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under autocast the first loss is what it must be; the float32 cache is not taken for it."""
    rows = pairs(images, 4)
    for bf16 in (False, True):
        train("mpo", tiny_model, tmp_path, rows, bf16=bf16, per_device_train_batch_size=4)
        out = capsys.readouterr().out
        assert "first loss" in out and "WARNING" not in out
    keys = [
        make_trainer("mpo", tiny_model, tmp_path, rows, Recorded(), bf16=bf16).reference.keys
        for bf16 in (False, True)
    ]
    assert keys[0] != keys[1]


def test_missing_pieces_of_an_optimizer_or_schedule_are_one_line(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    for option, message in (
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q"]}, "galore"),
    ):
        with pytest.raises(UserError, match=message):
            train("sft", tiny_model, tmp_path, conversations(images, 2), **option)


def test_weights_held_in_16_bits_are_warned_of(
    tiny_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 2e-7 moves nothing there."""
    from internvl.checkpoint import load_model
    from training import refusals

    trainer = make_trainer("sft", tiny_model, tmp_path, conversations(images, 2), Recorded())
    assert "16 bits" not in capsys.readouterr().out
    trainer.model = load_model(tiny_model, dtype="bfloat16")
    refusals.warn_of_rounding(trainer)
    assert "WARNING: the weights that are trained are held in 16 bits" in capsys.readouterr().out
    weight = torch.tensor(0.01, dtype=torch.bfloat16)
    assert weight + 2e-7 == weight


def test_a_warm_up_given_as_a_share(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """transformers takes warmup_steps below 1 for a share of max_steps; so does our schedule."""
    trainer = make_trainer(
        *("sft", tiny_model, tmp_path, conversations(images, 2), Recorded()),
        **{**ADAPTIVE, "warmup_steps": 0.05},
    )
    assert trainer._schedule.warmup_steps == 5


def test_several_processes_that_transformers_takes_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun on a CPU without use_cpu: each would write into output_dir as if alone."""
    alone: Any = SimpleNamespace(world_size=1)
    both: Any = SimpleNamespace(world_size=2)
    refuse_lone_ranks(alone)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_lone_ranks(both)
    with pytest.raises(UserError, match=r"2 processes were started .* sees 1: on a CPU add"):
        refuse_lone_ranks(alone)
