"""PackedTrainer: transformers' Trainer whose step is a set of packed micro-batches.

    StepBatch --> for each micro-batch: model(packed=...) -> token log-probs -> stage's loss
                  backward(loss / global counts * world size), synchronised at the last one only

What users know stays transformers' own: arguments, callbacks, trackers, mixed precision, PEFT,
DDP. What is overridden: how rows are shared out over ranks (no row twice, equal step counts), the
step itself, the evaluation loop, and checkpoints (see training/resuming.py).

A stage gives three things: `encode` (row -> Example), `count` (examples -> the totals that its
loss is normalised by) and `loss` (log-probs -> loss and metrics). The trainer never looks inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch import distributed as dist
from transformers import InternVLProcessor, ProgressCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from internvl.adapters import given_adapter
from internvl.chat import normalize_tiles
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.logprobs import TokenScores
from internvl.model import adopt
from internvl.packing import Example, PackedBatch, filler
from training import parts, refusals, sharding
from training.arguments import PackedTrainingArguments
from training.attention import use_attention
from training.batches import (
    SHUFFLED_IN_MEMORY,
    STEP_BATCH,
    StepBatch,
    StepCollator,
    StepLoader,
    StepSampler,
)
from training.encoders import make_encoder, set_checkpoint_step
from training.kernels import use_liger
from training.late_checks import LateChecks
from training.memory import report_memory
from training.metrics import Metrics, sum_over_ranks
from training.orders import InOrder, Order, Shuffled
from training.progress import StageProgress
from training.resuming import ResumableTrainer

NUM_TOKENS = "num_tokens"  # TRL's name for the tokens that a run has seen so far


class PackedTrainer(ResumableTrainer):
    """The one trainer; a stage subclasses it with `encode`, `count` and `loss`.

    model: InternVL (transformers' or ours), or a PeftModel of it, whose one adapter is trained on.
    args: the stage's options. train_dataset, eval_dataset: sequences of rows that `encode`
    understands. processing_class: the checkpoint's InternVLProcessor. peft_config: a PEFT
    configuration for adapter training. encoder: how rows become ids and tiles; by default from
    `processing_class` and the options.
    """

    # the names that every Example of the stage carries, for the filler of an idle rank
    completion_value_names: tuple[str, ...] = ()
    token_value_names: tuple[str, ...] = ()
    # the count that the loss is a mean over: a set's loss is the mean of its batches' by it
    loss_count = "examples"
    # the metrics on the progress bar
    progress_metrics: tuple[str, ...] = ("loss",)
    late_checks: LateChecks | None = None  # where rows are checked when they are used
    _rates_are_set = False  # the optimizer's groups are split by learning rate

    def __init__(
        self,
        model: nn.Module,
        args: PackedTrainingArguments,
        train_dataset: Sequence[Any] | None,
        processing_class: InternVLProcessor,
        eval_dataset: Sequence[Any] | None = None,
        peft_config: Any = None,
        encoder: Encoder | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise UserError(
                "nn.DataParallel is not supported: start one process a GPU with accelerate launch"
            )
        refusals.refuse_lone_ranks(args)
        refusals.refuse_unread(kwargs)
        given = given_adapter(model, peft_config)
        internvl = adopt(model.get_base_model() if isinstance(model, PeftModel) else model)
        use_attention(internvl, args)
        use_liger(internvl, args)
        own = make_encoder(internvl, processing_class, args)
        self.encoder = encoder or own
        if self.encoder.position_steps != own.position_steps:
            raise UserError(
                f"the encoder's position_steps are {self.encoder.position_steps}, those of the "
                f"options and the checkpoint {own.position_steps}"
            )
        if self.encoder.augmentation != own.augmentation:
            raise UserError(
                f"the encoder's augmentation is {self.encoder.augmentation}, that of the options "
                f"{own.augmentation}"
            )
        self.held_out_encoder = replace(self.encoder, augmentation=None)
        set_checkpoint_step(internvl, args, peft_config or given)
        parts.freeze_parts(internvl, args)
        self._metrics = Metrics()
        with refusals.told_in_one_line():
            if peft_config is not None:
                from peft import get_peft_model

                set_seed(args.seed)  # a restart must draw the same adapter: MPO's reference
                model = get_peft_model(internvl, peft_config)
            trained = parts.check_parts(model, args)
            memory = report_memory(model, args, trained)
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        refusals.refuse_other_backend(args, self.accelerator)
        sharding.refuse_split_head(self.accelerator, internvl)
        sharding.keep_precision(self.accelerator)
        refusals.warn_of_rounding(self)
        if self.is_world_process_zero():
            print("\n".join([parts.describe_parts(self.model, trained), *memory]))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageProgress(self.progress_metrics))
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, by global counts

    # ---- what a stage gives ----

    def encode(self, row: Any) -> Example:
        """A row of the stage's data set as an Example."""
        raise NotImplementedError

    def encode_held_out(self, row: Any) -> Example:
        """A row that is evaluated on: `encode` without augmentation, where a stage has one."""
        return self.encode(row)

    def count(self, examples: Sequence[Example]) -> dict[str, float]:
        """Totals of these examples; `loss` receives their sums over micro-batches and ranks."""
        raise NotImplementedError

    def loss(
        self, scores: TokenScores, batch: PackedBatch, counts: dict[str, float]
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's part of the global loss (terms divided by `counts`), and metrics."""
        raise NotImplementedError

    def note_counts(self, counts: dict[str, float]) -> None:
        """Told each training step's totals over all ranks."""

    def score_options(self) -> dict[str, Any]:
        """Keyword arguments of the packed forward (temperature, forbidden ids, entropy)."""
        return {}

    # ---- data ----

    @property
    def collator(self) -> StepCollator:
        """Rows to a StepBatch by this stage's `encode` and `count`."""
        args = self.packed_args
        return StepCollator(
            self.encode, self.count, args.max_tokens_per_microbatch, args.max_tiles_per_microbatch
        )

    @property
    def data_seed(self) -> int:
        """What the order of the rows goes by."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _step_loader(
        self,
        rows: Any,
        batch_size: int,
        shuffle: bool,
        collator: StepCollator,
        order: Order | None = None,
    ) -> StepLoader:
        if order is not None:
            rows = InOrder(rows, order)
        sampler = StepSampler(
            len(rows),
            batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.data_seed,
            shuffle=shuffle,
            by_place=order is not None,
        )
        return StepLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            # the collator holds the trainer, which other start methods would have to pickle
            multiprocessing_context=(self.args.dataloader_multiprocessing_context or "fork")
            if self.args.dataloader_num_workers
            else None,
            generator=torch.Generator(),  # the workers' base seed must not move the global RNG
        )

    def get_train_dataloader(self) -> Any:
        """Our own shares of each step; not passed through accelerate, which would reshard it."""
        if self.train_dataset is None:
            raise UserError("training needs a train_dataset")
        size, order = self.args.per_device_train_batch_size, self.train_order()
        return self._step_loader(self.train_dataset, size, True, self.train_collator(), order)

    def train_collator(self) -> StepCollator:
        """Of rows that are trained on, checked there where they are when they are used."""
        longest = None if self.late_checks is None else self.encoder.max_length
        return replace(self.collator, longest=longest)

    def train_order(self) -> Order | None:
        """How rows are drawn; None: each once an epoch, as torch shuffles them in memory."""
        rows: Any = self.train_dataset
        return Shuffled(len(rows), self.data_seed) if len(rows) > SHUFFLED_IN_MEMORY else None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The evaluation rows in order, shared over the ranks."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise UserError("evaluation needs an eval_dataset")
        collator = replace(self.collator, encode=self.encode_held_out)
        return self._step_loader(rows, self.args.per_device_eval_batch_size, False, collator)

    # ---- the step ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, its groups split by learning rate where parts have one of their own.

        An optimizer that is not installed is one line.
        """
        before = self.optimizer  # the user's own, or DeepSpeed's stand-in
        with refusals.told_in_one_line():
            optimizer = super().create_optimizer(*args, **kwargs)
        if parts.has_own_rates(self.packed_args) and not self._rates_are_set:
            if before is not None:
                raise UserError("learning rates by part need the optimizer that optim names")
            parts.split_groups(optimizer, self.model, self.packed_args)
            self._rates_are_set = True
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; a schedule without the arguments it needs is one line."""
        with refusals.told_in_one_line():
            return super().create_scheduler(*args, **kwargs)

    def pixel_values(self, batch: PackedBatch) -> Tensor:
        """The batch's tiles normalised on the device; one black tile where there is none."""
        tiles = batch.tiles
        if not len(tiles):
            tiles = tiles.new_zeros((1, *tiles.shape[1:]))
        return normalize_tiles(self.processing_class, tiles)

    def vision_inputs(self, batch: PackedBatch) -> dict[str, Tensor]:
        """What the packed forward is given of the images: their pixels."""
        return {"pixel_values": self.pixel_values(batch)}

    def score(self, model: nn.Module, batch: PackedBatch) -> TokenScores:
        """Log-probabilities of a micro-batch (on the CPU or the device) under `model`."""
        batch = batch.on(self.args.device)
        # accelerate wraps a model only once it is prepared; MPO's reference is scored before that
        with self.accelerator.autocast():
            return model(packed=batch, **self.vision_inputs(batch), **self.score_options())

    def _microbatches(self, step: StepBatch) -> Iterable[tuple[PackedBatch, bool]]:
        """This rank's micro-batches and, after them, fillers up to the slowest rank's number."""
        number = max(1, len(step.microbatches))  # an empty step still moves Adam's moments
        if self.args.world_size > 1:
            most = torch.tensor(number, device=self.args.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            number = int(most)
        size: Any = self.processing_class.image_processor.size
        shape = torch.Size([3, size["height"], size["width"]])
        for index in range(number):
            if index < len(step.microbatches):
                batch = step.microbatches[index]
            else:
                batch = filler(self.completion_value_names, self.token_value_names, shape)
            yield batch, index == number - 1

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one optimizer step; returns the global loss on every rank."""
        step: StepBatch = inputs[STEP_BATCH]
        if self.late_checks is not None:
            self.late_checks.look(step)
        model.train()
        totals = {**step.counts, NUM_TOKENS: float(step.num_tokens)}
        counts = sum_over_ranks(totals, self.args.device)
        # transformers' own count: every checkpoint has it, and a resumed run goes on with it
        self.state.num_input_tokens_seen += int(counts.pop(NUM_TOKENS))
        self.note_counts(counts)
        gradient_state = self.accelerator.gradient_state
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        options = {"scale_wrt_gas": False} if deepspeed else {}
        total = torch.zeros((), device=self.args.device)
        for batch, last in self._microbatches(step):
            gradient_state._set_sync_gradients(last)
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with sync:
                device_batch = batch.on(self.args.device)
                scores = self.score(model, device_batch)
                loss, metrics = self.loss(scores, device_batch, counts)
                # DDP, FSDP and DeepSpeed average gradients over ranks; the loss is a global sum
                self.accelerator.backward(loss * self.args.world_size, **options)
            total += loss.detach()
            self._metrics.merge(metrics)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with the stage's metrics since the last one, and the tokens of the run.

        At the end also this process's tokens a second, as transformers counts them.
        """
        seen = self.state.num_input_tokens_seen
        if "loss" in logs:
            self._metrics.reduce(self.args.device)
            logs = {**logs, **self._metrics.values(), NUM_TOKENS: seen}
            self._metrics = Metrics()
        if seconds := logs.get("train_runtime"):
            done = seen - self._initial_num_input_tokens_seen
            logs[NUM_TOKENS], logs["train_tokens_per_second"] = seen, round(done / seconds, 3)
        if self._resumed is not None:
            logs.pop("train_loss", None)  # transformers' sum over this process's steps alone
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics over a data set, in the same packing and by the same global counts.

        The loss of each batch is normalised by that batch's counts and weighed by `loss_count`, so
        that loss and metrics are exact means over the whole set, whatever the batch size.
        """
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metrics = Metrics()
        samples = 0
        for inputs in dataloader:
            step: StepBatch = inputs[STEP_BATCH]
            counts = sum_over_ranks(step.counts, self.args.device)
            samples += int(counts["examples"])
            total = 0.0
            for batch, _ in self._microbatches(step):
                device_batch = batch.on(self.args.device)
                loss, part = self.loss(self.score(model, device_batch), device_batch, counts)
                metrics.merge(part)
                total += float(loss)
            # each rank adds its part of the sum, and its share of the count
            weight = counts[self.loss_count]
            metrics.ratio("loss", total * weight, weight / self.args.world_size)
        metrics.reduce(self.args.device)
        values = {f"{metric_key_prefix}_{name}": v for name, v in metrics.values().items()}
        return EvalLoopOutput(None, None, values, samples)
