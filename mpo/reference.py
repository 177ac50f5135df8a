"""The reference: the model that the stage starts from (the previous stage's), which never changes.

    cached (the default)   one pass over the pairs before the first step; the numbers go to disk
                           and are found again by their content: mpo/reference_cache.py
    on the fly             `precompute_ref_log_probs: false`: a second forward a step, under a
                           frozen copy of what is trained

Both give the same numbers. The copy holds only what is trained: of a whole model all of it, with
LoRA the adapter alone: a new one as it was drawn, adding nothing, and one that a previous stage
trained as that left it. So no second base is ever held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call
from torch.utils.data import DataLoader
from tqdm import tqdm

from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.packing import Example, PackedBatch
from mpo.reference_cache import Digests, ReferenceCache, Values
from mpo.reference_keys import reference_settings, sample_digests
from training import refusals
from training.batches import STEP_BATCH, StepCollator
from training.stage import gather_by_number

if TYPE_CHECKING:
    from mpo.trainer import MPOTrainer


@dataclass(frozen=True)
class ScoredPair:
    """A pair's row with the reference's log-probabilities of its two completions."""

    row: Row
    ref_chosen_logps: float
    ref_rejected_logps: float


class ScoredPairs(Sequence[ScoredPair]):
    """Pairs with the reference's [rows, 2] log-probabilities; each row is read when asked for."""

    def __init__(self, rows: Sequence[Row], values: Values):
        assert len(rows) == len(values)
        self._rows = rows
        self._values = values

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ScoredPair: ...

    @overload
    def __getitem__(self, index: slice) -> ScoredPairs: ...

    def __getitem__(self, index: int | slice) -> ScoredPair | ScoredPairs:
        if isinstance(index, slice):
            return ScoredPairs(self._rows[index], self._values[index])
        chosen, rejected = self._values[index].tolist()
        return ScoredPair(self._rows[index], chosen, rejected)


class FrozenModel(nn.Module):
    """A model as it is now: what is trained of it is copied, the rest is shared with it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # in a list: it is no part of this module
        self._model = [model]
        self._weights = {
            name: weight.detach().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """The model's forward with the weights of then, in evaluation mode."""
        (model,) = self._model
        training = model.training
        model.eval()
        try:
            return functional_call(model, self._weights, (), inputs)
        finally:
            model.train(training)


