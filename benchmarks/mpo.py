"""An MPO step of ours against TRL's DPOTrainer, on the same pairs, in turns in one process.

    OMP_NUM_THREADS=1 python benchmarks/mpo.py               # a table
    OMP_NUM_THREADS=1 python benchmarks/mpo.py --json        # the last line is one JSON object
    OMP_NUM_THREADS=1 python benchmarks/mpo.py --write-docs  # table and plot into docs/
    python benchmarks/mpo.py --device cuda --shape 1b        # InternVL3.5-1B's sizes, bf16

A step is forward, losses, backward, clipping and fused AdamW; on a CPU it is measured in CPU
seconds, and collation apart. `ours` is `MPOTrainer.training_step` with cached reference
log-probabilities. `trl` is TRL's only legal mode for images, the reference model on the fly, with
the head on completion tokens alone, as on CUDA (on a CPU it would score all: `trl_cpu_head`). The
data and the model are those of benchmarks/data.py.

    speedup        trl / ours, sums over all steps      flop_model    the same of operations
    speedup_gc     both with gradient checkpointing     memory_ratio  growth of ours / of trl's,
                                                                      each in a process of its own
The FLOP model (benchmarks/_flops.py) counts for ours what a shared prefix needs, for TRL what its
padded rows compute. The other variants explain: `ours_ref` runs a reference model, `trl_injected`
is given reference values (TRL has no such mode for images), so what is left is packing.
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
from benchmarks._flops import forward_flops  # noqa: E402
from benchmarks._measure import Steps, run_benchmark  # noqa: E402
from benchmarks._sides import Ours, Sides, measure, open_shape, parse  # noqa: E402
from benchmarks._trl import TRLPairs  # noqa: E402
from internvl.checkpoint import load_model  # noqa: E402

PAIRS_A_STEP = 4
VARIANTS = ("ours", "ours_ref", "ours_gc", "trl", "trl_injected", "trl_cpu_head", "trl_gc")
WITH_REFERENCE = ("ours_ref", "trl", "trl_cpu_head", "trl_gc")  # its forward is in the step


class Pairs(Sides):
    """MPOTrainer and TRL's DPOTrainer."""

    _reference: Any = None

    def make(self, name: str) -> Any:
        """Either side."""
        if name == "ours":
            places = ("mpo", self.folder, self.rows)
            given = {"per_device_train_batch_size": PAIRS_A_STEP}
            ours = Ours(*places, self.device, self.dtype, **given)
            ours.trainer._announced = True  # the line about the first loss is not for a benchmark
            return ours
        places = (self.folder / "model", self.rows, self.folder / "trl")
        return TRLPairs(*places, self.device, getattr(torch, self.dtype))

    def prepare(self, variant: str) -> None:
        """Gradient checkpointing, and our reference model."""
        super().prepare(variant)
        if variant == "ours_ref" and self._reference is None:
            reference = load_model(self.folder / "model", dtype=self.dtype).to(self.device)
            self._reference = reference.requires_grad_(False).eval()

    def collate(self, variant: str, indices: Sequence[int]) -> Any:
        """A batch, for `trl_injected` with reference values."""
        inputs = super().collate(variant, indices)
        if variant == "trl_injected":
            inputs["ref_chosen_logps"] = inputs["ref_rejected_logps"] = torch.full(
                (len(indices),), -1000.0, device=self.device
            )
        return inputs

    def step(self, variant: str, inputs: Any) -> None:
        """One optimizer step, for `ours_ref` after a reference model's forward."""
        side = self.side(variant)
        if variant == "ours_ref":
            with torch.no_grad():
                for batch in inputs["step"].microbatches:
                    logps = side.trainer.score(self._reference, batch).logprobs
                    batch.sum_by_completion(logps.to(batch.lengths.device))
        if variant.startswith("trl"):
            side.inject_reference(variant == "trl_injected")
        super().step(variant, inputs)

    def flops(self, variant: str, indices: Sequence[int]) -> float:
        """Operations of one step, the reference model's with them."""
        total = super().flops(variant, indices)
        if variant in WITH_REFERENCE:
            total += forward_flops(self.shape, self.work(variant, indices))
        return total

    def pace(self, sums: dict[str, float], steps: Steps) -> dict[str, Any]:
        """Pairs of every variant and tokens of ours, a second."""
        pairs = sum(len(indices) for indices in steps)
        tokens = sum(self.work("ours", step).tokens for step in steps)
        return {
            "pairs_a_second": {name: round(pairs / spent, 3) for name, spent in sums.items()},
            "tokens_a_second": round(tokens / sums["ours"], 1),
        }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure; for `--memory-of` the number is printed and nothing returned."""
    shape = open_shape(args, folder)
    number = args.steps * PAIRS_A_STEP
    cpu = args.device == "cpu"
    sizes = data.pair_sizes()[:number] if cpu else data.gpu_pair_sizes(number)
    rows = data.make_rows(sizes, folder / "rows", shape.image_size)
    sides = Pairs(folder, shape, rows, args.device)
    return measure(args, __file__, sides, PAIRS_A_STEP, sides.pace)


def main() -> None:
    from benchmarks._report import write_mpo

    args = parse(__doc__, VARIANTS, "4 pairs", 8)
    run_benchmark(args, run, write_mpo)


if __name__ == "__main__":
    main()
