"""A healthy tiny recipe, and the faults that are planted into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

RECIPE: dict[str, Any] = {
    "common": {"max_tiles": 2, "max_tokens_per_microbatch": 2048, "save_total_limit": 1},
    "evaluate": {"questions": "heldout.jsonl", "max-tiles": 2, "max-tokens": 40},
    "sample": {"max-tiles": 2, "max-tokens": 40},
    "stages": {
        "sft": {"kind": "sft", "model": "model", "train_file": "sft.jsonl"},
        "pairs": {"kind": "pairs", "model": "sft", "questions": "preference.jsonl"},
        "mpo": {"kind": "mpo", "model": "sft", "data": "pairs", "learning_rate": 1e-5},
        "select": {"kind": "select", "model": "mpo", "questions": "rl.jsonl"},
        "rl": {"kind": "rl", "model": "mpo", "data": "select", "max_steps": 4,
               "max_completion_length": 40},
    },
}  # fmt: skip
SIZES = {"sft": 24, "mixed": 0, "probe": 0, "preference": 12, "rl": 12, "heldout": 10}


def make_healthy(folder: Path) -> None:
    """A checkpoint, data and recipe.yaml without a fault."""
    from cascade.tiny import make_tiny_model
    from cascade.world import WorldSizes, make_world

    make_tiny_model(folder / "model", seed=0)
    make_world(folder, seed=0, sizes=WorldSizes(**SIZES))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))


def copy_of(healthy: Path, folder: Path) -> Path:
    """The recipe's folder once more, to plant something in."""
    return Path(shutil.copytree(healthy, folder / "run"))


# ---------------------------------------------------------------- planting


def change_recipe(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    change(recipe)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def change_rows(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def _stage(name: str, **options: Any) -> Callable[[Path], None]:
    return lambda f: change_recipe(f, lambda r: r["stages"][name].update(options))


def _tie(folder: Path) -> None:
    """The head is the embeddings once more, as in InternVL3-1B and 2B."""

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    change_json(folder / "model" / "config.json", tie)
    rewrite_weights(folder / "model", lambda weights: weights.pop("language_model.lm_head.weight"))


def _break_images(folder: Path) -> None:
    for file in (folder / "images" / "sft").glob("*.png"):
        file.write_bytes(file.read_bytes()[:300])


def _other_template(folder: Path) -> None:
    """The template of another family."""
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}"
        "{% endfor %}"
    )


