"""Recipes: what is read, and the processes that come of it."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import pytest
from recipe_cases import CASCADE, TOP, changed, processes, read

from cascade.plan import LAUNCH, ON_OFF, REPEATED, plan
from cascade.recipe import TOP_KEYS, Gate, Place, load_recipe
from cascade.recipe_stage import COMMAND_PATHS, KINDS, OUTPUT_PATHS, TRAINING_PATHS
from internvl.errors import UserError


def test_what_a_recipe_says(tmp_path: Path) -> None:
    recipe = read(tmp_path, **TOP, seed=5)
    assert (recipe.name, recipe.seeds, recipe.many, recipe.parallel) == ("r", (5,), False, 1)
    assert recipe.report == ("sft", "mpo", "rl")
    mpo = recipe.stages["mpo"]
    assert mpo.model == Place(Path(), "sft")
    assert mpo.options == {"max_tiles": 6}  # its own, after the common one
    assert mpo.gate == Gate("sampled", 0.02, "sft")
    assert mpo.evaluate == {"image-root": Place(tmp_path / "images"), "samples": 3}
    assert mpo.evaluate_questions == (Place(tmp_path / "heldout.jsonl"),)
    # base is not evaluated, so there is nothing that sft could fall behind
    assert recipe.stages["sft"].gate is None
    assert recipe.stages["base"].evaluate is None
    assert recipe.stages["pairs"].sections == {
        "sample": {"n": 8, "max-tokens": 40},
        "verify": {},
        "pair": {},
        "dropout": None,
        "check": None,
    }


def test_the_processes_of_the_cascade(tmp_path: Path) -> None:
    """Each stage starts from the result of the one that it names; MPO's model is its reference."""
    made = processes(tmp_path, **TOP)
    assert [*made] == [
        *("base", "sft", "evaluate.sft", "pairs.sample", "pairs.verify", "pairs"),
        *("mpo", "evaluate.mpo", "select.sample", "select.verify", "select", "rl", "evaluate.rl"),
    ]
    said = {name: " ".join(one.command) for name, one in made.items()}
    root = str(tmp_path)
    assert said["base"] == f"-m internvl convert {root}/InternVL3-1B run/stages/base --to hf"
    launched = f"-m accelerate.commands.launch {' '.join(LAUNCH)} -m mpo --config"
    assert said["mpo"] == f"{launched} run/configs/mpo.yaml"
    assert made["mpo"].config == {
        "model_name_or_path": "run/stages/sft",
        "output_dir": "run/stages/mpo",
        "seed": 3,
        "train_file": "run/stages/pairs/meta.json",
        "max_tiles": 6,
    }
    assert made["rl"].config == {
        "model_name_or_path": "run/stages/mpo",
        "output_dir": "run/stages/rl",
        "seed": 3,
        "train_file": "run/stages/select/questions.jsonl",
        "image_root": root,  # where the questions' image paths start
        "sampler": "auto",
        "max_tiles": 12,
    }
    assert said["select.sample"] == (
        f"-m mmpr sample {root}/rl.jsonl --model run/stages/mpo --output "
        "run/stages/select/rollouts.jsonl --seed 3 --backend auto --n 4 --max-tokens 40"
    )
    assert said["select"] == (
        "-m mmpr select run/stages/select/verdicts.jsonl --output "
        "run/stages/select/questions.jsonl --min-accuracy 0.1"
    )
    assert said["evaluate.rl"] == (
        f"-m cascade evaluate {root}/heldout.jsonl --model run/stages/rl --output run/eval/rl "
        f"--seed 3 --backend auto --image-root {root}/images --samples 3"
    )
    # behind everything else an evaluation need not hide
    assert [one.name for one in made.values() if one.background] == ["evaluate.sft", "evaluate.mpo"]
    assert made["mpo"].needs == ("pairs", "sft")
    assert made["pairs.sample"].inputs == (tmp_path / "train.jsonl",)
    assert made["evaluate.mpo"].inputs == (tmp_path / "heldout.jsonl",)  # no folder of images


def test_lora_results_are_made_whole(tmp_path: Path) -> None:
    """What follows an adapter reads whole weights; `.adapter` trains the adapter on."""
    lora = {"use_peft": True, "lora_r": 8}
    stages = changed(sft=lora, mpo={"use_peft": True, "model": "sft.adapter"}, rl={"model": "mpo"})
    made = processes(tmp_path, stages, evaluate={"questions": "q.jsonl"})
    merged = ["internvl", "merge", "run/stages/sft", "run/stages/sft.merged"]
    assert made["sft.merge"].command == ["-m", *merged, "--base", "run/stages/base"]
    assert "run/stages/sft.merged" in made["evaluate.sft"].command
    assert "run/stages/sft.merged" in made["pairs.sample"].command
    assert made["pairs.sample"].needs == ("sft.merge",)
    config = made["mpo"].config
    assert config is not None
    assert config["model_name_or_path"] == "run/stages/sft"
    assert made["mpo"].needs == ("pairs", "sft")
    assert made["mpo.merge"].command[-2:] == ["--base", "run/stages/base"]
    config = made["rl"].config
    assert config is not None
    assert config["model_name_or_path"] == "run/stages/mpo.merged"

    for wrong, told in [
        ({"model": "sft.adapter"}, "stages.mpo.model is 'sft.adapter'; use_peft is not set"),
        (
            {"model": "sft.adapter", **lora},
            "stages.mpo.lora_r is 8; an adapter is trained on with settings of its own, leave it "
            "out",
        ),
        (
            {"model": "base.adapter"},
            "stages.mpo.model is 'base.adapter'; stage base trains no adapter (use_peft)",
        ),
    ]:
        with pytest.raises(UserError) as error:
            read(tmp_path, changed(sft=lora, mpo=wrong))
        assert str(error.value) == f"{tmp_path}/r.yaml: {told}"


