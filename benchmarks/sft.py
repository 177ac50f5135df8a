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
from benchmarks._flops import Work, model_flops, packed_work, step_flops  # noqa: E402
from benchmarks._measure import (  # noqa: E402
    compared,
    facts,
    grown_alone,
    memory_of,
    optimizer_step,
    run_benchmark,
    take_turns,
)
from benchmarks._trl import TRLConversations, compact_head  # noqa: E402
from internvl.checkpoint import load_model  # noqa: E402
from internvl.data import Row  # noqa: E402

ROWS_A_STEP = 8
LOSS_TOLERANCE = 1e-6
VARIANTS = ("ours", "ours_gc", "trl", "trl_cpu_head", "trl_gc")
ON_GPU = ("ours", "ours_gc", "trl", "trl_gc")  # its head is the compact one anyway


class Ours:
    """SFTTrainer, with TRL's averaging."""

    def __init__(self, folder: Path, rows: Sequence[Row], device: str, dtype: str):
        from internvl.chat import load_processor
        from sft.config import SFTConfig
        from sft.trainer import SFTTrainer

        args = SFTConfig(
            output_dir=str(folder / "ours"),
            train_file="rows.jsonl",
            loss_average="token",
            per_device_train_batch_size=ROWS_A_STEP,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
            optim="adamw_torch_fused",
            learning_rate=1e-5,
            disable_tqdm=True,
            save_strategy="no",
        )
        self.model: Any = load_model(folder / "model", dtype=dtype).to(device)
        self.trainer: Any = SFTTrainer(
            self.model, args, rows, processing_class=load_processor(str(folder / "model"))
        )

    def collate(self, indices: Sequence[int]) -> Any:
        """The step's packed batch, as the data loader makes it."""
        return self.trainer.collator([self.trainer.train_dataset[index] for index in indices])

    def loss(self, batch: Any) -> float:
        """The loss of a step's batch."""
        step, trainer, total = batch["step"], self.trainer, 0.0
        for packed in step.microbatches:
            on_device = packed.on(trainer.args.device)
            with torch.no_grad():
                scores = trainer.score(self.model, on_device)
                total += float(trainer.loss(scores, on_device, step.counts)[0])
        return total

    def work(self, indices: Sequence[int]) -> Work:
        """What a forward on these conversations needs."""
        examples = [self.trainer.encode(self.trainer.train_dataset[index]) for index in indices]
        lengths = [[len(ids) for ids in example.completions] for example in examples]
        tiles = sum(example.num_tiles for example in examples)
        return packed_work([len(example.prompt_ids) for example in examples], lengths, tiles)


class Sides:
    """Both trainers, and a step of each variant."""

    def __init__(self, folder: Path, shape: data.Shape, rows: Sequence[Row], device: str):
        self.folder, self.shape, self.rows, self.device = folder, shape, rows, device
        self.dtype = "float32" if device == "cpu" else "bfloat16"
        self._made: dict[str, Any] = {}
        self._optimizers: dict[str, Any] = {}

    def side(self, variant: str) -> Any:
        """The side that a variant belongs to, made when first asked for."""
        name = variant.partition("_")[0]
        if name not in self._made:
            if name == "ours":
                side: Any = Ours(self.folder, self.rows, self.device, self.dtype)
            else:
                dtype = getattr(torch, self.dtype)
                places = (self.folder / "model", self.rows, self.folder / "trl")
                side = TRLConversations(*places, self.device, dtype)
            self._made[name] = side
            self._optimizers[name] = side.trainer.create_optimizer()
        return self._made[name]

    def prepare(self, variant: str) -> None:
        """Gradient checkpointing, on or off."""
        switch = "enable" if variant.endswith("_gc") else "disable"
        getattr(self.side(variant).model, f"gradient_checkpointing_{switch}")()

    def collate(self, variant: str, indices: Sequence[int]) -> Any:
        """A batch for a variant; TRL's trainer changes it, so each step has its own."""
        return self.side(variant).collate(indices)

    def step(self, variant: str, inputs: Any) -> None:
        """One optimizer step."""
        side, optimizer = self.side(variant), self._optimizers[variant.partition("_")[0]]
        with compact_head(variant.startswith("trl") and variant != "trl_cpu_head"):
            optimizer_step(side.trainer, side.model, optimizer, inputs)

    def losses(self, indices: Sequence[int]) -> dict[str, float]:
        """Both losses of one batch, with the weights as they are."""
        found = {}
        for name in ("ours", "trl"):
            side = self.side(name)
            side.model.train()
            with compact_head(name == "trl"):
                found[name] = side.loss(side.collate(indices))
        return found

    def flops(self, variant: str, indices: Sequence[int]) -> float:
        """Operations of one step."""
        side = self.side(variant)
        if variant.startswith("ours"):
            work = side.work(indices)
        else:
            work = side.work(side.collate(indices), compact=variant != "trl_cpu_head")
        return step_flops(self.shape, work, checkpointing=variant.endswith("_gc"))


