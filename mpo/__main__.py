"""accelerate launch -m mpo --config FILE.yaml [--key value]: mixed preference optimisation."""

from __future__ import annotations

from internvl.errors import cli_guard
from internvl.startup import collector_paused

_ABOUT = """\
Mixed preference optimisation of InternVL (DPO + BCO + SFT) on pairs of completions; the model
that it starts from is the reference."""
_EXAMPLE = """\
example, mpo.yaml:

  model_name_or_path: ckpt              # where it starts, and the reference
  train_file: meta.json                 # MMPR's own format, or a JSONL of pairs
  output_dir: out/mpo
  per_device_train_batch_size: 32       # pairs of one optimizer step on this device
  max_tokens_per_microbatch: 16384      # tokens that run at once: memory only, never mathematics

  python -m mpo --config mpo.yaml
  accelerate launch -m mpo --config mpo.yaml --learning_rate 2e-7 --use_peft true

One line of pairs ("image" is relative to the file's folder or to --image_root):

  {"id": "q7-0", "image": "7.png", "question": "<image>\\nHow many bars are red?",
   "chosen": "... Final Answer: 3", "rejected": "... Final Answer: 4", "answer_gt": "3"}

A run that was killed goes on from its newest complete checkpoint when the same command is started
again. Rows that cannot be used are put aside in output_dir/quarantine.jsonl with file, line and
reason. An error that you can mend is one line, with exit code 2."""


def main() -> None:
    """Train on preference pairs and save a checkpoint folder in output_dir."""
    with collector_paused():
        from mpo.config import MPOConfig
        from training.cli import ModelArguments, parse_config, peft_config

    args, model_args = parse_config(
        [MPOConfig, ModelArguments], "python -m mpo", about=_ABOUT, example=_EXAMPLE
    )
    with collector_paused():
        from mpo.trainer import MPOTrainer
        from training.stage import check_eval_file, check_files, open_stage, save_config

    check_files(args.train_file, args.eval_file)
    check_eval_file(args, args.eval_file)
    stage = open_stage(model_args, args)
    trainer = MPOTrainer(
        model=stage.model,
        args=args,
        train_dataset=stage.rows(args.train_file, "pair"),
        eval_dataset=stage.rows(args.eval_file, "pair", held_out=True) if args.eval_file else None,
        processing_class=stage.processor,
        peft_config=peft_config(model_args),
        encoder=stage.encoder,
    )
    save_config(args, model_args)
    trainer.run()


if __name__ == "__main__":
    cli_guard(main)
