"""accelerate launch -m rl --config FILE.yaml [--key value]: GSPO with a sampler in the process."""

from __future__ import annotations

from internvl.errors import cli_guard


def main() -> None:
    """Train on questions by their verified rollouts and save a checkpoint folder in output_dir."""
    from rl.config import RLConfig
    from training.cli import ModelArguments, parse_config, peft_config

    args, model_args = parse_config([RLConfig, ModelArguments], "python -m rl")
    from internvl.sampler import open_sampler
    from rl.trainer import RLTrainer
    from training.stage import open_stage, save_config

    stage = open_stage(model_args, args)
    rows = stage.rows(args.train_file, "question")
    longest = max(stage.encoder.length(row, "question") for row in rows)
    sampler = open_sampler(
        model_args.model_name_or_path,
        backend=args.sampler,
        seed=args.seed,
        max_model_len=longest + args.max_completion_length,
        dtype=model_args.dtype,
    )
    trainer = RLTrainer(
        model=stage.model,
        args=args,
        train_dataset=rows,
        processing_class=stage.processor,
        peft_config=peft_config(model_args),
        encoder=stage.encoder,
        sampler=sampler,
    )
    save_config(args, model_args)
    trainer.run()
    sampler.close()


if __name__ == "__main__":
    cli_guard(main)
