"""The glue that MMPR files need before TRL 1.16 takes them: `newcomer_trl.py FOLDER full|lora`."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

folder, kind = Path(sys.argv[1]), sys.argv[2]


def read_meta(meta: Path) -> Dataset:
    """MMPR's rows in TRL's columns."""
    rows: list[dict[str, Any]] = []
    for entry in json.loads(meta.read_text()).values():
        for line in (meta.parent / entry["annotation"]).read_text().splitlines():
            row = json.loads(line)
            asked = row["question"].removeprefix("<image>\n")
            parts = [{"type": "image", "text": None}, {"type": "text", "text": asked}]
            replies = {
                name: [{"role": "assistant", "content": [{"type": "text", "text": row[name]}]}]
                for name in ("chosen", "rejected")
            }
            picture = str(meta.parent / entry["root"] / row["image"])
            rows.append(
                {"prompt": [{"role": "user", "content": parts}], **replies, "images": [picture]}
            )
    return Dataset.from_list(rows).cast_column("images", List(Image()))


trainer = DPOTrainer(
    model=AutoModelForImageTextToText.from_pretrained(folder / "model"),
    args=DPOConfig(
        output_dir=str(folder / kind),
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        per_device_train_batch_size=8,
        max_steps=5,
        learning_rate=1e-5,
        max_length=None,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=read_meta(folder / "MMPR/meta.json"),
    processing_class=AutoProcessor.from_pretrained(folder / "model"),
    peft_config=LoraConfig(target_modules="all-linear") if kind == "lora" else None,
)
trainer.train()
trainer.save_model()