class Reference:
    """The reference of a run: the model as the trainer was given it.

    trainer: before its first step, and before a checkpoint is loaded. This class does for a loss
    that needs no log-probabilities of it: there is no pass and no copy.
    """

    value_names: tuple[str, ...] = ()  # what the encoded pairs carry

    def __init__(self, trainer: MPOTrainer):
        self._trainer = trainer
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self.keys: dict[str, str] = {}  # of the "train" pairs and the "eval" pairs
        self._settings = reference_settings(
            self._model,
            trainer.encoder,
            mixed_precision=str(trainer.accelerator.mixed_precision),
            tf32=bool(trainer.args.tf32),
        )
        self.cache = ReferenceCache(self._root, self._settings)
        found = gather_by_number({trainer.args.process_index: self.cache.key})
        if len(set(found.values())) > 1:
            raise UserError("the processes start from different weights or settings")

    @property
    def _root(self) -> Path:
        args = self._trainer.mpo_args
        return Path(args.reference_cache_dir or Path(args.output_dir or "") / "reference")

    def rows(self, rows: Sequence[Row], name: str) -> Sequence[Any]:
        """The rows as `encode` takes them; name: "train" or "eval"."""
        self._digests(rows, name)
        return rows

    def encode(self, pair: Any, encoder: Encoder) -> Example:
        """A pair as one prompt with two completions."""
        return encoder.pair(pair)

    def _encoder(self, name: str) -> Encoder:
        """The one of the "train" pairs, or of the "eval" pairs, which are never augmented."""
        return self._trainer.encoder if name == "train" else self._trainer.held_out_encoder

    def logps(self, batch: PackedBatch) -> Tensor:
        """The reference's log-probabilities of a batch's completions, [C]."""
        raise NotImplementedError("the loss was said to need no reference")

    def refuse_other(self, key: str) -> None:
        """Raise `UserError` where a checkpoint's reference or its pairs (key) are others now."""
        if key != self.keys["train"]:
            raise UserError(
                f"{self._trainer.args.output_dir}: its checkpoint was made from another "
                "model_name_or_path or from other pairs; go back to them, or choose another "
                "output_dir"
            )

    @property
    def _quiet(self) -> bool:
        return bool(self._trainer.args.disable_tqdm) or not self._trainer.is_world_process_zero()

    def _digests(self, rows: Sequence[Row], name: str) -> Digests:
        args = self._trainer.args
        mine = sample_digests(
            *(rows, self._encoder(name)),
            rank=args.process_index,
            world_size=args.world_size,
            quiet=self._quiet,
        )
        digests = self._summed(mine.view(np.uint8)).view("S32")
        facts = self.cache.key.encode() + digests.tobytes()
        self.keys[name] = hashlib.sha256(facts).hexdigest()
        return digests

    def _summed(self, share: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum over the ranks of arrays that are zero but for each one's share."""
        if self._trainer.args.world_size == 1:
            return share
        tensor = torch.from_numpy(share).to(self._trainer.args.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def _score(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        batch = batch.on(self._trainer.args.device)
        with torch.no_grad():
            return batch.sum_by_completion(self._trainer.score(model, batch).logprobs)


class LiveReference(Reference):
    """The reference asked at each step."""

    def __init__(self, trainer: MPOTrainer):
        refusals.refuse_sharded(trainer, "precompute_ref_log_probs: false")
        super().__init__(trainer)
        self._frozen = FrozenModel(self._model)

    def logps(self, batch: PackedBatch) -> Tensor:
        """The reference's log-probabilities, by a forward of its own."""
        if not batch.real:  # a filler: there is nothing to ask about
            return torch.zeros(0, device=batch.lengths.device)
        return self._score(self._frozen, batch)


class CachedReference(Reference):
    """The reference asked once, before the first step."""

    value_names = ("ref_logps",)

    def rows(self, rows: Sequence[Row], name: str) -> ScoredPairs:
        """The rows with the log-probabilities that the cache has, or that a pass adds to it."""
        samples, first, inverse = np.unique(
            self._digests(rows, name), return_index=True, return_inverse=True
        )
        zero = self._trainer.is_world_process_zero()
        # one process looks, since others may see files on a network later
        values = self._summed(self.cache.find(samples) if zero else np.zeros((len(samples), 2)))
        order = np.argsort(first)  # the samples as they come in the data
        chunks = self._missing(order, values)
        if chunks:
            self._tell(name, sum(map(len, chunks)), len(samples))
            self._pass(self._encoder(name), rows, samples, first, chunks, values)
        return ScoredPairs(rows, values[inverse])

    def _missing(self, order: npt.NDArray[np.intp], values: Values) -> list[npt.NDArray[np.intp]]:
        """What is to be computed, in chunks that do not depend on where a kill has fallen."""
        size = self._trainer.mpo_args.precompute_ref_batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        missing = [chunk[np.isnan(values[chunk, 0])] for chunk in chunks]
        return [chunk for chunk in missing if len(chunk)]

    def _tell(self, name: str, missing: int, samples: int) -> None:
        """Say why a pass is made where the cache holds something already."""
        reason = self.cache.differences()
        if not self._trainer.is_world_process_zero() or (missing == samples and reason is None):
            return
        print(
            f"reference: {missing} of {samples} {name} samples are not in {self.cache.folder} yet"
            + ("" if reason is None else f"; beside it is {reason}")
        )

    def _pass(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        samples: Digests,
        first: npt.NDArray[np.intp],
        chunks: Sequence[npt.NDArray[np.intp]],
        values: Values,
    ) -> None:
        """Compute what is missing into `values` [samples, 2]; the ranks share the chunks out."""
        args, device = self._trainer.args, next(self._model.parameters()).device
        mine = chunks[args.process_index :: args.world_size]
        self._model.eval()
        if device != args.device:  # where FSDP is to shard it, it still lies on the CPU
            self._model.to(args.device)
        scored = np.zeros_like(values)
        loader = self._loader(encoder, rows, [first[chunk].tolist() for chunk in mine])
        total = sum(map(len, mine)) * args.world_size
        bar = tqdm(total=total, desc="reference log-probs", unit="pair", disable=self._quiet)
        with bar:
            for chunk, step in zip(mine, loader, strict=True):
                for batch in step[STEP_BATCH].microbatches:
                    places = chunk[batch.example_index.numpy()]
                    scored[places] = self._score(self._model, batch).cpu().view(-1, 2).numpy()
                self._refuse_no_number(rows, first[chunk], scored[chunk])
                self.cache.add(samples[chunk], scored[chunk])
                bar.update(len(chunk) * args.world_size)
        if device != args.device:
            self._model.to(device)
        missing = np.concatenate(chunks)
        values[missing] = self._summed(scored[missing])

    def _loader(
        self, encoder: Encoder, rows: Sequence[Row], chunks: list[list[int]]
    ) -> DataLoader[Any]:
        args = self._trainer.mpo_args
        return DataLoader(
            rows,  # type: ignore[arg-type]  # a sequence is all that is asked for
            batch_sampler=chunks,
            collate_fn=StepCollator(
                encoder.pair,
                lambda examples: {"examples": float(len(examples))},
                args.max_tokens_per_microbatch,
                args.max_tiles_per_microbatch,
            ),
            num_workers=args.dataloader_num_workers,
            multiprocessing_context="fork" if args.dataloader_num_workers else None,
            generator=torch.Generator(),  # the workers' base seed must not move the global RNG
        )

    def _refuse_no_number(
        self, rows: Sequence[Row], places: npt.NDArray[np.intp], values: Values
    ) -> None:
        for place, value in zip(places, values, strict=True):
            if not np.isfinite(value).all():
                row = rows[int(place)]
                raise UserError(
                    f"{row.file}:{row.line}: the reference gives {value.tolist()} as the "
                    "log-probabilities of its completions"
                )

    def encode(self, pair: ScoredPair, encoder: Encoder) -> Example:
        """A pair with its reference log-probabilities."""
        example = super().encode(pair.row, encoder)
        example.completion_values["ref_logps"] = [pair.ref_chosen_logps, pair.ref_rejected_logps]
        return example

    def logps(self, batch: PackedBatch) -> Tensor:
        """The reference's log-probabilities, which the batch carries."""
        return batch.completion_values["ref_logps"]


def open_reference(trainer: MPOTrainer) -> Reference:
    """The reference as the options ask for it."""
    if not trainer.mpo_args.needs_reference:
        return Reference(trainer)
    kind = CachedReference if trainer.mpo_args.precompute_ref_log_probs else LiveReference
    return kind(trainer)
