"""Rollouts a second of `mmpr sample` against bare vLLM (`LLM.generate`) on the same questions.

    OMP_NUM_THREADS=1 python benchmarks/mmpr.py            # a table
    OMP_NUM_THREADS=1 python benchmarks/mmpr.py --json     # the last line is one JSON object

The questions are the `rl` split of the demo world (charts of one to three tiles), the checkpoint is
its untrained tiny model (or --model, with --questions), so completions run to --max-tokens: nothing
but the amount of text is asked of the model. One engine serves both sides in turns, its caches of
prefixes and images emptied before each turn; a first round of each is not counted. Medians over the
rounds.

    bare    what a script of one's own would do: open the pictures, write the prompts, one call of
            LLM.generate with all of them and these sampling parameters: n, temperature, a seed for
            each question, the same stop and forbidden tokens; texts come back, nothing is written
    ours    `mmpr sample` without the start of the engine: read and check the rows, look for what is
            done, sample, write every batch and sync it to disk

The time of a side is its process's CPU time, which on a free core is wall time and on a shared one
does not change with what others do, and the time that it waits for the disk (fsync), by the clock.
On a GPU (--clock) it is the clock's alone. `ratio_to_bare_vllm` is ours / bare in rollouts a
second; `clock_ratio` is the same by the clock. `same_completions` is the share of completions that
are equal, token by token (1.0 on a CPU with one thread).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# this file has the name of the package: its folder must not be searched first
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]

from PIL import Image  # noqa: E402

from internvl.chat import (  # noqa: E402
    eos_token_id,
    forbidden_token_ids,
    load_processor,
    render_prompt,
    tile_settings,
)
from internvl.data import Quarantine, read_rows  # noqa: E402
from internvl.sampler import SamplingConfig, first_seed, open_sampler  # noqa: E402
from internvl.vllm_sampler import MASK, VLLMSampler  # noqa: E402
from mmpr.sample import describe_run, plan_sampling, question_seed, sample_batches  # noqa: E402

Tokens = list[list[list[int]]]


class Sides:
    """The engine and the two ways to it."""

    def __init__(self, model: Path, questions: Path, config: SamplingConfig, max_model_len: int):
        self.questions, self.config = questions, config
        options: Any = {"backend": "vllm", "max_model_len": max_model_len, "logprobs": False}
        sampler = open_sampler(model, **options)
        assert isinstance(sampler, VLLMSampler)
        self.sampler = sampler
        self.llm: Any = sampler._llm
        self.processor = load_processor(str(model))
        self.forbidden = forbidden_token_ids(self.processor, len(self.processor.tokenizer))
        self.eos = eos_token_id(self.processor)

    def bare(self, folder: Path) -> Tokens:
        """LLM.generate on all questions at once."""
        from vllm import SamplingParams

        records = [json.loads(line) for line in self.questions.read_text().splitlines()]
        prompts, params = [], []
        for record in records:
            prompt: dict[str, Any] = {"prompt": render_prompt(self.processor, record["question"])}
            if "image" in record:
                picture = Image.open(self.questions.parent / record["image"]).convert("RGB")
                prompt["multi_modal_data"] = {"image": [picture]}
                prompt["mm_processor_kwargs"] = tile_settings(1, self.config.max_tiles)
            prompts.append(prompt)
            params.append(
                SamplingParams(
                    n=self.config.n,
                    temperature=self.config.temperature,
                    max_tokens=self.config.max_tokens,
                    seed=first_seed(0, question_seed(0, record["id"])),
                    stop_token_ids=[self.eos],
                    logit_bias=dict.fromkeys(self.forbidden, MASK),
                )
            )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [[list(one.token_ids) for one in output.outputs] for output in outputs]

    def ours(self, folder: Path) -> Tokens:
        """`mmpr sample` into a new file."""
        output = folder / "rollouts.jsonl"
        quarantine = Quarantine(folder / "bad.jsonl")
        rows = read_rows(self.questions, kind="question", quarantine=quarantine, quiet=True)
        run = describe_run(model="m", fingerprint="", seed=0, config=self.config, dtype="auto")
        plan = plan_sampling(rows, output=output, config=self.config, run=run)
        batches = sample_batches(plan, self.sampler, quarantine, progress=False)
        sampled = [record["token_ids"] for batch in batches for record in batch]
        return [sampled[at : at + self.config.n] for at in range(0, len(sampled), self.config.n)]

    def empty_caches(self) -> None:
        """Both sides start with no prefix and no image known."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()


