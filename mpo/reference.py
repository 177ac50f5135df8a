"""The reference's log-probabilities: one pass over the pairs, then a file.

The reference is the model that the stage starts from (the previous stage's), and never changes,
so its log-probabilities are computed once, before the first step, and read from then on: no second
model in memory, no second forward a step. The file names what it was computed from (weights,
pairs, image bytes, tiling) and is computed anew when any of it differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from internvl.checkpoint import checksum
from internvl.data import Row
from internvl.data.checks import Ranks
from internvl.errors import UserError
from internvl.packing import Example, PackedBatch
from training.batches import STEP_BATCH, StepCollator
from training.stage import gather_by_number

if TYPE_CHECKING:
    from mpo.trainer import MPOTrainer

Score = Callable[[PackedBatch], Tensor]
_ROWS_A_HASH = 256
_ALONE = Ranks()


def reference_key(
    weights: str,
    rows: Sequence[Row],
    settings: dict[str, object],
    ranks: Ranks = _ALONE,
) -> str:
    """SHA-256 of everything that the log-probabilities depend on; the same on every rank.

    weights: checksum of the reference's weights. settings: tiling, dtype and the like. ranks: who
    reads which images; how many they are makes no difference.
    """
    starts = range(0, len(rows), _ROWS_A_HASH)
    mine = {start: _hash_rows(rows, start) for start in starts[ranks.rank :: ranks.number]}
    every = ranks.gather(mine)
    facts = [weights, settings, [every[start] for start in starts]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_rows(rows: Sequence[Row], start: int) -> str:
    digest = hashlib.sha256()
    for index in range(start, min(start + _ROWS_A_HASH, len(rows))):
        row = rows[index]
        names = ("history", "question", "system", "chosen", "rejected")
        fields = [row.data.get(name) for name in names]
        digest.update(json.dumps(fields, ensure_ascii=False).encode())
        digest.update(json.dumps([row.tile_budget(None), row.num_frames]).encode())
        for encoded in row.encoded_media():
            digest.update(hashlib.sha256(encoded).digest())
    return digest.hexdigest()


def load_reference(path: Path, key: str) -> Tensor | None:
    """The cached [rows, 2] log-probabilities, or None where there are none of this key."""
    if not path.is_file():
        return None
    with safe_open(str(path), "pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return file.get_tensor("ref_logps")


def compute_reference(
    rows: Sequence[Row],
    collator: StepCollator,
    score: Score,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    quiet: bool,
    workers: int = 0,
) -> Tensor:
    """One pass over all pairs: [rows, 2], the sums for chosen and rejected, float32 on the CPU.

    score: a micro-batch (on the CPU) to its [C] sums under the reference. The ranks share the
    rows out and every one receives all of the result. workers: processes that encode the rows.
    """
    out = torch.zeros(len(rows), 2)
    starts = range(rank * batch_size, len(rows), batch_size * world_size)
    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # a sequence is all that is asked for
        batch_sampler=[[*range(start, min(start + batch_size, len(rows)))] for start in starts],
        collate_fn=collator,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the workers' base seed must not move the global RNG
    )
    bar = tqdm(loader, desc="reference log-probs", unit="batch", disable=quiet)
    for start, step in zip(starts, bar, strict=True):
        for batch in step[STEP_BATCH].microbatches:
            out[start + batch.example_index] = score(batch).cpu().view(-1, 2)
    if world_size > 1:
        shared = out.to(device)
        dist.all_reduce(shared)
        out = shared.cpu()
    return out


def save_reference(path: Path, key: str, values: Tensor) -> None:
    """Write the log-probabilities with their key, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({"ref_logps": values}, partial, metadata={"key": key})
    partial.replace(path)


@dataclass(frozen=True)
class ScoredPair:
    """A pair's row with the reference's log-probabilities of its two completions."""

    row: Row
    ref_chosen_logps: float
    ref_rejected_logps: float


class ScoredPairs(Sequence[ScoredPair]):
    """Pairs with the reference's [rows, 2] log-probabilities; each row is read when asked for."""

    def __init__(self, rows: Sequence[Row], values: Tensor):
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


class Reference:
    """The reference of a run: the model as the trainer was given it, asked for once a pair.

    trainer: before its first step, and before a checkpoint is loaded. keys: what the "train" and
    the "eval" pairs' log-probabilities were computed from.
    """

    def __init__(self, trainer: MPOTrainer):
        self.keys: dict[str, str] = {}
        self._trainer = trainer

    @torch.no_grad()
    def rows(self, rows: Sequence[Row], name: str) -> ScoredPairs:
        """The rows with the reference's log-probabilities, from the cache or by one pass."""
        trainer, args = self._trainer, self._trainer.mpo_args
        encoder = trainer.encoder
        model = trainer.accelerator.unwrap_model(trainer.model)
        settings: dict[str, object] = {
            "max_tiles": encoder.max_tiles,
            "dtype": str(next(model.parameters()).dtype),
            "mixed_precision": trainer.accelerator.mixed_precision,
            "template": str(encoder.processor.chat_template),
        }
        if encoder.position_steps != (1.0,):
            settings["position_steps"] = [*encoder.position_steps, encoder.seed]
        ranks = Ranks(args.process_index, args.world_size, gather_by_number)
        key = reference_key(checksum(model.state_dict().items()), rows, settings, ranks)
        self.keys[name] = key
        # in a folder of its own: loaders take every safetensors file beside a config for weights
        path = Path(args.output_dir or "") / "reference" / f"{name}.safetensors"
        values = load_reference(path, key)
        if values is None:
            model.eval()
            values = compute_reference(
                rows,
                StepCollator(
                    encoder.pair,
                    lambda examples: {"examples": float(len(examples))},
                    args.max_tokens_per_microbatch,
                    args.max_tiles_per_microbatch,
                ),
                lambda batch: self._completion_logps(model, batch),
                batch_size=args.reference_batch_size,
                rank=args.process_index,
                world_size=args.world_size,
                device=args.device,
                quiet=bool(args.disable_tqdm) or not trainer.is_world_process_zero(),
                workers=args.dataloader_num_workers,
            )
            if trainer.is_world_process_zero():
                save_reference(path, key, values)
        return ScoredPairs(rows, values)

    def _completion_logps(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        batch = batch.on(self._trainer.args.device)
        return batch.sum_by_completion(self._trainer.score(model, batch).logprobs)

    def encode(self, pair: ScoredPair) -> Example:
        """A pair as one prompt with two completions and their reference log-probabilities."""
        example = self._trainer.encoder.pair(pair.row)
        example.completion_values["ref_logps"] = [pair.ref_chosen_logps, pair.ref_rejected_logps]
        return example

    def logps(self, batch: PackedBatch) -> Tensor:
        """The reference's log-probabilities of a batch's completions, [C]."""
        return batch.completion_values["ref_logps"]

    def refuse_other(self, key: str) -> None:
        """Raise `UserError` where a checkpoint's reference or its pairs (key) are others now."""
        if key != self.keys["train"]:
            raise UserError(
                f"{self._trainer.args.output_dir}: its checkpoint was made from another "
                "model_name_or_path or from other pairs; go back to them, or choose another "
                "output_dir"
            )
