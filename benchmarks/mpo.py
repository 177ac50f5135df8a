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
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# this file has the name of a package: its folder must not be searched first
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import data  # noqa: E402
from benchmarks._flops import (  # noqa: E402
    Work,
    forward_flops,
    model_flops,
    packed_work,
    step_flops,
)
from benchmarks._measure import (  # noqa: E402
    compared,
    facts,
    grown_alone,
    memory_of,
    optimizer_step,
    run_benchmark,
    take_turns,
)
from benchmarks._trl import TRLPairs, compact_head  # noqa: E402
from internvl.checkpoint import load_model  # noqa: E402
from internvl.data import Row  # noqa: E402

PAIRS_A_STEP = 4
VARIANTS = ("ours", "ours_ref", "ours_gc", "trl", "trl_injected", "trl_cpu_head", "trl_gc")
ON_GPU = ("ours", "ours_gc", "trl", "trl_gc")  # its head is the compact one anyway


class Ours:
    """MPOTrainer and its optimizer."""

    def __init__(self, folder: Path, rows: Sequence[Row], device: str, dtype: str):
        from internvl.chat import load_processor
        from mpo.config import MPOConfig
        from mpo.trainer import MPOTrainer

        args = MPOConfig(
            output_dir=str(folder / "ours"),
            train_file="rows.jsonl",
            per_device_train_batch_size=PAIRS_A_STEP,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
            optim="adamw_torch_fused",
            learning_rate=1e-5,
            disable_tqdm=True,
            save_strategy="no",
        )
        self.model: Any = load_model(folder / "model", dtype=dtype).to(device)
        self.trainer: Any = MPOTrainer(
            self.model,
            args,
            rows,
            processing_class=load_processor(str(folder / "model")),
        )
        self.trainer._announced = True  # the line about the first loss is not for a benchmark

    def collate(self, indices: Sequence[int]) -> Any:
        """The step's packed batch, as the data loader makes it."""
        return self.trainer.collator([self.trainer.train_dataset[index] for index in indices])

    def work(self, indices: Sequence[int]) -> Work:
        """What a forward on these pairs needs."""
        pairs = [self.trainer.encode(self.trainer.train_dataset[index]) for index in indices]
        lengths = [[len(ids) for ids in pair.completions] for pair in pairs]
        tiles = sum(pair.num_tiles for pair in pairs)
        return packed_work([len(pair.prompt_ids) for pair in pairs], lengths, tiles)


class Sides:
    """Both trainers, and a step of each variant."""

    def __init__(self, folder: Path, shape: data.Shape, rows: Sequence[Row], device: str):
        self.folder, self.shape, self.rows, self.device = folder, shape, rows, device
        self.dtype = "float32" if device == "cpu" else "bfloat16"
        self._made: dict[str, Any] = {}
        self._optimizers: dict[str, Any] = {}
        self._reference: Any = None

    def side(self, variant: str) -> Any:
        """The side that a variant belongs to, made when first asked for."""
        name = variant.partition("_")[0]
        if name not in self._made:
            if name == "ours":
                side: Any = Ours(self.folder, self.rows, self.device, self.dtype)
            else:
                dtype = getattr(torch, self.dtype)
                places = (self.folder / "model", self.rows, self.folder / "trl")
                side = TRLPairs(*places, self.device, dtype)
            self._made[name] = side
            self._optimizers[name] = side.trainer.create_optimizer()
        return self._made[name]

    def prepare(self, variant: str) -> None:
        """Whatever a variant holds before its first step."""
        side = self.side(variant)
        if variant == "ours_ref" and self._reference is None:
            reference = load_model(self.folder / "model", dtype=self.dtype).to(self.device)
            self._reference = reference.requires_grad_(False).eval()
        switch = "enable" if variant.endswith("_gc") else "disable"
        getattr(side.model, f"gradient_checkpointing_{switch}")()

    def collate(self, variant: str, indices: Sequence[int]) -> Any:
        """A batch for a variant; TRL's trainer changes it, so each step has its own."""
        inputs = self.side(variant).collate(indices)
        if variant == "trl_injected":
            inputs["ref_chosen_logps"] = inputs["ref_rejected_logps"] = torch.full(
                (len(indices),), -1000.0, device=self.device
            )
        return inputs

    def step(self, variant: str, inputs: Any) -> None:
        """One optimizer step."""
        side = self.side(variant)
        trainer, optimizer = side.trainer, self._optimizers[variant.partition("_")[0]]
        if variant == "ours_ref":
            with torch.no_grad():
                for batch in inputs["step"].microbatches:
                    logps = trainer.score(self._reference, batch).logprobs
                    batch.sum_by_completion(logps.to(batch.lengths.device))
        if variant.startswith("trl"):
            side.inject_reference(variant == "trl_injected")
        with compact_head(variant.startswith("trl") and variant != "trl_cpu_head"):
            optimizer_step(trainer, side.model, optimizer, inputs)

    def flops(self, variant: str, indices: Sequence[int]) -> float:
        """Operations of one step."""
        gc = variant.endswith("_gc")
        if variant.startswith("ours"):
            work = self.side("ours").work(indices)
            total = step_flops(self.shape, work, checkpointing=gc)
            return total + (forward_flops(self.shape, work) if variant == "ours_ref" else 0.0)
        side = self.side(variant)
        work = side.work(side.collate(indices), compact=variant != "trl_cpu_head")
        total = step_flops(self.shape, work, checkpointing=gc)
        return total + (0.0 if variant == "trl_injected" else forward_flops(self.shape, work))


