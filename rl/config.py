"""Options of the online stage; names are TRL's GRPOConfig's where it has them."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl.errors import UserError
from training.arguments import PackedTrainingArguments


@dataclass
class RLConfig(PackedTrainingArguments):
    """Options of GSPO; see PackedTrainingArguments for the common ones.

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
    epsilon: float = field(default=3e-4, metadata={"help": "Lower clip, eps_low."})
    epsilon_high: float = field(default=4e-4, metadata={"help": "Upper clip, eps_high."})
    scale_rewards: bool = field(
        default=True, metadata={"help": "Divide advantages by the group's standard deviation."}
    )
    format_weight: float = field(
        default=0.1, metadata={"help": "Reward for following the format, beside 1 for correct."}
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
        if not (0 < self.epsilon < 1 and self.epsilon_high > 0):
            raise UserError("epsilon and epsilon_high are clips around 1: 0 < epsilon < 1")
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
        super().__post_init__()
