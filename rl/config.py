"""Options of the online stage; names are TRL's GRPOConfig's where it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from internvl.errors import UserError
from rewards.judging_options import JudgeOptions
from rewards.pool import DEFAULT_LIMIT
from rl.guard_options import GuardOptions
from rl.loss_options import LossOptions
from rl.sampler_options import SamplerOptions
from training.arguments import Copies, PackedTrainingArguments


@dataclass
class RLConfig(SamplerOptions, LossOptions, GuardOptions, JudgeOptions, PackedTrainingArguments):
    """Options of the online stage; see PackedTrainingArguments for the common ones.

    SamplerOptions say who samples, LossOptions which loss it is, GuardOptions what watches over it,
    JudgeOptions ask a judge.

    `per_device_train_batch_size` counts groups (questions) of one optimizer step; a rollout batch
    is `steps_per_generation` times as many, sampled from one version of the weights.
    """

    train_file: str = field(
        default="", metadata={"help": "Questions: JSONL, parquet, saved data set."}
    )
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Of AdamW at its highest; for LoRA ten times as much."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions a question, G."})
    steps_per_generation: int = field(
        default=2, metadata={"help": "Optimizer steps a rollout batch is cut into (mini-batches)."}
    )
    dynamic_sample: bool = field(
        default=False,
        metadata={
            "help": "Sample the next questions in place of groups without spread (DAPO), so that "
            "every group of a step carries a gradient."
        },
    )
    max_resample_times: int = field(
        default=3, metadata={"help": "Rounds of dynamic_sample; then such groups stay."}
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
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Write every rollout to output_dir/rollouts, and a few of them to the trackers "
            "of report_to (W&B, TensorBoard)."
        },
    )
    log_multimodal: bool = field(
        default=True, metadata={"help": "Those of the trackers with their pictures, made small."}
    )
    reward_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that a reward function of your own may take for a batch."},
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
        | {"collapse_min_entropy", "collapse_min_length", "collapse_max_length"}
        | {"collapse_no_spread", "collapse_steps", "reward_timeout", "log_multimodal"}
        | {"server", "server_model", "server_weights_dir", "server_timeout", "server_patience"}
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
        if self.max_resample_times != 3 and not self.dynamic_sample:
            raise UserError("max_resample_times is given, but dynamic_sample is not")
        if self.max_resample_times < 1:
            raise UserError(f"max_resample_times is {self.max_resample_times}, at least 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; greedy rollouts have no spread")
        self.check_loss_options()
        self.check_sampler_options()
        if self.max_staleness and not self.vllm_importance_sampling_correction:
            raise UserError(
                "max_staleness trains on completions of older weights: give "
                "vllm_importance_sampling_correction, too"
            )
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch":
                raise UserError(f'{name} is "epoch"; rollouts have none: give "steps"')
        evaluates = self.eval_strategy != "no" or self.eval_on_start
        self.check_guard_options(self.num_generations, evaluates)
        if not self.log_multimodal and not self.log_completions:
            raise UserError("log_multimodal is given, but log_completions is not")
        if not self.reward_timeout > 0:
            raise UserError(f"reward_timeout is {self.reward_timeout:g}; seconds, above 0")
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

    @property
    def copies_of_trained(self) -> Copies:
        """The KL term's: the weights of the start, and those of now while the others are in place.

        See `StartWeights`.
        """
        return Copies(host=2 if self.beta else 0)

    @property
    def scores_entropy(self) -> bool:
        """Always: it is logged."""
        return True

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
