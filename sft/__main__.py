"""accelerate launch -m sft --config FILE.yaml [--key value]: supervised fine-tuning."""

from __future__ import annotations

from internvl.errors import cli_guard


def main() -> None:
    """Train on conversations and save a checkpoint folder in output_dir."""
    from sft.config import SFTConfig
    from training.cli import ModelArguments, parse_config, peft_config

    args, model_args = parse_config([SFTConfig, ModelArguments], "python -m sft")
    from sft.trainer import SFTTrainer
    from training.stage import open_stage, save_config

    stage = open_stage(model_args, args)
    trainer = SFTTrainer(
        model=stage.model,
        args=args,
        train_dataset=stage.rows(args.train_file, "conversation"),
        eval_dataset=stage.rows(args.eval_file, "conversation") if args.eval_file else None,
        processing_class=stage.processor,
        peft_config=peft_config(model_args),
        encoder=stage.encoder,
    )
    save_config(args, model_args)
    trainer.run()


if __name__ == "__main__":
    cli_guard(main)
