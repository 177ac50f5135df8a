"""Run as a script: every comparison that needs two gloo processes, in one start.

    python tests/two_ranks.py MODEL FOLDER CASE...

The stages are imported once; two ranks are then forked, train each case and write
FOLDER/<case>-<rank>.pt. test_ranks.py compares that with one process of twice the batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from trainer_cases import (
    LARGE,
    SMALL,
    Recorded,
    conversations,
    make_trainer,
    pairs,
    questions,
    train,
)

from internvl.data import Row
from internvl.errors import UserError
from mpo.loss_set import LOSSES

WORLD = 2
IMAGES = 16  # rows that have images on disk
KINDS = ["mixed", "equal", "other", "unjudged", "other", "mixed"]


@dataclass(frozen=True)
class Case:
    """A run: rows, examples a rank takes in a step, and how many it must take in each step.

    shares: examples of each step of rank 0 and of rank 1 (for RL: groups, so always full).
    """

    stage: str
    rows: int
    batch: int
    shares: tuple[list[int], list[int]]
    options: dict[str, Any] = field(default_factory=dict)
    fsdp: str | None = None

    def make_rows(self, folder: Path) -> list[Row]:
        """The case's rows; their images lie in `folder`."""
        if self.stage == "rl":
            return questions(folder, KINDS[: self.rows])
        return {"mpo": pairs, "sft": conversations}[self.stage](folder, self.rows)

    def run_options(self, world: int) -> dict[str, Any]:
        """Options of one of `world` processes: the same examples a step over all of them."""
        batch = self.batch * WORLD // world
        options = {"max_tokens_per_microbatch": SMALL if world == WORLD else LARGE, **self.options}
        evaluation = {} if self.stage == "rl" else {"per_device_eval_batch_size": batch}
        if self.stage != "rl":
            evaluation["eval_rows"] = self.batch + 1  # one for the second rank
        return {"per_device_train_batch_size": batch, **options, **evaluation}


RL = {
    "num_generations": 4,
    "max_steps": 4,
    "temperature": 0.7,
    "max_completion_length": 64,
    "max_logprob_gap": 1e-4,
    "epsilon": 0.2,
    "epsilon_high": 0.3,
}
EVERY_LOSS = {"loss_type": list(LOSSES), "label_smoothing": 0.1, "beta": 0.3}
TOKEN = {
    "importance_sampling_level": "token",
    "loss_type": "dapo",
    "beta": 0.05,
    "entropy_coef": 0.01,
    "scale_rewards": "batch",
    "mask_truncated_completions": True,
    "dynamic_sample": True,
    "max_resample_times": 1,
    "freeze_vit": True,
}
AUGMENTED = {"loss_average": "sample", "vit_drop_path": 0.5, "jpeg_quality": [20, 40]}
# steps of up to two packs a rank; weights that do not move, so that each step stands alone
PACKED = {"packing": True, "max_tokens_per_microbatch": 250, "learning_rate": 0.0}
# few tiles a pack: the first rank has more packs than the second
FEW_TILES = {**PACKED, "max_tokens_per_microbatch": LARGE, "max_tiles_per_microbatch": 3}
UNEVEN = ([3, 3], [3, 1])
EMPTY = ([3, 2], [3, 0])
CASES = {
    "mpo-uneven-last": Case("mpo", 10, 3, UNEVEN),
    "mpo-empty-last": Case("mpo", 8, 3, EMPTY, {"gradient_checkpointing": True}),
    "mpo-live": Case("mpo", 8, 3, EMPTY, {"precompute_ref_log_probs": False}),
    "mpo-every-loss": Case("mpo", 10, 3, UNEVEN, EVERY_LOSS),
    "mpo-no-reference": Case("mpo", 8, 3, EMPTY, {"loss_type": ["orpo", "sft"]}),
    "sft-uneven-last": Case("sft", 10, 3, UNEVEN, {"loss_average": "token"}),
    "sft-empty-last": Case("sft", 8, 3, EMPTY, {"num_train_epochs": 2}),
    "sft-augmented": Case("sft", 10, 3, UNEVEN, AUGMENTED),
    "sft-frozen": Case("sft", 8, 3, EMPTY, {"freeze_vit": True, "freeze_projector": True}),
    "sft-packed": Case("sft", 15, 2, ([], []), PACKED),
    "sft-packed-uneven": Case("sft", 7, 2, ([], []), FEW_TILES),
    "sft-packed-alone": Case("sft", 1, 2, ([], []), PACKED),  # none for the second rank
    "rl": Case("rl", 6, 2, ([2] * 4, [2] * 4), {**RL, "steps_per_generation": 2}),
    "rl-token": Case("rl", 6, 2, ([2] * 4, [2] * 4), {**RL, **TOKEN, "steps_per_generation": 2}),
    "fsdp": Case("mpo", 8, 3, EMPTY, fsdp="layers"),
    "fsdp-no-sync": Case("mpo", 8, 3, EMPTY, fsdp="no_sync"),
    "fsdp-resharded": Case("sft", 8, 3, EMPTY, fsdp="reshard_after_forward"),
}


@contextlib.contextmanager
def _without_sync(model: Any) -> Iterator[None]:
    """What accelerate's no_sync does where it knows of FSDP2 (on a CPU it never does)."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def fsdp_steps(case: Case, model: Path, folder: Path, output: Path) -> Recorded:
    """An epoch of our training_step on a model wrapped by fully_shard, with plain SGD around it."""
    recorded = Recorded()
    rows, options = case.make_rows(folder), case.run_options(WORLD)
    trainer = make_trainer(case.stage, model, output, rows, recorded, **options)
    sharded = trainer.model
    always = case.fsdp == "reshard_after_forward"
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    layers = [
        *sharded.model.language_model.layers,
        *sharded.model.vision_tower.encoder.layer,
    ]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh, **({"reshard_after_forward": True} if always else {}))
    if case.fsdp == "no_sync":
        trainer.accelerator.no_sync = _without_sync
    optimizer = torch.optim.SGD(sharded.parameters(), lr=trainer.args.learning_rate)
    for inputs in trainer.get_train_dataloader():
        trainer.training_step(sharded, inputs)
        trainer.state.global_step += 1
        gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
        recorded.gradients.append(gradients)
        squares = [float(gradient.double().square().sum()) for gradient in gradients.values()]
        recorded.norms.append(math.sqrt(sum(squares)))
        optimizer.step()
        optimizer.zero_grad()
    return recorded


def refusal(model: Path, folder: Path) -> str:
    """What is said when FSDP is asked for, which accelerate passes over on a CPU."""
    rows = conversations(folder, 2)
    try:
        make_trainer("sft", model, folder / "refusal", rows, Recorded(), fsdp=True)
    except UserError as error:
        return str(error)
    return "nothing"


def rank_main(rank: int, port: int, model: Path, folder: Path, cases: list[str]) -> None:
    """The cases named, as one of the two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(WORLD)}
    for name in cases:
        case, output = CASES[name], folder / name
        if case.fsdp:
            recorded = fsdp_steps(case, model, folder, output)
        else:
            rows = case.make_rows(folder)
            recorded = train(case.stage, model, output, rows, **case.run_options(WORLD))
        recorded.trainer = None
        recorded.weights.clear()
        torch.save(vars(recorded), folder / f"{name}-{rank}.pt")
    (folder / f"refusal-{rank}.txt").write_text(refusal(model, folder))
    dist.destroy_process_group()


def main(model: Path, folder: Path, cases: list[str]) -> None:
    """Fork the two ranks and wait for them; raises when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        rank_main, (port, model, folder, cases), nprocs=WORLD, start_method="fork"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
