"""Where an online step's time goes: sampling, rewards, weight sync, log-probabilities, training.

    python benchmarks/rl_step.py --json --write-docs

A real run of the online stage on the demo's charts with real vLLM in the process: 16 questions of 8
completions a step, two steps a rollout batch, the demo's own options. The trainer's own metrics
(`time/...`, rl/phases.py) are read from its log; they add up to the wall time. The first rollout
batch is not kept. The model is the demo's tiny one with random weights unless `--model` names
another: its answers are verified, and then called right where their length is even, so that there
is something to learn; most are as long as `--tokens` allows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks._measure import facts  # noqa: E402
from cascade.tiny import make_tiny_model  # noqa: E402
from cascade.world import WorldSizes, make_world  # noqa: E402
from internvl.chat import load_processor  # noqa: E402
from internvl.checkpoint import load_model  # noqa: E402
from internvl.data import Row  # noqa: E402
from internvl.sampler import open_sampler  # noqa: E402
from rewards import Outcome, Verdict  # noqa: E402
from rewards.pool import shared_pool  # noqa: E402
from rl.config import RLConfig  # noqa: E402
from rl.phases import PHASES  # noqa: E402
from rl.rewarding import make_verifier  # noqa: E402
from rl.trainer import RLTrainer  # noqa: E402

CASES = {"frozen ViT": True, "all parts learn": False}


def questions(folder: Path) -> list[Row]:
    """Charts of the demo's world."""
    make_world(folder, seed=0, sizes=WorldSizes(1, 1, 1, 1, 256, 1))
    file = folder / "rl.jsonl"
    records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Row(record, file, index, folder) for index, record in enumerate(records)]


def measure(
    model: Path, rows: list[Row], sampler: Any, output: Path, args: argparse.Namespace, **given: Any
) -> dict[str, float]:
    """Seconds of an optimizer step in each phase, the mean of all but the first two."""
    options = RLConfig(
        output_dir=str(output),
        train_file=str(rows[0].file),
        sampler=sampler.name,
        max_steps=args.steps + 2,
        per_device_train_batch_size=16,
        num_generations=8,
        steps_per_generation=2,
        max_completion_length=args.tokens,
        max_tiles=2,
        learning_rate=2e-4,
        beta=args.beta,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **given,
    )
    real = make_verifier(options, shared_pool()).verdicts

    def verify(asked: Any) -> list[Verdict]:
        # judged as ever; but an untrained model is never right, and would have nothing to learn
        real(asked)
        even = [len(text) % 2 == 0 for _, text in asked]
        outcomes = [Outcome.CORRECT if right else Outcome.WRONG for right in even]
        return [Verdict(o, None, "exact", float(o == "correct"), False) for o in outcomes]

    trainer = RLTrainer(
        model=load_model(model),
        args=options,
        train_dataset=rows,
        processing_class=load_processor(str(model)),
        sampler=sampler,
        verify=verify if args.model is None else None,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "time/train" in log][2:]
    assert len(logs) == args.steps
    return {phase: sum(log[f"time/{phase}"] for log in logs) / len(logs) for phase in PHASES}


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both cases with one engine."""
    model = args.model
    if model is None:
        model = folder / "model"
        make_tiny_model(model, seed=0)
    rows = questions(folder / "world")
    sampler = open_sampler(model, backend=args.sampler, max_model_len=256 + args.tokens)
    out: dict[str, Any] = {}
    for name, frozen in CASES.items():
        spent = measure(model, rows, sampler, folder / "run", args, freeze_vit=frozen)
        out[name] = {phase: round(seconds, 4) for phase, seconds in spent.items() if seconds > 5e-5}
    sampler.close()
    shares = {
        name: {phase: round(s / sum(spent.values()), 3) for phase, s in spent.items()}
        for name, spent in out.items()
    }
    told = facts("cpu" if not torch.cuda.is_available() else "cuda")
    told |= {"sampler": sampler.name, "clock": "wall time"}
    return {"seconds_a_step": out, "share": shares, "facts": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint folder (default: the demo's model, untrained)")
    add("--sampler", choices=("vllm", "transformers"), default="vllm")
    add("--steps", type=int, default=8, help="optimizer steps that are kept (default: 8)")
    add("--tokens", type=int, default=40, help="of a completion, at most (default: the demo's 40)")
    add("--beta", type=float, default=0.0, help="of the KL term; above 0, a reference is scored")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--write-docs", action="store_true", help="write the plot and the table into docs/")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as made:
        result = run(args, Path(made))
    if args.write_docs:
        from benchmarks._report import write_rl_step

        write_rl_step(result)
    print(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
