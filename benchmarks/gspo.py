"""A GSPO update of ours against TRL's GRPOTrainer, on the same rollouts, in turns in one process.

    OMP_NUM_THREADS=1 python benchmarks/gspo.py               # a table
    OMP_NUM_THREADS=1 python benchmarks/gspo.py --json        # the last line is one JSON object
    OMP_NUM_THREADS=1 python benchmarks/gspo.py --write-docs  # table and plot into docs/

An update is one group: forward, GSPO's loss, backward, clipping and fused AdamW, measured in CPU
seconds; sampling and collation are not in it. Ours is `RLTrainer.training_step` on groups that its
own rollout code made of fixed completions; TRL's is `GRPOTrainer.training_step` with loss_type
grpo at the level of sequences, its head on completion tokens alone as on CUDA. Nothing is frozen
on either side; with the vision tower frozen (our default) ours does not run it in an update at all.

    speedup_g8_short, _g8_long, _g16_short      TRL / ours, sums over the questions of the case
    flop_model_...                              the same of operations (benchmarks/_flops.py)
    memory_ratio                                growth of ours / of TRL's at G = 8, short, each in
                                                a process of its own; memory_ratio_... the others
The cases are those of benchmarks/data.py: G = 8 with 50 to 200 tokens, G = 8 with 300 to 500, and
G = 16 with 50 to 200. TRL computes the image G times, the prompt G times, and completions padded to
the longest of the group.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

# a file beside this one has the name of a package: this folder must not be searched first
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import data  # noqa: E402
from benchmarks._flops import Work, packed_work, step_flops  # noqa: E402
from benchmarks._measure import (  # noqa: E402
    Memory,
    facts,
    grown_alone,
    optimizer_step,
    run_benchmark,
    seconds,
)
from benchmarks._sides import open_shape  # noqa: E402
from benchmarks._trl import TRLGroups, compact_head, quiet_options  # noqa: E402
from internvl.chat import encode_reply, load_processor, render_prompt  # noqa: E402
from internvl.checkpoint import load_model  # noqa: E402
from internvl.data import Row  # noqa: E402
from internvl.sampler import Completion, SampleRequest, SamplingConfig  # noqa: E402
from rewards import Outcome  # noqa: E402
from rewards.verdict import Verdict  # noqa: E402

# (generations, tokens of an answer, tiles of the questions)
CASES: dict[str, tuple[int, tuple[int, int], Sequence[int]]] = {
    "g8_short": (8, (50, 200), data.TILES),
    "g8_long": (8, (300, 500), (1, 3, 4)),
    "g16_short": (16, (50, 200), data.TILES),
}
SIDES = ("ours", "trl")


class FixedSampler:
    """Hands out the answers of a question's row; the weights that it is given are not looked at."""

    name = "fixed"

    def __init__(self, rows: Sequence[Row], processor: Any):
        self.processor = processor
        self.by_question = {row.data["question"]: row for row in rows}

    def update_weights(self, named_parameters: Iterable[Any]) -> None:
        """Nothing: no token is drawn."""

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        """The rows' answers, in order."""
        return [[self._completion(r, text) for text in self._answers(r)] for r in requests]

    def _answers(self, request: SampleRequest) -> list[str]:
        answers: list[str] = self.by_question[request.question].data["answers"]
        return answers

    def _completion(self, request: SampleRequest, text: str) -> Completion:
        prompt = render_prompt(self.processor, request.question)
        ids = tuple(encode_reply(self.processor, prompt, text))
        return Completion(text, ids, (-9.0,) * len(ids), "stop")

    takes_adapters = False

    def stream(
        self, requests: Iterable[SampleRequest], config: SamplingConfig, *, ahead: int | None = None
    ) -> Generator[tuple[int, list[Completion]]]:
        """The same, one question after the other."""
        for number, request in enumerate(requests):
            yield number, self.sample([request], config)[0]

    def score(self, requests: Sequence[SampleRequest], config: SamplingConfig) -> dict[str, Any]:
        """No engine: nothing is compared."""
        return {}

    def update_adapter(self, folder: Path) -> None:
        """Never: it takes none."""

    def sleep(self) -> None:
        """Nothing holds memory."""

    def close(self) -> None:
        """Nothing is open."""


def every_other(judged: Sequence[Any]) -> list[Verdict]:
    """Every other answer is right, so that each group carries a gradient."""
    outcomes = [Outcome.CORRECT, Outcome.WRONG]
    return [
        Verdict(outcomes[place % 2], "5", "number", float(place % 2 == 0), True)
        for place in range(len(judged))
    ]


