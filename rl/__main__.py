"""accelerate launch -m rl --config FILE.yaml [--key value]: GSPO with a sampler in the process."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

from internvl.errors import cli_guard
from internvl.startup import collector_paused

_ABOUT = """\
Online reinforcement learning of InternVL by GSPO: groups of completions are sampled from the
current weights, verified against gold answers, and learned from."""
_EXAMPLE = """\
example, rl.yaml:

  model_name_or_path: out/mpo
  train_file: questions.jsonl
  output_dir: out/rl
  max_steps: 400                        # optimizer steps
  per_device_train_batch_size: 16       # questions of one optimizer step on this device
  num_generations: 8                    # completions a question
  max_completion_length: 1024

  python -m rl --config rl.yaml
  accelerate launch -m rl --config rl.yaml --learning_rate 1e-6 --sampler vllm

One line of questions.jsonl ("image" is relative to the file's folder or to --image_root):

  {"id": "q7", "image": "7.png", "question": "<image>\\nHow many bars are red?", "answer": "3"}

Rewards beside 1 for correct and 0.1 for the format (mine.py defines shorter(prompts, completions,
**columns) -> list[float | None], TRL's signature):

  reward_funcs: [accuracy, format, overlong, "mine:shorter"]
  soft_punish_cache: 256

A run that was killed goes on from its newest complete checkpoint when the same command is started
again. Rows that cannot be used are put aside in output_dir/quarantine.jsonl with file, line and
reason. An error that you can mend is one line, with exit code 2."""


def main() -> None:
    """Train on questions by their verified rollouts and save a checkpoint folder in output_dir."""
    with collector_paused():
        from rl.config import RLConfig
        from training.cli import ModelArguments, parse_config, peft_config

    args, model_args = parse_config(
        [RLConfig, ModelArguments], "python -m rl", about=_ABOUT, example=_EXAMPLE
    )
    with collector_paused():
        from internvl.adapters import base_of
        from rewards import VerifierPool
        from rl.rewarding import check_asked, check_judge, make_terms, make_verifier
        from rl.sampling import choose_sampler, longest_prompt, open_policy_sampler
        from rl.trainer import RLTrainer
        from training.stage import check_files, open_stage, save_config

    check_files(args.train_file, args.eval_file)
    make_terms(args)  # an error now, and not when the model is loaded
    verifier = make_verifier(args, VerifierPool(args.verifier_workers, limit=args.verifier_limit))
    if verifier.judge is not None:
        check_judge(verifier.judge)
    whole = base_of(model_args.model_name_or_path)  # an adapter comes with the first weights
    kind = choose_sampler(args, model_args, whole)
    stage = open_stage(model_args, args)
    unanswered = "accuracy" not in args.reward_funcs
    looked_at: dict[str, Any] = {
        "room": args.max_completion_length,
        "record_fault": partial(verifier.fault, unanswered=unanswered),
    }
    rows = stage.rows(args.train_file, "question", **looked_at)
    held_out = stage.rows(args.eval_file, "question", **looked_at) if args.eval_file else None
    check_asked(verifier.judge, args, rows)
    longest = longest_prompt(chain(rows, held_out or []), stage.encoder, args)
    tile = stage.processor.image_seq_length
    sampler = open_policy_sampler(args, model_args, whole, kind, longest, tile)
    with verifier:
        trainer = RLTrainer(
            model=stage.model,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=stage.processor,
            peft_config=peft_config(model_args),
            encoder=stage.encoder,
            sampler=sampler,
            verify=verifier.verdicts,
        )
        save_config(args, model_args)
        trainer.run()
    sampler.close()


if __name__ == "__main__":
    cli_guard(main)
