"""What every stage's command does before it can train: model, processor, rows, quarantine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import distributed as dist
from transformers import InternVLProcessor, set_seed

from internvl.adapters import base_of, put_adapter
from internvl.chat import load_processor
from internvl.checkpoint import DTYPES, load_model
from internvl.data import (
    Kind,
    Quarantine,
    RecordFault,
    Row,
    Rows,
    check_input,
    read_rows,
    usable_rows,
    write_json,
)
from internvl.data.checks import Faults, Ranks
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.model import InternVLForConditionalGeneration
from training.arguments import AugmentedArguments, PackedTrainingArguments
from training.attention import check_checkpoint_attention
from training.cli import ModelArguments
from training.encoders import make_encoder
from training.quantising import four_bit
from training.refusals import refuse_lone_ranks


@dataclass
class Stage:
    """A stage's model and processor, and the reader of its rows."""

    model: InternVLForConditionalGeneration | PeftModel
    processor: InternVLProcessor
    encoder: Encoder
    args: PackedTrainingArguments
    quarantine_file: Path

    def rows(
        self,
        file: str,
        kind: Kind,
        *,
        room: int = 0,
        record_fault: RecordFault | None = None,
        checked: bool = True,
        held_out: bool = False,
        encoder: Encoder | None = None,
    ) -> Sequence[Row]:
        """The usable rows of a file; the others go to the quarantine with their reason.

        room, record_fault: see `usable_rows`. `max_bad` holds for each file. checked: False leaves
        all checks to the trainer (`LateChecks`). held_out: rows to be evaluated on. encoder: what
        they are checked by, where it is not the stage's own.
        """
        first = self.args.process_index == 0
        # one process writes; the others find the same rows and only count them
        quarantine = Quarantine(self.quarantine_file if first else None, self.args.max_bad)
        root = Path(self.args.image_root) if self.args.image_root else None
        quiet = bool(self.args.disable_tqdm) or not first
        rows = read_rows(
            file, kind=kind, quarantine=quarantine, image_root=root, checked=checked, quiet=quiet
        )
        if not held_out:
            refuse_unaugmented(self.args, file, rows)
        if not checked:
            return rows
        faults = {"room": room, "record_fault": record_fault}
        return keep_usable(
            rows, kind, self.args, encoder or self.encoder, quarantine, name=file, **faults
        )


def keep_usable(
    rows: Sequence[Row],
    kind: Kind,
    args: PackedTrainingArguments,
    encoder: Encoder,
    quarantine: Quarantine,
    *,
    name: str,
    **faults: Any,
) -> Sequence[Row]:
    """The rows that can be trained on, checked by all ranks; the others go to the quarantine.

    name: what the rows are called in what is printed. faults: see `usable_rows`.
    """
    first = args.process_index == 0
    good = usable_rows(
        *(rows, encoder, kind, quarantine),
        quiet=bool(args.disable_tqdm) or not first,
        known_folder=Path(args.output_dir or "") / "checked_rows",
        ranks=Ranks(args.process_index, args.world_size, gather_by_number),
        **faults,
    )
    if quarantine.count and first:
        print(f"{name}: {quarantine.count} bad rows so far, see {quarantine.path}")
    return good


def quarantine_file(args: PackedTrainingArguments) -> Path:
    """Where rows go that are found bad before the first step."""
    if args.quarantine_file:
        return Path(args.quarantine_file)
    return Path(args.output_dir or "") / "quarantine.jsonl"


def refuse_unaugmented(args: PackedTrainingArguments, file: str, rows: Rows) -> None:
    """Raise `UserError` where the augmentation that was asked for would touch no row."""
    asked = isinstance(args, AugmentedArguments) and args.jpeg_quality is not None
    if asked and rows.never_augmented:
        raise UserError(
            f"jpeg_quality is given, but {file} says data_augment: false of all its data sets: "
            "write true there, or take it out"
        )


def gather_by_number(mine: Faults) -> Faults:
    """What all ranks found, by the numbers of the rows: each looked at its share."""
    if not dist.is_initialized():
        return mine
    found: list[Faults] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return {number: fault for part in found for number, fault in part.items()}


def check_files(*files: str | None) -> None:
    """Raise `UserError` for data that are not there, before a model is loaded."""
    for file in files:
        if file is not None:
            check_input(Path(file))


def check_eval_file(args: PackedTrainingArguments, file: str | None) -> None:
    """Raise `UserError` for held-out rows that nothing would look at, or that are not there."""
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if file is not None and not evaluates:
        raise UserError('eval_file is given, but eval_strategy is "no": give "steps" or "epoch"')
    if file is None and evaluates:
        raise UserError("eval_strategy (or eval_on_start) asks for evaluations: give an eval_file")


def open_stage(model_args: ModelArguments, args: PackedTrainingArguments) -> Stage:
    """Load the model and processor that a stage starts from, an adapter with its base."""
    refuse_lone_ranks(args)
    set_seed(args.seed)
    folder = Path(model_args.model_name_or_path)
    base = base_of(folder)
    check_checkpoint_attention(args, base, model_args.dtype)
    processor = load_processor(str(base))
    model = load_model(base, dtype=model_args.dtype, quantization=quantization(model_args))
    own = model.config.text_config.max_position_embeddings
    limit = args.max_length or own
    if limit > own:
        raise UserError(f"max_length is {limit}, over the model's own limit of {own} tokens")
    output_dir = Path(args.output_dir or "")
    path = quarantine_file(args)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be made: {error.strerror}") from None
    if args.process_index == 0:
        path.unlink(missing_ok=True)  # the rows are read anew, and put aside anew
    encoder = make_encoder(model, processor, args)
    whole = model if base == folder else put_adapter(model, folder, base=base, trainable=True)
    return Stage(whole, processor, encoder, args, path)


def quantization(args: ModelArguments) -> Any:
    """What transformers quantises the base by, or None."""
    if not args.load_in_4bit:
        return None
    return four_bit(
        kind=args.bnb_4bit_quant_type,
        nested=args.use_bnb_nested_quant,
        dtype=DTYPES[args.dtype],
    )


def save_config(args: PackedTrainingArguments, model_args: ModelArguments) -> None:
    """Write the resolved options beside the run's results."""
    if args.process_index == 0:
        resolved: dict[str, Any] = {**json.loads(args.to_json_string()), **vars(model_args)}
        write_json(Path(args.output_dir or "") / "config.resolved.json", resolved)
