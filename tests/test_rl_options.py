"""RLConfig: options that do not go together, and what follows from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from internvl.checkpoint import load_model
from internvl.errors import UserError
from rl.config import RLConfig
from rl.sampling import _adapter, choose_sampler, switch_off_dropout
from training.cli import ModelArguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"importance_sampling_level": "word"},
            "importance_sampling_level is 'word'; it is",
        ),
        ({"loss_type": "luspo", "importance_sampling_level": "token"}, "luspo goes with"),
        ({"advantage_estimator": "rloo"}, "give scale_rewards none, or batch"),
        ({"use_bias_correction_kl": False}, "but beta is 0"),
        ({"beta": -1.0}, "beta is -1"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "_correction is not"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "_correction is not"),
        (
            {
                "vllm_importance_sampling_correction": True,
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            "there are none: give",
        ),
        ({"max_resample_times": 5}, "dynamic_sample is not"),
        ({"collapse_steps": 5}, "no collapse_... bound is"),
        ({"eval_steps": 5, "eval_strategy": "steps"}, "eval_file goes with"),
        ({"eval_file": "x.jsonl"}, "eval_file goes with"),
        ({"eval_pass_k": [2]}, "eval_pass_k is given, but eval_file is not"),
        ({"log_multimodal": False}, "log_completions is not"),
        ({"reward_timeout": 0.0}, "reward_timeout is 0"),
        ({"epsilon": 1.5}, "0 < epsilon < 1"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RLConfig(output_dir="out", train_file="q.jsonl", max_steps=1, use_cpu=True, **given)


def test_dropout_of_an_adapter_is_refused(tmp_path: Path) -> None:
    args = RLConfig(
        output_dir="out", train_file="q", max_steps=1, use_cpu=True, sampler="transformers"
    )
    model = ModelArguments(model_name_or_path="m", use_peft=True, lora_dropout=0.1)
    with pytest.raises(UserError, match="leave it at 0 in this stage"):
        choose_sampler(args, model, tmp_path)


LAYERS = r".*language_model\.layers\..*_proj"


@pytest.mark.parametrize(
    ("settings", "rank", "whole_only"),
    [
        ({"r": 64}, 64, None),
        ({"r": 4, "rank_pattern": {"q_proj": 32}}, 32, None),
        ({"modules_to_save": ["multi_modal_projector"]}, 8, "the adapter is not of the language"),
        ({"use_dora": True}, 8, "the adapter has DoRA or biases"),
        ({"target_modules": r".*_proj"}, 8, "the adapter is not of the language model alone"),
    ],
)
def test_an_earlier_stage_s_adapter_says_itself_what_it_is(
    settings: dict[str, Any], rank: int, whole_only: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    """Not the options, which are defaults there: vLLM is opened for its rank."""
    given = {"r": 8, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(load_model(tiny_model), LoraConfig(**given))
    model.save_pretrained(str(tmp_path / "adapter"))
    options = ModelArguments(model_name_or_path=str(tmp_path / "adapter"), use_peft=True)
    found = _adapter(options)
    assert found.rank == rank
    assert found.whole_only == whole_only or str(found.whole_only).startswith(str(whole_only))


def test_an_adapter_that_was_trained_with_dropout_drops_nothing_out(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=4, target_modules=LAYERS, lora_dropout=0.25, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(tiny_model), config)
    switch_off_dropout(model)
    assert "lora_dropout 0.25 of the adapter is 0 in this stage" in capsys.readouterr().out
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    switch_off_dropout(model)
    assert capsys.readouterr().out == ""
    base = load_model(tiny_model)
    base.config.text_config.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"text_config\.attention_dropout: what is dropped out"):
        switch_off_dropout(base)


def test_evaluation_options_that_do_not_go_together() -> None:
    base = {"eval_file": "x.jsonl", "eval_strategy": "steps", "eval_steps": 5, "use_cpu": True}
    for given, message in (
        ({"eval_temperature": 0.0}, "greedy"),
        ({"num_generations_eval": 2, "eval_pass_k": [3]}, "eval_pass_k names 3"),
    ):
        with pytest.raises(UserError, match=message):
            RLConfig(output_dir="out", train_file="q.jsonl", max_steps=1, **base, **given)


def test_clips_follow_the_level_and_trls_spellings_are_taken() -> None:
    def made(**given: Any) -> RLConfig:
        return RLConfig(output_dir="out", train_file="q", max_steps=1, use_cpu=True, **given)

    assert (made().epsilon, made().epsilon_high) == (3e-4, 4e-4)
    token = made(importance_sampling_level="token")
    assert (token.epsilon, token.epsilon_high) == (0.2, 0.28)
    assert made(epsilon=0.1).epsilon_high == 0.1
    assert [made(scale_rewards=s).scale_rewards for s in (True, "False", "batch")] == [
        "group",
        "none",
        "batch",
    ]
    assert made().freeze_vit