def test_pairs_without_answers_and_from_one_sampling(tmp_path: Path) -> None:
    """Dropout-NTP needs no verdicts; a second set is made of the same rollouts."""
    stages = changed(
        pairs={
            "verify": False,
            "pair": False,
            "dropout": {"start_ratio": 0.4, "filter-by-likelihood": True},
            "check": {"max-length": 512},
            "name": "own",
        },
    )
    made = processes(tmp_path, stages)
    names = [name for name in made if name.startswith("pairs")]
    assert names == ["pairs.sample", "pairs.dropout", "pairs.check"]
    folder = "run/stages/pairs"
    assert made["pairs.dropout"].command[1:] == [
        *("mmpr", "dropout", f"{folder}/rollouts.jsonl", "--model", "run/stages/sft"),
        *("--output", f"{folder}/dropout.jsonl", "--backend", "auto", "--seed", "3"),
        *("--meta", f"{folder}/meta.json", "--name", "own_dropout", "--image-root", str(tmp_path)),
        *("--start-ratio", "0.4", "--filter-by-likelihood"),
    ]
    assert made["pairs.check"].command[1:] == [
        *("mmpr", "check", f"{folder}/meta.json", "--model", "run/stages/sft"),
        *("--max-length", "512"),
    ]
    assert made["mpo"].needs == ("pairs.check", "sft")

    both = changed(
        more={"kind": "pairs", "data": "pairs", "pair": {"format-negatives": False}},
        select={"data": "pairs", "model": None, "questions": None},
    )
    order = ["base", "sft", "pairs", "more", "mpo", "select", "rl"]
    made = processes(tmp_path, {name: both[name] for name in order})
    assert [n for n in made if "sample" in n or "verify" in n] == ["pairs.sample", "pairs.verify"]
    for name in ("more", "select"):
        assert made[name].command[3] == f"{folder}/verdicts.jsonl"
        assert made[name].needs == ("pairs.verify",)
    assert made["more"].command[-2:] == ["--format-negatives", "off"]


def test_each_file_of_a_shared_folder_has_one_owner(tmp_path: Path) -> None:
    """Pairs that are made anew leave the rollouts, and begin a meta.json of their own."""
    stages = changed(pairs={"dropout": {}})
    made = processes(tmp_path, stages)
    assert made["pairs.sample"].owns is None  # the first empties the folder
    owned = {name: {path.name for path in one.owns or ()} for name, one in made.items() if one.owns}
    sides = (".stats.json", ".quarantine.jsonl")
    assert owned["pairs"] == {"meta.json", "pairs.jsonl", *(f"pairs.jsonl{s}" for s in sides)} | {
        f"meta.json{s}" for s in sides
    }
    assert "dropout.jsonl.continuations.jsonl" in owned["pairs.dropout"]
    assert "meta.json" not in owned["pairs.dropout"]
    keys = dict.fromkeys(made["pairs"].needs, "k")
    plain = processes(tmp_path)["pairs"]
    assert plain.key(Path("run"), keys) != made["pairs"].key(Path("run"), keys)


def test_the_launcher(tmp_path: Path) -> None:
    def launched(**launch: Any) -> list[str]:
        command = processes(tmp_path, changed(sft={"launch": launch}))["sft"].command
        return command[2 : command.index("-m", 2)]

    assert launched() == LAUNCH
    single = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    assert launched(num_processes=4) == ["--quiet", *single, "--multi_gpu", "--num_processes", "4"]
    assert launched(num_processes=2, cpu=True) == [
        *("--quiet", *single, "--num_processes", "2", "--cpu")
    ]
    file = str(tmp_path / "fsdp2.yaml")
    assert launched(config_file="fsdp2.yaml") == ["--quiet", "--config_file", file]


