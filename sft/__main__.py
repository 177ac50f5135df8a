"""accelerate launch -m sft --config FILE.yaml [--key value]: supervised fine-tuning."""

from __future__ import annotations

import sys

from internvl.errors import cli_guard
from internvl.startup import collector_paused

_ABOUT = """\
Supervised fine-tuning of InternVL: next-token loss on the assistant's turns of conversations."""
_EXAMPLE = """\
example, sft.yaml:

  model_name_or_path: ckpt              # an InternVL checkpoint in the HF-native layout
  train_file: conversations.jsonl       # or InternVL's meta.json
  output_dir: out/sft
  per_device_train_batch_size: 64       # conversations of one optimizer step on this device
  max_tokens_per_microbatch: 16384      # tokens that run at once: memory only, never mathematics

  python -m sft --config sft.yaml
  accelerate launch -m sft --config sft.yaml --learning_rate 1e-5 --use_peft true

One line of conversations.jsonl ("image" is relative to the file's folder or to --image_root):

  {"id": "s1", "image": "7.png", "conversations": [
    {"from": "human", "value": "<image>\\nHow many bars are red?"}, {"from": "gpt", "value": "3"}]}

A run that was killed goes on from its newest complete checkpoint when the same command is started
again. Rows that cannot be used are put aside in output_dir/quarantine.jsonl with file, line and
reason. An error that you can mend is one line, with exit code 2."""


def main() -> None:
    """Train on conversations and save a checkpoint folder in output_dir."""
    with collector_paused():
        from sft.config import SFTConfig
        from training.cli import ModelArguments, parse_config, peft_config

    args, model_args = parse_config(
        [SFTConfig, ModelArguments], "python -m sft", about=_ABOUT, example=_EXAMPLE
    )
    with collector_paused():
        from sft.measuring import checking_encoder
        from sft.mixture import check_names
        from sft.trainer import SFTTrainer
        from sft.vision import check_vision_from, composed_start
        from training.stage import check_eval_file, check_files, open_stage, save_config

    composition = check_vision_from(args, model_args)
    check_files(args.train_file, args.eval_file)
    check_names(args)
    check_eval_file(args, args.eval_file)
    stage = open_stage(composed_start(composition, args, model_args), args)
    trainer = SFTTrainer(
        model=stage.model,
        args=args,
        train_dataset=stage.rows(
            *(args.train_file, "conversation"),
            checked=args.check_rows == "before",
            encoder=checking_encoder(args, stage.encoder),
        ),
        eval_dataset=stage.rows(args.eval_file, "conversation", held_out=True)
        if args.eval_file
        else None,
        processing_class=stage.processor,
        peft_config=peft_config(model_args),
        encoder=stage.encoder,
    )
    save_config(args, model_args)
    trainer.run()


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):  # a command of the data tools
        from sft.cli import main as data_tools

        data_tools()
    else:
        cli_guard(main)
