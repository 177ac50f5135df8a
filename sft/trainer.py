"""The SFT stage on PackedTrainer: one completion an example, and a stop by what was learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    InternVLProcessor,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from internvl.data import Row, write_json
from internvl.drop_path import DropPath
from internvl.errors import UserError
from internvl.logprobs import TokenScores
from internvl.packing import Example, PackedBatch
from sft.accounts import Accounts
from sft.config import SFTConfig
from sft.losses import sft_loss, total_weight
from sft.measuring import with_length
from sft.streaming import PackLoader
from sft.training_data import LoadedData, TrainingData
from training.batches import StepCollator
from training.late_checks import LateChecks, late_quarantine
from training.metrics import Metrics
from training.orders import Order
from training.trainer import PackedTrainer


class CooldownSchedule:
    """Learning-rate factor: linear warm-up, constant, and once started a linear cool-down.

    A class and not a function, so that torch's LambdaLR saves and restores `cooldown_start`.
    """

    def __init__(self, warmup_steps: int, cooldown_steps: int):
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.cooldown_start: int | None = None

    def __call__(self, step: int) -> float:
        """The factor of the step that comes after `step` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.cooldown_start is None:
            return 1.0
        return max(0.0, 1.0 - (step - self.cooldown_start) / self.cooldown_steps)


class StopWhenLearned(TrainerCallback):
    """Starts the cool-down when the held-out gold completions are probable enough, then stops.

    The measure is the mean over held-out rows of p(gold completion | image, question): the chance
    that one sample at temperature 1 repeats the gold chain of thought. It is exact, needs no
    sampling, and is the same on every machine.
    """

    def __init__(self, threshold: float, schedule: CooldownSchedule):
        self.threshold = threshold
        self.schedule = schedule

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the cool-down at the first evaluation at or over the threshold."""
        reached = metrics is not None and metrics["eval_gold_probability"] >= self.threshold
        if reached and self.schedule.cooldown_start is None:
            self.schedule.cooldown_start = state.global_step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop when the cool-down is over."""
        start = self.schedule.cooldown_start
        if start is not None and state.global_step >= start + self.schedule.cooldown_steps:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = True


