"""An SFT step of ours against TRL's SFTTrainer, on the same images, in turns in one process.

    OMP_NUM_THREADS=1 python benchmarks/sft.py               # a table
    OMP_NUM_THREADS=1 python benchmarks/sft.py --json        # the last line is one JSON object
    OMP_NUM_THREADS=1 python benchmarks/sft.py --write-docs  # the table into docs/performance.md
    python benchmarks/sft.py --device cuda --shape 1b        # InternVL3.5-1B's sizes, bf16

A step is forward, loss, backward, clipping and fused AdamW; on a CPU it is measured in CPU seconds,
and collation apart. `ours` packs a step's conversations into one row; `trl` pads them, its only
mode for images, with the head on completion tokens alone, as on CUDA (on a CPU it would score all:
`trl_cpu_head`). The data are the questions and chosen answers of benchmarks/data.py.

    speedup         trl / ours, sums over all steps      flop_model    the same of operations
    speedup_gc      both with gradient checkpointing     memory_ratio  growth of ours / of trl's,
                                                                       each in a process of its own
    tokens_a_second the conversations' own tokens, padding not counted, of both sides
    loss_gap        largest relative difference of the two losses (token averaging) over the steps,
                    before any of them was made; more than 1e-6 ends the run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# this file has the name of a package: its folder must not be searched first
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import data  # noqa: E402
from benchmarks._measure import Steps, run_benchmark  # noqa: E402
from benchmarks._sides import Ours, Sides, measure, open_shape, parse  # noqa: E402
from benchmarks._trl import TRLConversations, compact_head  # noqa: E402

ROWS_A_STEP = 8
LOSS_TOLERANCE = 1e-6
VARIANTS = ("ours", "ours_gc", "trl", "trl_cpu_head", "trl_gc")


class OurConversations(Ours):
    """SFTTrainer, with TRL's averaging."""

    def loss(self, batch: Any) -> float:
        """The loss of a step's batch."""
        step, trainer, total = batch["step"], self.trainer, 0.0
        for packed in step.microbatches:
            on_device = packed.on(trainer.args.device)
            with torch.no_grad():
                scores = trainer.score(self.model, on_device)
                total += float(trainer.loss(scores, on_device, step.counts)[0])
        return total


class Conversations(Sides):
    """SFTTrainer and TRL's."""

    def make(self, name: str) -> Any:
        """Either side."""
        if name == "ours":
            given = {"loss_average": "token", "per_device_train_batch_size": ROWS_A_STEP}
            places = ("sft", self.folder, self.rows)
            return OurConversations(*places, self.device, self.dtype, **given)
        places = (self.folder / "model", self.rows, self.folder / "trl")
        return TRLConversations(*places, self.device, getattr(torch, self.dtype))

    def losses(self, indices: Sequence[int]) -> dict[str, float]:
        """Both losses of one batch, with the weights as they are."""
        found = {}
        for name in ("ours", "trl"):
            side = self.side(name)
            side.model.train()
            with compact_head(name == "trl"):
                found[name] = side.loss(side.collate(indices))
        return found

    def gap(self) -> dict[str, Any]:
        """How far the losses are apart before the first step; SystemExit where they are."""
        starts = range(0, len(self.rows), ROWS_A_STEP)
        found = [self.losses(range(start, start + ROWS_A_STEP)) for start in starts]
        gap = max(abs(pair["ours"] - pair["trl"]) / pair["trl"] for pair in found)
        if gap > LOSS_TOLERANCE and self.device == "cpu":
            raise SystemExit(f"the losses differ by {gap:.1e}: {found}")
        return {"loss_gap": gap, "first_losses": found[0]}

    def tokens(self, sums: dict[str, float], steps: Steps) -> dict[str, Any]:
        """Tokens of the conversations, and with TRL's padding."""
        own, padded = (
            sum(self.work(name, step).tokens for step in steps) for name in ("ours", "trl")
        )
        return {
            "tokens_a_second": {name: round(own / spent, 1) for name, spent in sums.items()},
            "tokens": round(own),
            "tokens_with_padding": round(padded),
        }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure; for `--memory-of` the number is printed and nothing returned."""
    shape = open_shape(args, folder)
    number = args.steps * ROWS_A_STEP
    sizes = data.pair_sizes(number) if args.device == "cpu" else data.gpu_pair_sizes(number)
    rows = data.as_conversations(data.make_rows(sizes, folder / "rows", shape.image_size))
    sides = Conversations(folder, shape, rows, args.device)
    gap = {} if args.memory_of else sides.gap()
    result = measure(args, __file__, sides, ROWS_A_STEP, sides.tokens)
    return None if result is None else {**result, **gap}


def main() -> None:
    from benchmarks._report import write_sft

    args = parse(__doc__, VARIANTS, "8 conversations", 4)
    run_benchmark(args, run, write_sft)


if __name__ == "__main__":
    main()
