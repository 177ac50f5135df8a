"""Both trainers of a benchmark against TRL, their variants, and the command line: SFT and MPO.

A variant is a side with its settings: `ours`, `trl`, either with `_gc` (gradient checkpointing),
`trl_cpu_head` (TRL's head on all positions), and what a benchmark adds of its own.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from benchmarks._flops import Work, model_flops, packed_work, step_flops
from benchmarks._measure import (
    Steps,
    compared,
    facts,
    grown_alone,
    memory_of,
    optimizer_step,
    take_turns,
)
from benchmarks._trl import compact_head, quiet_options
from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row

ON_GPU = ("ours", "ours_gc", "trl", "trl_gc")  # its head is the compact one anyway


class Ours:
    """The trainer of a stage ("sft", "mpo") on the rows; options: of its configuration."""

    def __init__(
        self, stage: str, folder: Path, rows: Sequence[Row], device: str, dtype: str, **options: Any
    ):
        config = vars(importlib.import_module(f"{stage}.config"))[f"{stage.upper()}Config"]
        trainer = vars(importlib.import_module(f"{stage}.trainer"))[f"{stage.upper()}Trainer"]
        args = config(train_file="rows.jsonl", **quiet_options(folder / "ours", device), **options)
        self.model: Any = load_model(folder / "model", dtype=dtype).to(device)
        processor = load_processor(str(folder / "model"))
        self.trainer: Any = trainer(self.model, args, rows, processing_class=processor)

    def collate(self, indices: Sequence[int]) -> Any:
        """The step's packed batch, as the data loader makes it."""
        return self.trainer.collator([self.trainer.train_dataset[index] for index in indices])

    def work(self, indices: Sequence[int]) -> Work:
        """What a forward on these rows needs."""
        examples = [self.trainer.encode(self.trainer.train_dataset[index]) for index in indices]
        lengths = [[len(ids) for ids in example.completions] for example in examples]
        tiles = sum(example.num_tiles for example in examples)
        return packed_work([len(example.prompt_ids) for example in examples], lengths, tiles)


class Sides(ABC):
    """Both trainers, and a step of each variant."""

    def __init__(self, folder: Path, shape: data.Shape, rows: Sequence[Row], device: str):
        self.folder, self.shape, self.rows, self.device = folder, shape, rows, device
        self.dtype = "float32" if device == "cpu" else "bfloat16"
        self._made: dict[str, Any] = {}
        self._optimizers: dict[str, Any] = {}

    @abstractmethod
    def make(self, name: str) -> Any:
        """The side of this name, "ours" or "trl": model, trainer, collate, work."""

    def side(self, variant: str) -> Any:
        """The side that a variant belongs to, made when first asked for."""
        name = variant.partition("_")[0]
        if name not in self._made:
            self._made[name] = self.make(name)
            self._optimizers[name] = self._made[name].trainer.create_optimizer()
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

    def work(self, variant: str, indices: Sequence[int]) -> Work:
        """What a forward of one step computes."""
        side = self.side(variant)
        work: Work = (
            side.work(indices)
            if variant.startswith("ours")
            else side.work(side.collate(indices), compact=variant != "trl_cpu_head")
        )
        return work

    def flops(self, variant: str, indices: Sequence[int]) -> float:
        """Operations of one step."""
        work = self.work(variant, indices)
        return step_flops(self.shape, work, checkpointing=variant.endswith("_gc"))


def parse(doc: str | None, variants: Sequence[str], what: str, steps: int) -> argparse.Namespace:
    """The command line; what: a step is of. steps: of them on a CPU where nothing is said."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", choices=("small", "quick", *data.GPU_SHAPES), default="small")
    add("--steps", type=int, help=f"steps of {what} (default: {steps}, all 32)")
    add("--variants", nargs="+", choices=variants, help="for a look; --json needs the default")
    add("--quick", action="store_true", help="a very small model and one step: does it run?")
    add("--peak-tflops", type=float, help="of the GPU, for MFU (989 for an H100 in bf16)")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--write-docs", action="store_true", help="write the table into docs/")
    add("--memory-of", choices=variants, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.shape, args.steps = "quick", args.steps or 1
    if args.device == "cuda" and args.shape == "small":
        args.shape = "1b"
    args.steps = args.steps or (steps if args.device == "cpu" else 4)
    args.variants_of = tuple(variants) if args.device == "cpu" else ON_GPU
    return args


def open_shape(args: argparse.Namespace, folder: Path) -> data.Shape:
    """The shape that is asked for; its model is made in the folder where there is none."""
    shape = {"small": data.SMALL, "quick": data.QUICK, **data.GPU_SHAPES}[args.shape]
    if not (folder / "model").exists():
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        data.make_model(shape, folder / "model", dtype)
    return shape


def measure(
    args: argparse.Namespace,
    script: str,
    sides: Sides,
    rows_a_step: int,
    more: Callable[[dict[str, Any], Steps], dict[str, Any]],
) -> dict[str, Any] | None:
    """Every variant at every step, in turns, and each one's memory in a process of its own.

    script: the benchmark's file. more: what it adds, of {variant: seconds of all steps}. None where
    `--memory-of` was asked for and printed.
    """
    number = len(sides.rows)
    steps = [
        range(start, min(start + rows_a_step, number)) for start in range(0, number, rows_a_step)
    ]
    if args.memory_of:
        print(memory_of(sides, args.memory_of, steps))
        return None
    variants = args.variants or args.variants_of
    taken = take_turns(sides, variants, steps)
    if args.variants:
        medians = {n: round(statistics.median(s), 3) for n, s in taken["steps"].items()}
        return {"seconds_a_step": medians}
    given = ["--device", args.device, "--shape", args.shape, "--steps", str(args.steps)]
    given += ["--folder", str(sides.folder), "--memory-of"]
    memory = {name: grown_alone(script, [*given, name]) for name in variants}
    sums = {name: sum(each) for name, each in taken["steps"].items()}
    out = {**compared(sides, taken, memory, steps), **more(sums, steps)}
    if args.device == "cuda":
        needed = sum(model_flops(sides.shape, sides.work("ours", step)) for step in steps)
        rates = {name: needed / spent / 1e12 for name, spent in sums.items()}
        out["tflops_of_the_model"] = {name: round(rate, 1) for name, rate in rates.items()}
        if args.peak_tflops:
            out["mfu"] = {n: round(rate / args.peak_tflops, 3) for n, rate in rates.items()}
    return {**out, "facts": facts(sides.device)}
