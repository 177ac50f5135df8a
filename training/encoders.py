"""How a stage's rows become ids and tiles: one Encoder from the options and the checkpoint."""

from __future__ import annotations

from peft import PeftConfig
from transformers import InternVLProcessor

from internvl.augmentation import JpegAugmentation, check_qualities
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.model import InternVLForConditionalGeneration
from internvl.positions import checkpoint_step
from training.arguments import AugmentedArguments, PackedTrainingArguments


def make_encoder(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    args: PackedTrainingArguments,
) -> Encoder:
    """The Encoder of a stage that trains `model`, within the model's own limit of tokens.

    Raises `UserError` for fractional positions under TF32, which keeps 10 bits of a number: on
    some GPUs the rotary code's product of positions and frequencies goes by it (transformers issue
    48428).
    """
    limit = args.max_length or model.config.text_config.max_position_embeddings
    steps = args.position_steps or [checkpoint_step(model.config.to_dict())]
    if args.tf32 and any(step != 1 for step in steps):
        raise UserError(f"tf32 is on, which can round fractional positions (V2PE: {steps}) away")
    seed = args.seed if args.data_seed is None else args.data_seed
    return Encoder(processor, args.max_tiles, limit, tuple(steps), seed, make_augmentation(args))


def make_augmentation(args: PackedTrainingArguments) -> JpegAugmentation | None:
    """What is done to training images; a stage without the option leaves all as they are."""
    if not isinstance(args, AugmentedArguments):
        return None
    if args.jpeg_quality is None:
        return JpegAugmentation()
    return JpegAugmentation(check_qualities(args.jpeg_quality), unless_said=True)


def set_checkpoint_step(
    model: InternVLForConditionalGeneration,
    args: PackedTrainingArguments,
    peft_config: PeftConfig | None,
) -> None:
    """Make the model's config, and so what is saved, say the position step that it is trained for.

    Raises `UserError` for an adapter: it is used with the config of its base.
    """
    before = checkpoint_step(model.config.to_dict())
    after = args.inference_position_step
    if after is None:
        after = args.position_steps[0] if args.position_steps else before
    if after == before:
        return
    if peft_config is not None:
        raise UserError(
            f"the adapter would be used with position_step {after:g}, but its base's config.json "
            f'says {before:g}: write "position_step": {after:g} there first'
        )
    model.config.update({"position_step": after})
