"""MPOTrainer against the real DPOTrainer of TRL 1.16, on the same pairs with pictures.

TRL runs as its users run it: transformers' own model, its collator with the checkpoint's processor,
a second model as the reference. Its traps are avoided by its own options: max_length (1,024 by
default) would cut a prompt, and bf16 and gradient checkpointing are on by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mpo_cases import (
    EQUAL_CHOSEN,
    PAIRS,
    QUESTION,
    Pair,
    add_noise,
    make_rows,
    moved_trainer,
    one_step,
    pictures,
)
from plain import gradient_error, gradients, load_plain
from tiny_llms import make_family
from trainer_cases import LARGE, SMALL
from trl_private import dpo_trainer_loss, trl

# TRL's trainers take seconds to import: in one process, that which imports vLLM anyway
pytestmark = pytest.mark.xdist_group("vllm")

# what our template writes after every turn, and the same without the last newline: TRL scores all
# that it writes after an answer, and nobody samples a newline after the end of a turn
TURN_END = "{{ '<|im_end|>\n' }}{% endfor %}"
NO_LAST_NEWLINE = (
    "{{ '<|im_end|>' }}{% if add_generation_prompt or not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
METRICS = ["chosen", "rejected", "margins", "accuracies"]


def their_examples(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Pairs in TRL's conversational format; it puts the pictures before the text itself."""
    return [
        {
            "images": pictures(number, tiles),
            "prompt": [{"role": "user", "content": QUESTION}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for number, (tiles, chosen, rejected) in enumerate(pairs)
    ]


def their_trainer(folder: Path, output: Path, pairs: Sequence[Pair], **options: Any) -> Any:
    from datasets import Dataset

    model, processor = load_plain(folder)
    reference, _ = load_plain(folder)
    add_noise(model)
    assert TURN_END in processor.chat_template
    processor.chat_template = processor.chat_template.replace(TURN_END, NO_LAST_NEWLINE)
    config = trl.DPOConfig(
        output_dir=str(output),
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=len(pairs),
        **options,
    )
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(their_examples(pairs)),
        processing_class=processor,
    )


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(
    ("pairs", "losses", "options"),
    [
        (PAIRS, {"sigmoid": 0.8, "bco_pair": 0.2}, {}),
        # its sft is a mean over tokens of the batch: ours per sequence, where lengths are equal
        (EQUAL_CHOSEN, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {}),
        (PAIRS, {"ipo": 0.1, "hinge": 1.0, "robust": 0.5}, {"beta": 0.3, "label_smoothing": 0.1}),
    ],
    ids=["preferences", "mpo", "others"],
)
def test_a_step_is_trls(
    checkpoint: Path,
    tmp_path: Path,
    pairs: list[Pair],
    losses: dict[str, float],
    options: dict[str, Any],
) -> None:
    options = {**options, "loss_type": list(losses), "loss_weights": list(losses.values())}
    theirs = their_trainer(checkpoint, tmp_path / "trl", pairs, **options)
    inputs = theirs.data_collator(their_examples(pairs))
    tiles = sum(sum(tiles) for tiles, _, _ in pairs)
    assert len(inputs["pixel_values"]) == 2 * tiles  # every picture twice
    loss, metrics = dpo_trainer_loss(theirs, inputs)
    loss.backward()
    expected = gradients(theirs.model, all_reached=False)
    rows = make_rows(tmp_path, pairs)
    for budget, parts in ((LARGE, 1), (SMALL, 4)):
        ours = moved_trainer(
            *(checkpoint, tmp_path / str(budget), rows),
            **{**options, "max_tokens_per_microbatch": budget, "log_entropy": True},
        )
        found, values, microbatches = one_step(ours)
        assert microbatches >= parts
        assert found == pytest.approx(loss.item(), rel=1e-6)
        error = gradient_error(gradients(ours.model), expected)
        print(f"losses {found:.7f} {loss:.7f}, gradients differ by {error:.1e}")
        assert error < 1e-5
        names = [f"rewards/{name}" for name in METRICS] + ["logps/chosen", "logps/rejected"]
        for name in [*names, "entropy"]:
            assert values[name] == pytest.approx(metrics[name][0], rel=1e-4, abs=1e-5), name