class Case:
    """Both trainers on one case's questions; a step's groups are made on our side."""

    def __init__(self, folder: Path, shape: data.Shape, name: str, device: str):
        self.folder, self.shape, self.device = folder, shape, device
        self.dtype = "float32" if device == "cpu" else "bfloat16"
        self.generations, lengths, tiles = CASES[name]
        if device == "cuda":
            lengths, tiles = (300, 1000), (13,)
        questions = data.group_sizes(self.generations, lengths, tiles)
        self.rows = data.make_rows(questions, folder / name, shape.image_size)
        self.trl_folder = folder / "trl"
        self._made: dict[str, Any] = {}
        self._models: dict[str, Any] = {}
        self._optimizers: dict[str, Any] = {}

    def trainer(self, side: str) -> Any:
        """The trainer of a side, made when first asked for."""
        if side not in self._made:
            made = self._ours() if side == "ours" else self._trl()
            self._made[side] = made
            trainer = made if side == "ours" else made.trainer
            self._models[side] = trainer.model
            self._optimizers[side] = trainer.create_optimizer()
        return self._made[side]

    def _ours(self) -> Any:
        from rl.config import RLConfig
        from rl.trainer import RLTrainer

        processor = load_processor(str(self.folder / "model"))
        args = RLConfig(
            train_file="rows.jsonl",
            max_steps=100,
            per_device_train_batch_size=1,
            num_generations=self.generations,
            steps_per_generation=1,
            canary_questions=0,  # no sampler is compared with
            freeze_vit=False,
            **quiet_options(self.folder / "ours", self.device, 1e-6),
        )
        return RLTrainer(
            load_model(self.folder / "model", dtype=self.dtype).to(self.device),
            args,
            self.rows,
            processor,
            sampler=FixedSampler(self.rows, processor),
            verify=every_other,
        )

    def _trl(self) -> Any:
        places = (self.folder / "model", self.rows, self.trl_folder)
        return TRLGroups(*places, self.device, getattr(torch, self.dtype), self.generations)

    def rollouts(self) -> list[Any]:
        """A step for each question, as our trainer's stream makes it."""
        trainer = self.trainer("ours")
        return [trainer.next_step() for _ in self.rows]

    def theirs(self, step: Any) -> Any:
        """The same rollout for TRL."""
        (batch,) = step.microbatches
        lengths = batch.lengths.tolist()
        completions = [ids.tolist() for ids in batch.targets.split(lengths)]
        advantages = batch.completion_values["advantages"].tolist()
        return self.trainer("trl").collate(self._question(completions), completions, advantages)

    def _question(self, completions: list[list[int]]) -> int:
        for number, row in enumerate(self.rows):
            prompt = render_prompt(self._made["trl"].processor, row.data["question"])
            first = encode_reply(self._made["trl"].processor, prompt, row.data["answers"][0])
            if first == completions[0]:
                return number
        raise RuntimeError("a rollout of no question")

    def step(self, side: str, batch: Any) -> None:
        """One update."""
        made = self.trainer(side)
        parts = (self._models[side], self._optimizers[side])
        if side == "ours":
            optimizer_step(made, *parts, {"step": batch})
        else:
            with compact_head():
                optimizer_step(made.trainer, *parts, made.feed(batch))

    def work(self, side: str, batch: Any) -> Work:
        """What a forward of an update computes."""
        if side == "trl":
            return self.trainer("trl").work(batch)
        (packed,) = batch.microbatches
        lengths = packed.lengths.tolist()
        prompt = len(packed.input_ids) - sum(lengths)
        return packed_work([prompt], [lengths], len(packed.tiles))


def measure(case: Case, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and operations of either side's updates, summed; the first update is not kept."""
    steps = case.rollouts()
    pairs = [{"ours": step, "trl": case.theirs(step)} for step in steps]
    spent, flops = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0.0)
    for number, pair in enumerate([pairs[0], *pairs * rounds]):
        for side in SIDES if number % 2 else reversed(SIDES):
            _, took = seconds(lambda side=side, pair=pair: case.step(side, pair[side]), case.device)
            print(f"update {number} {side:5}{took:8.2f} s", file=sys.stderr)
            if number:
                spent[side] += took
                flops[side] += step_flops(case.shape, case.work(side, pair[side]))
    return spent, flops


def memory_of(case: Case, side: str) -> float:
    """MB over what this process held before its first update."""
    steps = case.rollouts()
    if side == "trl":
        steps = [case.theirs(step) for step in steps]
        case._made.pop("ours"), case._models.pop("ours"), case._optimizers.pop("ours")
    case.trainer(side)
    memory = Memory(case.device)
    for step in steps:
        case.step(side, step)
    return memory.growth()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", choices=("small", "quick", *data.GPU_SHAPES), default="small")
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--rounds", type=int, default=1, help="times each question is trained on (default: 1)")
    add("--quick", action="store_true", help="a very small model and one case: does it run?")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--write-docs", action="store_true", help="write the table and the plot into docs/")
    add("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.shape, args.cases = "quick", ["g8_short"]
    if args.device == "cuda" and args.shape == "small":
        args.shape = "1b"
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure; for `--memory-of` the number is printed and nothing returned."""
    shape = open_shape(args, folder)
    if args.memory_of:
        print(memory_of(Case(folder, shape, args.cases[0], args.device), args.memory_of))
        return None
    out: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for name in args.cases:
        spent, flops = measure(Case(folder, shape, name, args.device), args.rounds)
        given = ["--device", args.device, "--shape", args.shape, "--cases", name]
        given += ["--folder", str(folder)]
        memory = {side: grown_alone(__file__, [*given, "--memory-of", side]) for side in SIDES}
        out[f"speedup_{name}"] = round(spent["trl"] / spent["ours"], 3)
        out[f"flop_model_{name}"] = round(flops["trl"] / flops["ours"], 3)
        out[f"memory_ratio_{name}"] = round(memory["ours"] / memory["trl"], 3)
        details[name] = {
            "seconds": {side: round(s, 2) for side, s in spent.items()},
            "gflop": {side: round(f / 1e9, 1) for side, f in flops.items()},
            "gflop_a_second": {side: round(flops[side] / spent[side] / 1e9, 1) for side in SIDES},
            "memory_mb": {side: round(grown) for side, grown in memory.items()},
        }
    out["memory_ratio"] = out[f"memory_ratio_{args.cases[0]}"]
    return {**out, "cases": details, "facts": facts(args.device)}


def main() -> None:
    from benchmarks._report import write_gspo

    run_benchmark(parse(), run, write_gspo)


if __name__ == "__main__":
    main()