class SFTTrainer(PackedTrainer):
    """Supervised fine-tuning of InternVL on conversations (rows of kind "conversation").

    train_dataset, eval_dataset: besides rows also a `datasets.Dataset`, or a list of records, whose
    fields are those of a JSONL line; they are checked as a file's are. Other arguments:
    `PackedTrainer`.
    """

    loss_count = "weight"
    completion_value_names = ("sample_length",)
    progress_metrics = ("loss", "eval_gold_probability")

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        train_dataset: Any,
        processing_class: InternVLProcessor,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        given = LoadedData(args, train_dataset, eval_dataset)
        super().__init__(
            model, args, given.train, processing_class, eval_dataset=given.held_out, **kwargs
        )
        self.train_dataset, self.eval_dataset = given.usable(self.encoder, self.held_out_encoder)
        self._schedule: CooldownSchedule | None = None
        config = self.sft_args
        self._drop_path: DropPath | None = None
        if config.vit_drop_path:
            whole: Any = self.model
            base = whole.get_base_model() if isinstance(whole, PeftModel) else whole
            if not any(p.requires_grad for p in base.model.vision_tower.parameters()):
                raise UserError(
                    f"vit_drop_path is {config.vit_drop_path:g}, but nothing of the vision tower "
                    "is trained: name vit in lora_parts, or leave it out"
                )
            self._drop_path = DropPath(base, config.vit_drop_path)
        if config.check_rows == "when_used" and self.train_dataset is not None:
            self.late_checks = LateChecks(
                late_quarantine(config),
                config.max_bad,
                rank=config.process_index,
                device=config.device,
                most_rows=len(self.train_dataset),
            )
        if config.stop_gold_probability is not None:
            self._schedule = CooldownSchedule(
                config.get_warmup_steps(config.max_steps), config.cooldown_steps
            )
            self.add_callback(StopWhenLearned(config.stop_gold_probability, self._schedule))
        self._data: TrainingData | None = None
        if self.train_dataset is not None:
            self._data = TrainingData(self.train_dataset, config, self.encoder, self.encode)
            if config.packing:
                self._data.open_packs(self.train_collator(), self.at_epoch)
            if self.is_world_process_zero():
                for line in self._data.describe():
                    print(line)

    @property
    def sft_args(self) -> SFTConfig:
        """The options, with our type."""
        assert isinstance(self.args, SFTConfig)
        return self.args

    def encode(self, row: Row) -> Example:
        """A conversation as one prompt with one completion."""
        return with_length(self.encoder.conversation(row))

    def at_epoch(self, epoch: int) -> None:
        """What is encoded from here on is of this epoch: augmentation draws anew in each."""
        augmentation = self.encoder.augmentation
        if augmentation is not None and augmentation.epoch != epoch:
            self.encoder = replace(self.encoder, augmentation=replace(augmentation, epoch=epoch))

    def encode_held_out(self, row: Row) -> Example:
        """The same of a conversation that is evaluated on, its images as they are."""
        return with_length(self.held_out_encoder.conversation(row))

    def count(self, examples: Sequence[Example]) -> dict[str, float]:
        """Examples, and the total weight of their response tokens."""
        lengths = [sum(mask) for e in examples if e.loss_masks for mask in e.loss_masks]
        samples = [x for e in examples for x in e.completion_values["sample_length"]]
        weight = total_weight(lengths, self.sft_args.loss_average, samples)
        return {"examples": float(len(examples)), "weight": weight}

    def loss(
        self, scores: TokenScores, batch: PackedBatch, counts: dict[str, float]
    ) -> tuple[Tensor, Metrics]:
        """The weighted mean of -log p over the global batch's response tokens."""
        loss = sft_loss(
            scores.logprobs,
            batch.completion_of_token,
            batch.completion_values["sample_length"],
            self.sft_args.loss_average,
            counts["weight"] or 1.0,  # 0: every row of the step was bad, and there is no term
        )
        metrics = Metrics()
        metrics.mean("mean_token_logprob", scores.logprobs)
        metrics.mean("gold_probability", batch.sum_by_completion(scores.logprobs.detach()).exp())
        return loss, metrics

    def score(self, model: nn.Module, batch: PackedBatch) -> TokenScores:
        """PackedTrainer's, the drop path of the batch's tiles drawn before."""
        if self._drop_path is not None and self.model.training:
            keys = batch.tile_keys
            if keys is None or not len(keys):
                keys = torch.zeros(1, dtype=torch.long)  # of the tile that stands for none
            self._drop_path.draw(keys.to(self.args.device), self.state.global_step)
        return super().score(model, batch)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """Transformers' epoch; augmentation draws anew in each, as it is published."""
        if not self.sft_args.packing:  # there each sample brings its own epoch
            self.at_epoch(epoch)  # before the loader's workers are forked
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    # ---- which rows are drawn (sft/training_data.py) ----

    def train_order(self) -> Order | None:
        """The mixture's, where the options ask for one."""
        order = None if self._data is None else self._data.order
        return super().train_order() if order is None else order

    @property
    def _accounts(self) -> Accounts | None:
        return None if self._data is None else self._data.accounts

    @property
    def _packs(self) -> PackLoader | None:
        return None if self._data is None else self._data.packs

    def train_collator(self) -> StepCollator:
        """PackedTrainer's, that also counts what is drawn."""
        collator = super().train_collator()
        tally = None if self._accounts is None else self._accounts.tally
        return replace(collator, tally=tally)

    def get_train_dataloader(self) -> Any:
        """The packs of this rank's stream, or its share of each step."""
        return super().get_train_dataloader() if self._packs is None else self._packs

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """PackedTrainer's; a stream of packs knows its place, and nothing of it is skipped."""
        begun = super()._init_training_state(*args, **kwargs)
        return (0, 0) if self.sft_args.packing else begun

    def note_counts(self, counts: dict[str, float]) -> None:
        """Take what a step has drawn to the account."""
        if self._accounts is not None:
            self._accounts.note(counts, self._metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """PackedTrainer's log; with packing an epoch is a pass over the samples."""
        if self._packs is not None:
            self.state.epoch = self._packs.epoch
        super().log(logs, start_time)

    def run(self) -> None:
        """PackedTrainer's run, and the account of what was drawn."""
        super().run()
        if self._accounts is not None and self.is_world_process_zero():
            print("\n".join(self._accounts.describe()))

    # ---- what a checkpoint holds ----

    def _settings(self) -> dict[str, Any]:
        """PackedTrainer's; what a pack holds decides which samples share a step."""
        settings = super()._settings()
        if self.sft_args.packing:
            for name in ("max_tokens_per_microbatch", "max_tiles_per_microbatch"):
                settings[name] = getattr(self.args, name)
        return settings

    def stage_state(self) -> dict[str, Any]:
        """What was drawn, and how many rows were bad where they are checked when they are used."""
        late = self.late_checks
        state = {} if late is None else {"rows_seen": late.seen, "rows_bad": late.bad}
        return state if self._accounts is None else {**state, "drawn": self._accounts.totals}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        """Go on with those counts."""
        if self.late_checks is not None:
            self.late_checks.go_on(state.get("rows_seen", 0), state.get("rows_bad", 0))
        if self._accounts is not None:
            self._accounts.go_on(state["drawn"])

    def save_rank_state(self, folder: Path) -> None:
        """How this rank's stream of packs goes on."""
        if self._packs is not None:
            write_json(self._stream_file(folder), self._packs.state)

    def load_rank_state(self, folder: Path) -> None:
        """Go on there."""
        if self._packs is not None:
            self._packs.restore(json.loads(self._stream_file(folder).read_text()))

    def _stream_file(self, folder: Path) -> Path:
        return folder / f"stream-{self.args.process_index}.json"

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The adaptive schedule where a stop by probability was asked for, else transformers'."""
        if self._schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, self._schedule
        )
        self._created_lr_scheduler: bool = True
        return self.lr_scheduler
