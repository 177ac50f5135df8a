"""TRL 1.16's side of the benchmarks: the only file of them that uses TRL's private names.

`trl.trainer.utils._use_triton` decides whether the head sees the scored positions alone (as on
CUDA) or all of them (as on CPU); `compact_head` makes it say the former. The losses are TRL's own
`compute_loss` on batches of TRL's own collators.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from benchmarks._flops import Work, padded_work
from internvl.chat import eos_token_id, load_processor, render_prompt
from internvl.data import Row


@contextlib.contextmanager
def compact_head(wanted: bool = True) -> Iterator[None]:
    """While open, TRL's head scores the completions' positions alone, as it does on CUDA."""
    from trl.trainer import utils

    original = utils._use_triton
    if wanted:
        utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


def load_plain(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """transformers' own model with SDPA."""
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.to(device)


class TRLPairs:
    """TRL's DPOTrainer with MPO's three losses and a reference model, on the rows of ours."""

    def __init__(
        self, folder: Path, rows: Sequence[Row], output: Path, device: str, dtype: torch.dtype
    ):
        from trl import DPOConfig, DPOTrainer

        self.rows, self.processor = rows, load_processor(str(folder))
        self.model = load_plain(folder, device, dtype)
        args = DPOConfig(
            output_dir=str(output),
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
            beta=0.1,
            max_length=None,  # its 1,024 would cut images
            gradient_checkpointing=False,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
            optim="adamw_torch_fused",
            learning_rate=1e-5,
            disable_tqdm=True,
            save_strategy="no",
        )
        self.trainer: Any = DPOTrainer(
            self.model,
            copy.deepcopy(self.model).requires_grad_(False),
            args,
            train_dataset=Dataset.from_list([{"images": [], "prompt": "", "chosen": ""}]),
            processing_class=self.processor,
        )
        self.trainer.current_gradient_accumulation_steps = 1

    def collate(self, indices: Sequence[int]) -> Any:
        """TRL's collator on the pairs at `indices`, as text and decoded images."""
        end = self.processor.tokenizer.convert_ids_to_tokens(eos_token_id(self.processor))
        examples = []
        for row in (self.rows[index] for index in indices):
            examples.append(
                {
                    "images": row.load_images(),
                    "prompt": render_prompt(self.processor, row.data["question"]),
                    "chosen": row.data["chosen"] + end,
                    "rejected": row.data["rejected"] + end,
                }
            )
        return self.trainer.data_collator(examples)

    def inject_reference(self, wanted: bool) -> None:
        """Take reference log-probabilities from the batch: what TRL refuses for images."""
        self.trainer.precompute_ref_logps = wanted

    def work(self, batch: Any, *, compact: bool = True) -> Work:
        """What a forward on a collated batch computes."""
        rows, length = batch["input_ids"].shape
        scored = int(batch["completion_mask"].sum()) if compact else rows * (length - 1)
        return padded_work(rows, length, len(batch["pixel_values"]), scored)
