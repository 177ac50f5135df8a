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


def quiet_options(output: Path, device: str, learning_rate: float = 1e-5) -> dict[str, Any]:
    """What every trainer is given, ours and TRL's: this optimizer, this precision, no reports."""
    return {
        "output_dir": str(output),
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "report_to": "none",
        "optim": "adamw_torch_fused",
        "learning_rate": learning_rate,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def load_plain(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """transformers' own model with SDPA."""
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.to(device)


class _Padded:
    """What TRL's DPO and SFT trainers share here: rows as text and decoded images, padded."""

    scored: str  # the key of a batch that marks what is scored, and the value of what is not
    unscored: int
    trainer: Any

    def __init__(self, folder: Path, rows: Sequence[Row], device: str, dtype: torch.dtype):
        self.rows, self.processor = rows, load_processor(str(folder))
        self.model = load_plain(folder, device, dtype)

    def texts(self, row: Row, end: str) -> dict[str, str]:
        """The columns of a row; end: what ends a reply."""
        raise NotImplementedError

    def collate(self, indices: Sequence[int]) -> Any:
        """TRL's collator on the rows at `indices`."""
        end = self.processor.tokenizer.convert_ids_to_tokens(eos_token_id(self.processor))
        rows = [self.rows[index] for index in indices]
        return self.trainer.data_collator(
            [{"images": row.load_images(), **self.texts(row, end)} for row in rows]
        )

    def work(self, batch: Any, *, compact: bool = True) -> Work:
        """What a forward on a collated batch computes."""
        rows, length = batch["input_ids"].shape
        scored = (
            int((batch[self.scored] != self.unscored).sum()) if compact else rows * (length - 1)
        )
        return padded_work(rows, length, len(batch["pixel_values"]), scored)


class TRLPairs(_Padded):
    """TRL's DPOTrainer with MPO's three losses and a reference model, on the rows of ours."""

    scored, unscored = "completion_mask", 0

    def __init__(
        self, folder: Path, rows: Sequence[Row], output: Path, device: str, dtype: torch.dtype
    ):
        from trl import DPOConfig, DPOTrainer

        super().__init__(folder, rows, device, dtype)
        args = DPOConfig(
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
            beta=0.1,
            max_length=None,  # its 1,024 would cut images
            gradient_checkpointing=False,
            **quiet_options(output, device),
        )
        self.trainer = DPOTrainer(
            self.model,
            copy.deepcopy(self.model).requires_grad_(False),
            args,
            train_dataset=Dataset.from_list([{"images": [], "prompt": "", "chosen": ""}]),
            processing_class=self.processor,
        )
        self.trainer.current_gradient_accumulation_steps = 1

    def texts(self, row: Row, end: str) -> dict[str, str]:
        """Prompt, chosen and rejected."""
        prompt = render_prompt(self.processor, row.data["question"])
        replies = {name: row.data[name] + end for name in ("chosen", "rejected")}
        return {"prompt": prompt, **replies}

    def inject_reference(self, wanted: bool) -> None:
        """Take reference log-probabilities from the batch: what TRL refuses for images."""
        self.trainer.precompute_ref_logps = wanted


class TRLConversations(_Padded):
    """TRL's SFTTrainer on prompt and completion, the completion's tokens scored, as ours are.

    It pads: packing and padding-free are refused for images.
    """

    scored, unscored = "labels", -100

    def __init__(
        self, folder: Path, rows: Sequence[Row], output: Path, device: str, dtype: torch.dtype
    ):
        from trl import SFTConfig, SFTTrainer

        super().__init__(folder, rows, device, dtype)
        args = SFTConfig(
            completion_only_loss=True,
            max_length=None,  # its 1,024 would cut images
            gradient_checkpointing=False,
            **quiet_options(output, device),
        )
        self.trainer = SFTTrainer(
            self.model,
            args,
            train_dataset=Dataset.from_list([{"images": [], "prompt": "", "completion": ""}]),
            processing_class=self.processor,
        )
        self.trainer.current_gradient_accumulation_steps = 1

    def texts(self, row: Row, end: str) -> dict[str, str]:
        """Prompt and completion."""
        asked, said = (turn["value"] for turn in row.data["conversations"])
        return {"prompt": render_prompt(self.processor, asked), "completion": said + end}

    def loss(self, batch: Any) -> float:
        """Its own loss of a batch: the mean over the scored tokens."""
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.model, self.trainer._prepare_inputs(batch)))


class TRLGroups:
    """TRL's GRPOTrainer with GSPO's loss, updated on rollouts that are given to it.

    `_buffered_inputs` is where its trainer keeps the batches of a rollout; a step that does not
    begin a rollout takes its own from there.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        output: Path,
        device: str,
        dtype: torch.dtype,
        generations: int,
    ):
        from trl import GRPOConfig, GRPOTrainer

        self.rows, self.processor = rows, load_processor(str(folder))
        self.model = load_plain(folder, device, dtype)
        args = GRPOConfig(
            per_device_train_batch_size=generations,
            num_generations=generations,
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
            beta=0.0,
            gradient_checkpointing=False,
            **quiet_options(output, device, 1e-6),
        )
        self.trainer: Any = GRPOTrainer(
            self.model,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "?"}] * generations),
            processing_class=self.processor,
        )
        self.trainer.current_gradient_accumulation_steps = 1

    def collate(
        self, question: int, completions: Sequence[Sequence[int]], advantages: Sequence[float]
    ) -> Any:
        """A rollout as `_generate_and_score_completions` leaves it, without old log-probs."""
        row, size = self.rows[question], len(completions)
        images = [row.load_images()] * size
        prompt = render_prompt(self.processor, row.data["question"])
        inputs = self.processor(
            images=images,
            text=[prompt] * size,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        longest = max(map(len, completions))
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([[*c, *[pad] * (longest - len(c))] for c in completions])
        mask = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in completions])
        flat = [image for each in images for image in each]
        tiles = self.processor.image_processor(
            images=flat, crop_to_patches=True, return_tensors="pt"
        )["num_patches"]
        return {
            "prompt_ids": inputs["input_ids"],
            "prompt_mask": inputs["attention_mask"],
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.tensor(advantages),
            "num_items_in_batch": mask.sum(),
            "pixel_values": inputs["pixel_values"],
            "num_images": [len(each) for each in images],
            "num_tiles": [int(n) for n in tiles],
        }

    def feed(self, batch: Any) -> Any:
        """What training_step is called with so that it trains on this batch."""
        device = self.trainer.accelerator.device
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        self.trainer._buffered_inputs, self.trainer._step = [None, moved], 1
        return []

    def work(self, batch: Any, *, compact: bool = True) -> Work:
        """What a forward on a batch computes."""
        rows, completion = batch["completion_ids"].shape
        length = batch["prompt_ids"].shape[1] + completion
        scored = int(batch["completion_mask"].sum()) if compact else rows * (length - 1)
        return padded_work(rows, length, len(batch["pixel_values"]), scored)