def report(
    sides: Sides, taken: dict[str, Any], memory: dict[str, float], steps: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The numbers of the module's docstring, and what they are made of."""
    sums = {name: sum(each) for name, each in taken["steps"].items()}
    pairs = sum(len(indices) for indices in steps)
    work = [sides.side("ours").work(indices) for indices in steps]
    out: dict[str, Any] = {
        **compared(sides, taken, memory, steps),
        "pairs_a_second": {n: round(pairs / s, 3) for n, s in sums.items()},
        "tokens_a_second": round(sum(w.tokens for w in work) / sums["ours"], 1),
        "facts": facts(sides.device),
    }
    if sides.device == "cuda":
        used = {n: sum(model_flops(sides.shape, w) for w in work) / s for n, s in sums.items()}
        out["tflops_of_the_model"] = {n: round(rate / 1e12, 1) for n, rate in used.items()}
    return out


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", choices=("small", "quick", *data.GPU_SHAPES), default="small")
    add("--steps", type=int, help="steps of 4 pairs (default: 8, all 32 pairs)")
    add("--variants", nargs="+", choices=VARIANTS, help="for a look; --json needs the default")
    add("--quick", action="store_true", help="a very small model and one step: does it run?")
    add("--peak-tflops", type=float, help="of the GPU, for MFU (989 for an H100 in bf16)")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--write-docs", action="store_true", help="write the table and the plot into docs/")
    add("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.shape, args.steps = "quick", args.steps or 1
    if args.device == "cuda" and args.shape == "small":
        args.shape = "1b"
    args.steps = args.steps or (8 if args.device == "cpu" else 4)
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure; for `--memory-of` the number is printed and nothing returned."""
    shapes = {"small": data.SMALL, "quick": data.QUICK, **data.GPU_SHAPES}
    shape = shapes[args.shape]
    pairs = args.steps * PAIRS_A_STEP
    sizes = data.pair_sizes()[:pairs]
    if args.device == "cuda":
        sizes = data.gpu_pair_sizes(pairs)
    rows = data.make_rows(sizes, folder / "rows", shape.image_size)
    if not (folder / "model").exists():
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        data.make_model(shape, folder / "model", dtype)
    sides = Sides(folder, shape, rows, args.device)
    steps = [
        range(start, min(start + PAIRS_A_STEP, len(rows)))
        for start in range(0, len(rows), PAIRS_A_STEP)
    ]
    if args.memory_of:
        print(memory_of(sides, args.memory_of, steps))
        return None
    variants = args.variants or (VARIANTS if args.device == "cpu" else ON_GPU)
    taken = take_turns(sides, variants, steps)
    if args.variants:
        return {
            "seconds_a_step": {n: round(statistics.median(s), 3) for n, s in taken["steps"].items()}
        }
    given = ["--device", args.device, "--shape", args.shape, "--steps", str(args.steps)]
    given += ["--folder", str(folder), "--memory-of"]
    memory = {name: grown_alone(__file__, [*given, name]) for name in variants}
    result = report(sides, taken, memory, steps)
    if args.peak_tflops and args.device == "cuda":
        rates = result["tflops_of_the_model"]
        result["mfu"] = {n: round(rate / args.peak_tflops, 3) for n, rate in rates.items()}
    return result


def main() -> None:
    from benchmarks._report import write_mpo

    run_benchmark(parse(), run, write_mpo)


if __name__ == "__main__":
    main()