def test_paths(tmp_path: Path) -> None:
    """An earlier stage's name in front is its folder; ./ is always beside the recipe."""
    world = {"kind": "world", "sft": 6, "careless_share": 0.7}
    stages = {
        "world": world,
        "sft": {"kind": "sft", "model": "world/model", "train_file": ["world/sft.jsonl", "/a/b"]},
        "more": {"kind": "sft", "model": "sft/checkpoint-4", "train_file": "./world/sft.jsonl"},
    }
    made = processes(tmp_path, stages)
    assert made["world"].command[-4:] == ["--sft", "6", "--careless-share", "0.7"]
    assert made["world"].folder == Path("run/world")
    config = made["sft"].config
    assert config is not None
    assert config["model_name_or_path"] == "run/world/model"
    assert config["train_file"] == ["run/world/sft.jsonl", "/a/b"]
    assert (made["sft"].needs, made["sft"].inputs) == (("world",), (Path("/a/b"),))
    config = made["more"].config
    assert config is not None
    assert config["model_name_or_path"] == "run/stages/sft/checkpoint-4"
    assert made["more"].inputs == (tmp_path / "world" / "sft.jsonl",)


def test_gates(tmp_path: Path) -> None:
    evaluated = {"evaluate": {"questions": "q.jsonl"}}
    stages = changed(
        base={"evaluate": True}, mpo={"gate": False}, rl={"gate": {"max_drop": "1e-3"}}
    )
    recipe = read(tmp_path, stages, **evaluated, gate={"metric": "greedy"})
    assert recipe.stages["sft"].gate == Gate("greedy", 0.02, "base")
    assert recipe.stages["mpo"].gate is None
    assert recipe.stages["rl"].gate == Gate("greedy", 0.001, "mpo")
    against = read(tmp_path, changed(rl={"gate": {"against": "sft"}}), **evaluated)
    assert against.stages["rl"].gate == Gate("sampled", 0.02, "sft")


def test_optional_stages(tmp_path: Path) -> None:
    control = {"kind": "mpo", "model": "sft", "data": "pairs", "optional": True}
    recipe = read(tmp_path, {**CASCADE, "control": control}, **TOP)
    assert "control" not in {one.stage for one in plan(recipe, Path("run"), 0)}
    made = plan(recipe, Path("run"), 0, extra=("control",))
    assert [one.name for one in made][-2:] == ["control", "evaluate.control"]
    assert recipe.report == ("sft", "mpo", "rl")
    with pytest.raises(UserError) as error:
        plan(recipe, Path("run"), 0, extra=("contrl",))
    told = f"{tmp_path}/r.yaml: --with contrl: its optional stages are: control"
    assert str(error.value) == told
    after = {**CASCADE, "control": control, "last": {**CASCADE["rl"], "model": "control"}}
    with pytest.raises(UserError, match=r"stages\.last needs control, which is optional: add --w"):
        plan(read(tmp_path, after), Path("run"), 0)


def test_the_options_that_the_commands_have() -> None:
    """The recipe knows of each command's options which are paths, lists and on/off words."""
    import argparse

    from cascade.cli import build_parser as cascade
    from internvl.cli import build_parser as internvl
    from mmpr.cli import build_parser as mmpr
    from mpo.config import MPOConfig
    from rl.config import RLConfig
    from sft.config import SFTConfig

    def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        (sub,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        return dict(sub.choices)

    used = {"sample", "verify", "pair", "dropout", "check", "select", "evaluate", "convert"}
    used |= {"merge", "world"}
    said = {"output", "quarantine", "meta", "fix"}  # by the run itself
    seen = set()
    for parser in (cascade(), mmpr(), internvl()):
        for name in used & commands(parser).keys():
            seen.add(name)
            for action in commands(parser)[name]._actions:
                key = action.option_strings[-1].removeprefix("--") if action.option_strings else ""
                if not key or key in said:
                    continue
                is_path = action.type is Path or key == "judge-cache"
                assert is_path == (key in COMMAND_PATHS), (name, key)
                repeated = isinstance(action, argparse._AppendAction)
                assert repeated == (key in REPEATED), (name, key)
                on_off = action.choices is not None and {"on", "off"} == set(action.choices)
                assert on_off == (key in ON_OFF), (name, key)
    assert seen == used
    fields = {f.name for kind in (SFTConfig, MPOConfig, RLConfig) for f in dataclasses.fields(kind)}
    assert fields >= TRAINING_PATHS
    ends = ("_file", "_root", "_dir", "_cache", "_from")
    no_paths = {"output_dir", "logging_dir", "use_cache", "soft_punish_cache"}
    assert {name for name in fields if name.endswith(ends)} - no_paths <= TRAINING_PATHS
    assert set(OUTPUT_PATHS) <= TRAINING_PATHS | COMMAND_PATHS


def test_the_manual(tmp_path: Path) -> None:
    """Its recipe is one, and it tells every key and kind."""
    text = (Path(__file__).parent.parent / "docs" / "cascade.md").read_text(encoding="utf-8")
    block = text[text.index("    output: runs/mine") : text.index("`cascade/recipes/demo.yaml`")]
    file = tmp_path / "r.yaml"
    file.write_text(textwrap.dedent(block))
    recipe = load_recipe(file)
    assert [*recipe.stages] == ["base", "sft", "pairs", "mpo", "select", "rl"]
    assert recipe.stages["sft"].gate == Gate("sampled", 0.02, "base")
    for key in (*TOP_KEYS, *KINDS, "optional", "against", "name"):
        assert f"`{key}`" in text or f"`{key}:" in text or f" {key}" in text, key
