"""accelerate launch -m mpo --config FILE.yaml [--key value]: mixed preference optimisation."""

from __future__ import annotations

from internvl.errors import cli_guard


def main() -> None:
    """Train on preference pairs and save a checkpoint folder in output_dir."""
    from mpo.config import MPOConfig
    from training.cli import ModelArguments, parse_config, peft_config

    args, model_args = parse_config([MPOConfig, ModelArguments], "python -m mpo")
    from mpo.trainer import MPOTrainer
    from training.stage import open_stage, save_config

    stage = open_stage(model_args, args)
    trainer = MPOTrainer(
        model=stage.model,
        args=args,
        train_dataset=stage.rows(args.train_file, "pair"),
        eval_dataset=stage.rows(args.eval_file, "pair") if args.eval_file else None,
        processing_class=stage.processor,
        peft_config=peft_config(model_args),
        encoder=stage.encoder,
    )
    save_config(args, model_args)
    trainer.run()


if __name__ == "__main__":
    cli_guard(main)
