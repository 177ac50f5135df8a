"""Options of the online stage; names are TRL's GRPOConfig's where it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from internvl.errors import UserError
from rewards.judging_options import JudgeOptions
from rewards.pool import DEFAULT_LIMIT
from rl.loss_options import LossOptions
from training.arguments import PackedTrainingArguments


@dataclass
class RLConfig(LossOptions, JudgeOptions, PackedTrainingArguments):
    """Options of the online stage; see PackedTrainingArguments for the common ones.

    LossOptions say which loss it is, JudgeOptions ask a judge.

    `per_device_train_batch_size` counts groups (questions) of one optimizer step; a rollout batch
    is `steps_per_generation` times as many, sampled from one version of the weights.
    """

    train_file: str = field(
        default="", metadata={"help": "Questions: JSONL, parquet, saved data set."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions a question, G."})
    steps_per_generation: int = field(
        default=2, metadata={"help": "Optimizer steps a rollout batch is cut into (mini-batches)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    max_completion_length: int = field(default=1024, metadata={"help": "Tokens of a completion."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": "What is added up to the reward: accuracy (1 for correct), format (1 where it "
            "is followed), overlong (0 to -1 over the last soft_punish_cache tokens), repetition "
            "(0 to repetition_max_penalty by the share of repeated n-grams), and functions of your "
            "own by import path, package.module:function, with TRL's signature."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One for each of reward_funcs; 0 only logs. By default 1, and 0.1 for format."
        },
    )
    soft_punish_cache: int | None = field(
        default=None,
        metadata={
            "help": "For overlong: the tokens before max_completion_length over which its "
            "punishment grows (L_cache of DAPO)."
        },
    )
    repetition_ngram: int = field(
        default=3, metadata={"help": "For repetition: tokens of what counts as repeated."}
    )
    repetition_max_penalty: float = field(
        default=-1.0, metadata={"help": "For repetition: of a completion that only repeats."}
    )
    verifier_workers: int = field(
        default=2,
        metadata={"help": "Processes of this device for mathematics, which alone can hang."},
    )
    verifier_limit: float = field(
        default=DEFAULT_LIMIT,
        metadata={"help": "Seconds of one comparison; then its outcome is timeout, no reward."},
    )
    datasets: str | None = field(
        default=None,
        metadata={
            "help": "YAML: matchers by data set, looked at before the built-in table; the one "
            "that `mmpr verify` was given."
        },
    )
    sampler: str = field(
        default="auto", metadata={"help": "'vllm', 'transformers', or 'auto': vLLM where it is."}
    )
    vllm_gpu_memory_utilization: float | None = field(
        default=None,
        metadata={
            "help": "Share of a GPU that vLLM may fill beside the trainer, its weights included "
            "(0.3 is a start); by default vLLM's own, which leaves the trainer little."
        },
    )
    max_logprob_gap: float | None = field(
        default=None,
        metadata={
            "help": "Stop when sampler and trainer differ by more than this in the log-probability "
            "of a sampled token (float32: 1e-4 holds). By default only logged."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Write every rollout to output_dir/rollouts."}
    )
    freeze_vit: bool = field(
        default=True,
        metadata={
            "help": "Do not train the vision tower (as published); each image then passes it once "
            "a rollout batch."
        },
    )
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"verifier_workers", "judge_base_url", "judge_api_key_env", "judge_timeout"}
        | {"judge_max_retries", "judge_max_concurrency", "judge_cache"}
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Always true: rollouts are not skipped but continued."}
    )

    def __post_init__(self) -> None:
        """Check the online stage's own options."""
        if not self.train_file:
            raise UserError("train_file is missing: the JSONL of questions")
        if self.max_steps < 1:
            raise UserError("max_steps is missing: the number of optimizer steps")
        if self.num_generations < 2:
            raise UserError(f"num_generations is {self.num_generations}; a group needs at least 2")
        if self.steps_per_generation < 1:
            raise UserError(f"steps_per_generation is {self.steps_per_generation}, at least 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; greedy rollouts have no spread")
        self.check_loss_options()
        if self.sampler not in ("auto", "vllm", "transformers"):
            raise UserError(f"sampler is {self.sampler!r}: 'auto', 'vllm' or 'transformers'")
        if self.eval_strategy != "no" or self.eval_on_start:
            raise UserError("eval_strategy: evaluate checkpoints with `cascade evaluate` instead")
        if self.dataloader_num_workers:
            raise UserError("dataloader_num_workers: this stage makes its batches from rollouts")
        if self.position_steps is not None:
            raise UserError(
                "position_steps: rollouts are sampled, and then trained on, with the position_step "
                "of the checkpoint's config.json; set it there"
            )
        if self.data_seed is not None:
            raise UserError("data_seed: the order of the questions follows seed in this stage")
        self._check_rewards()
        super().__post_init__()

    def _check_rewards(self) -> None:
        """Refuse rewards that cannot be added up, and options of what is not among them."""
        names = self.reward_funcs
        if not isinstance(names, list) or not names:
            raise UserError(f"reward_funcs is {names!r}; give a list of at least one")
        for name in names:
            if not isinstance(name, str) or names.count(name) > 1:
                raise UserError(f"reward_funcs: {name!r} is no name, or is there more than once")
        weights = self.reward_weights
        if weights is not None:
            if len(weights) != len(names):
                raise UserError(
                    f"reward_weights has {len(weights)} values for {len(names)} of reward_funcs"
                )
            if not all(map(math.isfinite, weights)) or not any(weights):
                raise UserError(f"reward_weights is {weights}; numbers, and not all of them 0")
        if ("overlong" in names) != (self.soft_punish_cache is not None):
            raise UserError("soft_punish_cache goes with overlong in reward_funcs: give both")
        for option, default in (("repetition_ngram", 3), ("repetition_max_penalty", -1.0)):
            if getattr(self, option) != default and "repetition" not in names:
                raise UserError(f"{option} is given, but repetition is not among reward_funcs")
        if self.verifier_workers < 1:
            raise UserError(f"verifier_workers is {self.verifier_workers}, at least 1")
        if not 0 < self.verifier_limit <= 3600:
            raise UserError(
                f"verifier_limit is {self.verifier_limit:g}; seconds, above 0 and at most 3600"
            )
        try:
            self.check_judge_options()
        except ValueError as error:
            raise UserError(str(error)) from None
