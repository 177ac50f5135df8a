"""What PackedTrainer and the stages' configurations refuse, before anything is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import COMMON, STAGES

from internvl.checkpoint import load_model
from internvl.errors import UserError

REFUSED = [
    ("sft", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2"),
    ("sft", {"remove_unused_columns": True}, "remove_unused_columns"),
    ("sft", {"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch is 0"),
    ("sft", {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
    ("sft", {"max_tiles": 0}, "max_tiles is 0"),
    ("sft", {"resume": "yes"}, "resume is 'yes'"),
    ("sft", {"resume_from_checkpoint": "x"}, "use resume: auto"),
    ("sft", {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    ("sft", {"loss_average": "mean"}, "loss_average 'mean'"),
    ("sft", {"train_file": ""}, "train_file is missing"),
    ("sft", {"stop_gold_probability": 0.5}, "stop_gold_probability needs"),
    ("mpo", {"beta": 0.0}, "beta is 0.0"),
    ("mpo", {"beta": math.nan}, "beta is nan"),
    ("mpo", {"loss_weights": [1.0, 1.0]}, "give a number for each of loss_type"),
    ("mpo", {"loss_weights": [0.0, 0.0, 0.0]}, "not all 0"),
    ("mpo", {"loss_weights": [math.inf, 0.0, 0.0]}, "give numbers >= 0"),
    ("mpo", {"loss_type": ["ipo"], "loss_weights": [-1.0]}, "give numbers >= 0"),
    ("mpo", {"loss_type": "bco_pear"}, "has 'bco_pear'; did you mean 'bco_pair'?"),
    ("mpo", {"loss_type": ["exo_pair"]}, "loss_type has 'exo_pair'; "),
    ("mpo", {"loss_type": []}, "name at least one"),
    ("mpo", {"loss_type": ["sft", "ipo", "sft"]}, "each once"),
    ("mpo", {"loss_type": ["orpo", "sft"], "beta": 0.2}, "beta is 0.2, which loss_type"),
    ("mpo", {"loss_type": ["ipo"], "label_smoothing": 0.1}, "which only"),
    ("mpo", {"label_smoothing": 0.5}, "label_smoothing is 0.5; it is from 0 to below 0.5"),
    ("mpo", {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
    ("rl", {}, "max_steps is missing"),
    ("rl", {"max_steps": 1, "num_generations": 1}, "num_generations is 1"),
    ("rl", {"max_steps": 1, "temperature": 0.0}, "temperature is 0.0"),
    ("rl", {"max_steps": 1, "sampler": "sglang"}, "sampler is 'sglang'"),
    ("rl", {"max_steps": 1, "ignore_data_skip": False}, "ignore_data_skip"),
    ("rl", {"max_steps": 1, "steps_per_generation": 0}, "steps_per_generation is 0"),
    ("rl", {"max_steps": 1, "epsilon": 1.0}, "epsilon"),
]


@pytest.mark.parametrize(("stage", "options", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(
    stage: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        STAGES[stage][0](output_dir=str(tmp_path), **{**COMMON, **options})


def test_data_parallel_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config, kind = STAGES["sft"]
    args = config(output_dir=str(tmp_path), **COMMON)
    args._n_gpu = 2
    with pytest.raises(UserError, match="DataParallel"):
        kind(load_model(tiny_model), args, None, None, encoder=None)


def test_what_a_stage_does_itself_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config, kind = STAGES["sft"]
    args = config(output_dir=str(tmp_path), **COMMON)
    with pytest.raises(UserError, match="data_collator would not be read"):
        kind(load_model(tiny_model), args, None, None, data_collator=list)


def test_another_model_is_refused(tmp_path: Path) -> None:
    config, kind = STAGES["sft"]
    args = config(output_dir=str(tmp_path), **COMMON)
    with pytest.raises(UserError, match="the model is Linear"):
        kind(torch.nn.Linear(1, 1), args, None, None, encoder=None)