def _expand(folder: Path) -> None:
    def expand(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            context = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
            row["question"] = row["question"].replace("<image>", f"<image>{context}")

    change_rows(folder / "preference.jsonl", expand)


def _lose_reference(folder: Path) -> None:
    """MPO goes on from a LoRA adapter, and the base behind it is gone."""
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "gone/base", "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    options = {"model": "adapter", "use_peft": True}
    change_recipe(folder, lambda r: r["stages"]["mpo"].update(options))
    change_recipe(folder, lambda r: r["stages"]["pairs"].update(model="adapter"))
    change_recipe(folder, lambda r: r["stages"].pop("sft"))


def _drop(folder: Path) -> None:
    change_json(
        folder / "model" / "config.json", lambda c: c["text_config"].update(attention_dropout=0.1)
    )


def _no_answers(folder: Path) -> None:
    change_rows(folder / "rl.jsonl", lambda rows: [row.pop("answer") for row in rows[:6]])


def _gold(folder: Path) -> None:
    """A matcher that cannot read the gold answers: every reward would be 0."""
    change_rows(folder / "rl.jsonl", lambda rows: [r.update(answer="many") for r in rows])


def _leak(folder: Path) -> None:
    def leak(rows: list[dict[str, Any]]) -> None:
        held_out = [json.loads(line) for line in (folder / "heldout.jsonl").open()]
        for number, row in enumerate(held_out[:3]):
            name = f"copied-{number}.png"  # the same picture under another name
            shutil.copy(folder / row["image"], folder / name)
            rows.append({**row, "id": f"new-{number}", "image": name})

    change_rows(folder / "rl.jsonl", leak)


def _zero(folder: Path) -> None:
    """What a save that went wrong leaves."""
    rewrite_weights(folder / "model", lambda weights: [w.zero_() for w in weights.values()])


def _pixels(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["image_processor"].update(image_mean=[0.5, 0.5, 0.5])

    change_json(folder / "model" / "processor_config.json", change)


def _tile_tokens(folder: Path) -> None:
    change_json(folder / "model" / "processor_config.json", lambda c: c.update(image_seq_length=16))


def _v2pe(folder: Path) -> None:
    change_json(folder / "model" / "config.json", lambda c: c.update(position_step=0.25))
    change_recipe(folder, lambda r: r.update(backend="vllm"))


def _same_ids(folder: Path) -> None:
    change_rows(folder / "preference.jsonl", lambda rows: [r.update(id="1") for r in rows[:4]])


def _gray_images_gone(folder: Path) -> None:
    shutil.rmtree(folder / "images" / "rl")


def _placeholders(folder: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["question"] = "<image>" + row["question"]

    change_rows(folder / "preference.jsonl", change)


def _chat_layout(folder: Path) -> None:
    change_json(folder / "model" / "config.json", lambda c: c.update(model_type="internvl_chat"))


def _missing_file(folder: Path) -> None:
    (folder / "heldout.jsonl").unlink()


def _same_names(folder: Path) -> None:
    (folder / "more").mkdir()
    shutil.copy(folder / "heldout.jsonl", folder / "more")
    shutil.copytree(folder / "images", folder / "more" / "images")
    both = ["heldout.jsonl", "more/heldout.jsonl"]
    change_recipe(folder, lambda r: r["evaluate"].update(questions=both))


def _blank(folder: Path) -> None:
    """Pictures that are whole are no fault, whatever they show."""
    for file in (folder / "images" / "sft").glob("*.png"):
        Image.new("RGB", (56, 56)).save(file)


@dataclass(frozen=True)
class Planted:
    """A fault: how it is planted, the codes that must be found and no other, and their words.

    found, cure: pieces of the first finding's texts.
    """

    name: str
    plant: Callable[[Path], None]
    codes: dict[str, str]
    found: str
    cure: str


# the twelve of the issue, and some more
PLANTED = [
    Planted(
        "wrong tile budget",
        lambda f: change_recipe(f, lambda r: r.pop("sample")),
        {"recipe.tiles": "error"},
        "pairs looks at 12 tiles of a prompt, and mpo trains on 2",
        "stages.pairs.sample: {max-tiles: 2}",
    ),
    Planted(
        "tied embeddings",
        _tie,
        {"checkpoint.tied": "error"},
        "vLLM on a CPU never refreshes a tied lm_head",
        "sampler: transformers in rl",
    ),
    Planted(
        "corrupt image directory",
        _break_images,
        {"data.images": "error"},
        "24 of 24 rows looked at: images are missing or broken (lines 1, 2, 3 and 21 more)",
        "put the images where the paths lead",
    ),
    Planted(
        "wrong template",
        _other_template,
        {"checkpoint.template": "error"},
        "the chat template writes a question as '<s>[INST] How many bars? [/INST]'",
        "chat_template.jinja",
    ),
    Planted(
        "expanded prompt",
        _expand,
        {"data.expanded": "error"},
        "texts hold <IMG_CONTEXT> already: expanded prompts",
        'write one "<image>" for each image',
    ),
    Planted(
        "missing reference",
        _lose_reference,
        {"checkpoint.reference": "error"},
        "its base 'gone/base' is no folder here",
        "bring the base back",
    ),
    Planted(
        "dropout in MPO",
        _drop,
        {"checkpoint.dropout": "error"},
        "text_config.attention_dropout 0.1 of config.json: in training the policy differs",
        "set it to 0 in",
    ),
    Planted(
        "answers missing",
        _no_answers,
        {"data.answers": "error"},
        "6 of 12 rows looked at: questions cannot be judged (lines 1, 2, 3 and 3 more)",
        'give each an "answer"',
    ),
    Planted(
        "gold answers that nothing matches",
        _gold,
        {"data.gold": "error"},
        "12 of 12 gold answers are judged cannot_judge (12) when they are given as the answer",
        'give another "matcher"',
    ),
    Planted(
        "held-out questions in training",
        _leak,
        {"data.leak": "error"},
        "3 of 10 held-out questions are trained on: line 1 is line 13 of",
        "take these lines out",
    ),
    Planted(
        "held-out files of one name",
        _same_names,
        {"data.names": "warning"},
        "2 files of held-out questions are named heldout: one data set to an evaluation",
        "name them apart",
    ),
    Planted(
        "weights of zeros",
        _zero,
        {"checkpoint.weights": "error"},
        "tensors are all zeros",
        "go back to a checkpoint before it",
    ),
    Planted(
        "replies that are cut",
        _stage("rl", max_completion_length=8),
        {"recipe.cut": "error"},
        "24 of 24 replies are longer than max_completion_length 8 of rl",
        "rl: max_completion_length: ",
    ),
    Planted(
        "16-bit weights at a small rate",
        _stage("mpo", dtype="bfloat16"),
        {"recipe.rounding": "error"},
        "mpo trains bfloat16 weights at a rate of 1e-05",
        "dtype: float32 beside bf16: true",
    ),
    Planted(
        "pixels normalised otherwise",
        _pixels,
        {"checkpoint.pixels": "error"},
        "image_mean is [0.5, 0.5, 0.5]",
        '"image_mean": [0.485, 0.456, 0.406]',
    ),
    Planted(
        "another number of tokens a tile",
        _tile_tokens,
        {"checkpoint.tiles": "error"},
        "a tile of 56 px makes 4 tokens, and image_seq_length of the processor is 16",
        "image_seq_length: 4",
    ),
    Planted(
        "V2PE with vLLM",
        _v2pe,
        {"checkpoint.v2pe": "error"},
        "position_step is 0.25 (V2PE)",
        "backend: transformers",
    ),
    Planted(
        "ids twice",
        _same_ids,
        {"data.ids": "error"},
        "3 of 12 ids are there before: '1' in lines 1 and 2",
        "give each question an id of its own",
    ),
    Planted(
        "images gone",
        _gray_images_gone,
        {"data.images": "error"},
        "no such image",
        "image_root says where they start",
    ),
    Planted(
        "too many placeholders",
        _placeholders,
        {"data.placeholders": "error"},
        "placeholders and images differ in number",
        'write one "<image>" in the question for each image',
    ),
    Planted(
        "the published layout",
        _chat_layout,
        {"checkpoint.layout": "error"},
        "the published custom-code layout (InternVLChatModel)",
        "internvl convert",
    ),
    Planted(
        "a file that is not there",
        _missing_file,
        {"recipe.inputs": "error"},
        "heldout.jsonl is not there (stages.sft.evaluate.questions, mpo.evaluate.questions",
        "put it there",
    ),
]
