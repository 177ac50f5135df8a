"""What a run's mathematics depends on, as its checkpoints tell it."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model
from trainer_cases import COMMON, STAGES

from internvl.checkpoint import load_model
from training.settings import run_settings

LAYERS = r".*language_model\.layers\..*_proj"


def test_an_adapter_s_base_is_told_by_its_precision(tiny_model: Path, tmp_path: Path) -> None:
    """The adapter's own weights are float32 whatever the base is: they cannot tell."""
    args = STAGES["sft"][0](output_dir=str(tmp_path), **COMMON)
    lora = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM")
    found = []
    for dtype in ("float32", "bfloat16"):
        model = get_peft_model(load_model(tiny_model, dtype=dtype), lora)
        found.append(run_settings(args, model, "no"))
    assert [one.pop("base.dtype") for one in found] == ["torch.float32", "torch.bfloat16"]
    assert found[0] == found[1]
    assert "base.dtype" not in run_settings(args, load_model(tiny_model), "no")
