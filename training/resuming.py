"""A Trainer that can be killed anywhere: started again, it ends with the same weights.

Transformers' own resume loads the optimizer and the order of the rows; what is changed here is that
only whole checkpoints count, that weights are loaded strictly and proved by their checksum, that a
stage and each rank can keep a state of their own, and that another run's checkpoint is refused.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from accelerate.utils.fsdp_utils import load_fsdp_optimizer
from peft import PeftModel
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer

from internvl.checkpoint import checksum, load_weights
from internvl.conversion.originals import carry_originals
from internvl.data.fingerprint import fingerprint
from internvl.errors import UserError
from internvl.model import InternVLForConditionalGeneration
from training import checkpoints
from training.arguments import PackedTrainingArguments
from training.settings import run_settings


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: all of it, or its shard under FSDP2 and ZeRO-3."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    shard = getattr(parameter, "ds_tensor", None)  # set by DeepSpeed where it has cut it up
    return parameter if shard is None else shard


def _load_state(part: Any, file: Path) -> None:
    part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


class ResumableTrainer(Trainer):
    """transformers' Trainer with checkpoints that can be trusted; `run` is its entry."""

    _resumed: dict[str, Any] | None = None  # the record of the checkpoint that the run goes on from

    @property
    def packed_args(self) -> PackedTrainingArguments:
        """The options, with our type."""
        assert isinstance(self.args, PackedTrainingArguments)
        return self.args

    # ---- what a stage may keep ----

    def stage_state(self) -> dict[str, Any]:
        """JSON-able state of the stage beyond transformers' own, saved by the main process."""
        return {}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        """Restore what `stage_state` gave."""

    def save_rank_state(self, folder: Path) -> None:
        """Write files of this rank's own into a checkpoint (a rollout buffer, say)."""

    def load_rank_state(self, folder: Path) -> None:
        """Read what `save_rank_state` wrote."""

    # ---- saving ----

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run goes on: checked against the checkpoint's record."""
        model = self.accelerator.unwrap_model(self.model)
        settings = run_settings(self.packed_args, model, self.accelerator.mixed_precision)
        rows = self.train_dataset
        number = None if rows is None else len(rows)
        return {**settings, "train_examples": number, "content of train_file": self._train_data}

    @cached_property
    def _train_data(self) -> str | None:
        """What the training rows are; a stage that hashes its rows itself has None here."""
        return None if self.train_dataset is None else fingerprint(self.train_dataset)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _weights_checksum(self) -> str:
        """Checksum of what is trained; of sharded weights over all ranks' shards, by all ranks."""
        model = self.accelerator.unwrap_model(self.model)
        trained = [(n, local_part(p)) for n, p in model.named_parameters() if p.requires_grad]
        own = checksum(trained)
        if not self._is_sharded:
            return own
        every = [own]
        if self.args.world_size > 1:
            every = [""] * self.args.world_size
            dist.all_gather_object(every, own)
        return hashlib.sha256("".join(every).encode()).hexdigest()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, our state beside it, and the marker last."""
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            checkpoints.begin(folder)
        self._wait_for_all()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.save_rank_state(folder)
        first = self.is_world_process_zero()
        weights = self._weights_checksum() if first or self._is_sharded else ""
        self._wait_for_all()
        if first:
            record = {
                "step": self.state.global_step,
                "weights": weights,
                "finished": self.control.should_training_stop,
                "resumable": not self.args.save_only_model,
                "settings": self._settings(),
                "stage": self.stage_state(),
            }
            checkpoints.mark_complete(folder, record)
            best = self.state.best_model_checkpoint
            checkpoints.keep_newest(output_dir, limit, None if best is None else Path(best))
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    # ---- going on ----

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, but how often to log, save and evaluate is what the options say."""
        begun = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # on resume it took the checkpoint's
        return begun

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights strictly and compare their checksum with its record."""
        folder = Path(resume_from_checkpoint)
        target = self.model if model is None else model
        if isinstance(target, InternVLForConditionalGeneration) and not self._is_sharded:
            load_weights(target, folder)
        else:  # adapters and sharded models: transformers knows their formats
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._go_on(folder)

    def _go_on(self, folder: Path) -> None:
        """Prove the weights that were loaded, and restore what the stage and this rank kept."""
        record = checkpoints.read_marker(folder)
        if self._weights_checksum() != record["weights"]:
            raise UserError(f"{folder}: the weights that were loaded are not those of the save")
        self.load_stage_state(record["stage"])
        self.load_rank_state(folder)
        self._resumed = record

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Both, or an error; transformers goes on without them where a file is missing.

        And by way of the CPU: with two gloo ranks transformers asks torch for a device "cpu:0",
        which it does not know. Sharded optimizers are loaded by who saved them: accelerate, and
        DeepSpeed's engine, which has loaded weights and optimizer before this is called.
        """
        assert checkpoint is not None
        folder = Path(checkpoint)
        if self.is_deepspeed_enabled:
            self._go_on(folder)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            load_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, str(folder))
        else:
            _load_state(self.optimizer, folder / "optimizer.pt")
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):  # else the engine's
            _load_state(self.lr_scheduler, folder / "scheduler.pt")

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Transformers' epoch; none after the run's last checkpoint, where it would add a step."""
        if self._resumed is not None and self._resumed["finished"]:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def run(self) -> None:
        """Train, going on from the newest complete checkpoint, and save the result.

        With `resume: never`, raises `UserError` when output_dir already holds checkpoints.
        """
        output_dir = Path(self.args.output_dir)
        folder = checkpoints.newest_complete(output_dir)
        settings = self._settings()  # of the data as they are before the first step
        if self.packed_args.resume == "never" and checkpoints.all_checkpoints(output_dir):
            raise UserError(f"{output_dir} holds checkpoints and resume is 'never'")
        if folder is not None:
            checkpoints.check_same_run(folder, settings)
        checkpoints.refuse_foreign(output_dir)
        self._wait_for_all()
        if self.is_world_process_zero():
            for broken in checkpoints.remove_incomplete(output_dir):
                print(f"{broken}: half-written, removed")
            if folder is not None:
                print(f"going on from {folder}")
        self._wait_for_all()
        self.train(resume_from_checkpoint=None if folder is None else str(folder))
        self.save_model()
        self.save_state()
        if self.is_world_process_zero():
            base = self.accelerator.unwrap_model(self.model)
            # an adapter gets its base's when it is merged; a model made in memory has none
            if not isinstance(base, PeftModel) and base.name_or_path:
                carry_originals(Path(base.name_or_path), output_dir)
            print(f"{output_dir}: saved after {self.state.global_step} steps")
