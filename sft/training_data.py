"""What an SFT run draws from its rows: the order, the packs where there are any, the account."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from internvl.data import Quarantine, Row
from internvl.data.loaded import LoadedRows, as_rows
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.packing import Example
from sft.accounts import Accounts
from sft.config import SFTConfig
from sft.measuring import Measure, checking_encoder, measure_all, pack_limits
from sft.mixture import Mixture, make_mixture, spans_of
from sft.packing import Packer
from sft.streaming import PackCollator, PackLoader, Planner
from training.batches import StepCollator
from training.orders import Order, Shuffled
from training.stage import keep_usable, quarantine_file


class LoadedData:
    """What a program gives the trainer, as rows; those that were loaded by others are checked."""

    def __init__(self, args: SFTConfig, train: Any, held_out: Any):
        root = Path(args.image_root or ".")
        self.train = as_rows(train, "conversation", root, "train_dataset")
        self.held_out = as_rows(held_out, "conversation", root, "eval_dataset")
        self._args = args

    def usable(
        self, encoder: Encoder, held_out_encoder: Encoder
    ) -> tuple[Sequence[Row] | None, Sequence[Row] | None]:
        """The rows to train on and to evaluate on, bad ones put aside."""
        args = self._args
        train = self.train
        if args.check_rows == "before":
            train = self._checked(train, checking_encoder(args, encoder), "train_dataset")
        return train, self._checked(self.held_out, held_out_encoder, "eval_dataset")

    def _checked(
        self, rows: Sequence[Row] | None, encoder: Encoder, name: str
    ) -> Sequence[Row] | None:
        if not isinstance(rows, LoadedRows):
            return rows  # read_rows and usable_rows have seen to it
        args = self._args
        file = quarantine_file(args) if args.process_index == 0 else None
        if file is not None and name == "train_dataset":
            file.unlink(missing_ok=True)  # the rows are looked at anew, and put aside anew
        quarantine = Quarantine(file, args.max_bad)
        return keep_usable(rows, "conversation", args, encoder, quarantine, name=name)


class TrainingData:
    """The training rows of one rank, as the options ask for them.

    order: of the samples (None: as torch shuffles them). accounts: what was drawn (None where there
    is one data set, drawn whole). packs: the stream of packs, once `open_packs` was called.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        args: SFTConfig,
        encoder: Encoder,
        encode: Callable[[Row], Example],
    ):
        self.rows = rows
        self.order: Mixture | None = make_mixture(rows, args, encoder)
        self.accounts: Accounts | None = None
        self.packs: PackLoader | None = None
        self._args = args
        self._encoder = encoder
        self._encode = encode
        names = [span.name for span in spans_of(rows) if span.name is not None]
        limits = pack_limits(args, encoder) if args.packing else None
        if len(names) > 1 or args.packing or self.order is not None:
            self.accounts = Accounts(names if len(names) > 1 else [], limits)

    def open_packs(self, collator: StepCollator, at_epoch: Callable[[int], None]) -> None:
        """Plan the stream of packs; where it is to end with an epoch, its steps are `max_steps`.

        collator, at_epoch: see `PackCollator`. Raises `UserError` for data that give no pack.
        """
        args, limits = self._args, pack_limits(self._args, self._encoder)
        measure = Measure(self.rows, self._encoder, limits, self._encode)
        seed = args.seed if args.data_seed is None else args.data_seed
        order = self.order or Shuffled(len(self.rows), seed)
        stop = None
        if args.max_steps < 1:
            stop = math.ceil(args.num_train_epochs * len(order))
            measure.known = measure_all(measure, self._encoder, args)
            args.max_steps = self._count_steps(self._planner(order, measure, stop))
        planner = self._planner(order, measure, stop)
        packing = PackCollator(collator, limits, len(order), at_epoch)
        self.packs = PackLoader(planner, packing, args.dataloader_num_workers)

    def _planner(self, order: Order, measure: Measure, stop: int | None) -> Planner:
        args = self._args
        packer = Packer(measure.limits.tokens, measure.limits.tiles, args.packing_buffer_size)
        return Planner(
            *(order, measure, packer, args.per_device_train_batch_size),
            rank=args.process_index,
            world_size=args.world_size,
            stop=stop,
            late=args.check_rows == "when_used",
        )

    def _count_steps(self, planner: Planner) -> int:
        """The steps of the rank that has most."""
        steps = [planner.count_steps()]
        if dist.is_initialized():
            every: list[int] = [0] * dist.get_world_size()
            dist.all_gather_object(every, steps[0])
            steps = every
        if not max(steps):
            raise UserError("packing: num_train_epochs leaves no sample to train on")
        return max(steps)

    def describe(self) -> Iterator[str]:
        """What is going to be drawn, line by line."""
        if self.order is not None:
            yield from self.order.describe()
            for span in spans_of(self.rows):
                if not len(span.numbers):
                    yield f"  {span.name}: no samples: no row of it is left, or repeat_time is 0"
        elif self.accounts is not None and self.accounts.names:
            yield f"mixture: {len(self.rows)} samples an epoch, every row of each data set"
            for span in spans_of(self.rows):
                share = len(span.numbers) / len(self.rows)
                yield f"  {span.name}: {len(span.numbers)} samples ({share:.1%})"
        if self.packs is not None:
            limits = pack_limits(self._args, self._encoder)
            tiles = "" if limits.tiles is None else f" and {limits.tiles} tiles"
            yield (
                f"packing: {self._args.per_device_train_batch_size} packs of {limits.tokens} "
                f"tokens{tiles} a step of each process, {self._args.max_steps} steps"
            )