def loss_gap(sides: Sides, steps: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How far the two losses are apart before the first step; raises SystemExit where they are."""
    found = [sides.losses(indices) for indices in steps]
    gap = max(abs(pair["ours"] - pair["trl"]) / pair["trl"] for pair in found)
    if gap > LOSS_TOLERANCE and sides.device == "cpu":
        raise SystemExit(f"the losses differ by {gap:.1e}: {found}")
    return {"loss_gap": gap, "first_losses": found[0]}


def report(
    sides: Sides, taken: dict[str, Any], memory: dict[str, float], steps: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The numbers of the module's docstring, and what they are made of."""
    sums = {name: sum(each) for name, each in taken["steps"].items()}
    work = [sides.side("ours").work(indices) for indices in steps]
    tokens = sum(w.tokens for w in work)
    padded = sum(side.tokens for side in _padded(sides, steps))
    out: dict[str, Any] = {
        **compared(sides, taken, memory, steps),
        "tokens_a_second": {n: round(tokens / s, 1) for n, s in sums.items()},
        "tokens": round(tokens),
        "tokens_with_padding": round(padded),
        "facts": facts(sides.device),
    }
    if sides.device == "cuda":
        used = {n: sum(model_flops(sides.shape, w) for w in work) / s for n, s in sums.items()}
        out["tflops_of_the_model"] = {n: round(rate / 1e12, 1) for n, rate in used.items()}
    return out


def _padded(sides: Sides, steps: Sequence[Sequence[int]]) -> list[Work]:
    trl = sides.side("trl")
    return [trl.work(trl.collate(indices)) for indices in steps]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", choices=("small", "quick", *data.GPU_SHAPES), default="small")
    add("--steps", type=int, help="steps of 8 conversations (default: 4, all 32)")
    add("--variants", nargs="+", choices=VARIANTS, help="for a look; --json needs the default")
    add("--quick", action="store_true", help="a very small model and one step: does it run?")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--write-docs", action="store_true", help="write the table into docs/")
    add("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.shape, args.steps = "quick", args.steps or 1
    if args.device == "cuda" and args.shape == "small":
        args.shape = "1b"
    args.steps = args.steps or 4
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure; for `--memory-of` the number is printed and nothing returned."""
    shapes = {"small": data.SMALL, "quick": data.QUICK, **data.GPU_SHAPES}
    shape = shapes[args.shape]
    number = args.steps * ROWS_A_STEP
    sizes = data.pair_sizes(number) if args.device == "cpu" else data.gpu_pair_sizes(number)
    rows = data.as_conversations(data.make_rows(sizes, folder / "rows", shape.image_size))
    if not (folder / "model").exists():
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        data.make_model(shape, folder / "model", dtype)
    sides = Sides(folder, shape, rows, args.device)
    steps = [range(start, start + ROWS_A_STEP) for start in range(0, number, ROWS_A_STEP)]
    if args.memory_of:
        print(memory_of(sides, args.memory_of, steps))
        return None
    gap = loss_gap(sides, steps)
    variants = args.variants or (VARIANTS if args.device == "cpu" else ON_GPU)
    taken = take_turns(sides, variants, steps)
    if args.variants:
        medians = {n: round(statistics.median(s), 3) for n, s in taken["steps"].items()}
        return {"seconds_a_step": medians, **gap}
    given = ["--device", args.device, "--shape", args.shape, "--steps", str(args.steps)]
    given += ["--folder", str(folder), "--memory-of"]
    memory = {name: grown_alone(__file__, [*given, name]) for name in variants}
    return {**report(sides, taken, memory, steps), **gap}


def main() -> None:
    from benchmarks._report import write_sft

    run_benchmark(parse(), run, write_sft)


if __name__ == "__main__":
    main()