class Disk:
    """Seconds spent in os.fsync, which `with` counts."""

    def __enter__(self) -> Disk:
        self.seconds, self._sync = 0.0, os.fsync
        os.fsync = self._counted  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync = self._sync

    def _counted(self, file: Any) -> None:
        start = time.perf_counter()
        self._sync(file)
        self.seconds += time.perf_counter() - start


class Spent(NamedTuple):
    """Seconds of one turn: by the clock, of the processor, waiting for the disk."""

    clock: float
    cpu: float
    disk: float


Taken = dict[str, list[Spent]]


def measure(sides: Sides, rounds: int) -> tuple[Taken, float]:
    """What each side spent in each round, and the share of equal completions."""
    taken: Taken = {"bare": [], "ours": []}
    ways: dict[str, Callable[[Path], Tokens]] = {"bare": sides.bare, "ours": sides.ours}
    tokens: dict[str, Tokens] = {}
    for number in range(rounds + 1):
        for name in ("bare", "ours") if number % 2 else ("ours", "bare"):
            sides.empty_caches()
            with tempfile.TemporaryDirectory() as folder, Disk() as disk:
                clock, cpu = time.perf_counter(), time.process_time()
                tokens[name] = ways[name](Path(folder))
                ends = (time.perf_counter() - clock, time.process_time() - cpu)
            if number:  # the first round warms up
                taken[name].append(Spent(*ends, disk.seconds))
    pairs = [
        pair
        for a, b in zip(tokens["bare"], tokens["ours"], strict=True)
        for pair in zip(a, b, strict=True)
    ]
    return taken, sum(a == b for a, b in pairs) / len(pairs)


def report(taken: Taken, same: float, rollouts: int, *, by_clock: bool) -> dict[str, Any]:
    """The numbers of the module's docstring."""

    def median(name: str, *, by_clock: bool) -> float:
        turns = taken[name]
        return statistics.median(s.clock if by_clock else s.cpu + s.disk for s in turns)

    seconds = {name: median(name, by_clock=by_clock) for name in taken}
    clock = {name: median(name, by_clock=True) for name in taken}
    return {
        "ratio_to_bare_vllm": round(seconds["bare"] / seconds["ours"], 3),
        "clock_ratio": round(clock["bare"] / clock["ours"], 3),
        "same_completions": round(same, 4),
        "rollouts_per_second": {
            name: round(rollouts / spent, 1) for name, spent in seconds.items()
        },
        "disk_share": round(
            sum(s.disk for s in taken["ours"]) / sum(s.clock for s in taken["ours"]), 4
        ),
        "cpu_rounds": {name: [round(s.cpu, 2) for s in turns] for name, turns in taken.items()},
        "clock_rounds": {name: [round(s.clock, 2) for s in turns] for name, turns in taken.items()},
    }


def make_demo(folder: Path, questions: int) -> tuple[Path, Path]:
    """The demo's untrained model and so many of its questions."""
    from cascade.tiny import make_tiny_model
    from cascade.world import WorldSizes, make_world

    sizes = WorldSizes(sft=1, mixed=1, probe=1, preference=1, rl=questions, heldout=1)
    make_world(folder / "world", seed=0, sizes=sizes)
    make_tiny_model(folder / "model", seed=0)
    return folder / "model", folder / "world" / "rl.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="CKPT", help="a checkpoint (default: the tiny one)")
    add("--questions", type=Path, metavar="FILE", help="JSONL, one image each at most")
    add("--number", type=int, default=256, help="questions of the demo (default: %(default)s)")
    add("--n", type=int, default=8, help="completions a question (default: %(default)s)")
    add("--max-tokens", type=int, default=32, help="(default: %(default)s)")
    add("--max-model-len", type=int, default=512, help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--clock", action="store_true", help="time by the clock: where the work is a GPU's")
    add("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if (args.model is None) != (args.questions is None):
        raise SystemExit("--model and --questions go together")
    config = SamplingConfig(n=args.n, max_tokens=args.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        made = (args.model, args.questions)
        model, questions = made if args.model else make_demo(Path(folder), args.number)
        sides = Sides(model, questions, config, args.max_model_len)
        taken, same = measure(sides, args.rounds)
        rollouts = len(questions.read_text().splitlines()) * config.n
    result = report(taken, same, rollouts, by_clock=args.clock)
    for name, value in result.items():
        print(f"{name:22}{value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
