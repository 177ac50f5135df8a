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
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from internvl.data import Row
from internvl.data.checks import Ranks
from internvl.packing import PackedBatch
from training.batches import STEP_BATCH, StepCollator

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
        fields = [row.data.get(name) for name in ("question", "system", "chosen", "rejected")]
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
