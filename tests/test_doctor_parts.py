"""cascade doctor's smaller checks, and what it takes for an option's default."""

from __future__ import annotations

import re
import resource
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from doctor_cases import RECIPE
from published import FAMILIES, make_published

from cascade.doctor import environment
from cascade.doctor.environment import Demand, check_disk, check_limits, check_versions
from cascade.doctor.facts import (
    DEFAULTS,
    EVALUATE_DEFAULTS,
    MPO_DEFAULTS,
    RL_DEFAULTS,
    SAMPLE_DEFAULTS,
    Facts,
    Launch,
)
from cascade.doctor.findings import Finding
from cascade.doctor.memory import Device, check_memory, moments
from cascade.doctor.starts import Checkpoints
from cascade.recipe import load_recipe
from internvl.errors import UserError
from internvl.info import count_parameters, read_config

VERSIONS = {"torch": "2.13.0+cpu", "vllm": "0.31.0", "peft": "0.22.0"}
WANTED = ["torch>=2.11,<2.14", "peft>=0.21,<1", 'vllm==0.31.0; extra == "vllm"']


def versions(installed: dict[str, str]) -> list[Finding]:
    return check_versions(installed.get, WANTED, {"torch": "2.13.0", "peft": "0.21.2"})


def test_versions_in_their_ranges() -> None:
    [found] = versions(VERSIONS)
    assert found.level == "ok"
    assert found.found == (
        "3 packages are in their ranges; other than tried: peft 0.22.0 (tried: 0.21.2)"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"torch": "2.14.0"}, "torch 2.14.0 is installed, and torch<2.14,>=2.11 is what"),
        ({"vllm": "0.30.1"}, "vllm 0.30.1 is installed, and vllm==0.31.0 is what"),
    ],
)
def test_versions_out_of_their_ranges(change: dict[str, str], told: str) -> None:
    [found] = versions({**VERSIONS, **change})
    assert (found.level, found.code) == ("error", "environment.versions")
    assert found.found.startswith(told)
    assert found.cure.startswith("pip install '")


def test_an_extra_may_be_absent_and_what_is_needed_may_not() -> None:
    assert [found.level for found in versions({"torch": "2.12", "peft": "0.21"})] == ["ok"]
    [found] = versions({"torch": "2.12"})
    assert found.found == "peft<1,>=0.21 is not installed"


def test_an_import_that_fails_is_told() -> None:
    [found] = environment.check_imports(["json", "no_such_package"])
    assert (found.level, found.code) == ("error", "environment.imports")
    assert "setup_env.py --cure-only" in found.cure


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    [found] = check_disk(tmp_path / "runs" / "mine", 2 * free)
    assert (found.level, found.where) == ("error", str(tmp_path))
    assert check_disk(tmp_path, free // 2)[0].level == "ok"


def test_limits_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    none = tmp_path / "none"  # no shared memory at all
    found = check_limits(Demand(workers=4, examples=256), shared=none)
    assert [(f.code, f.level) for f in found] == [
        ("environment.shm", "error"),
        ("environment.files", "error"),
        ("environment.cores", "warning"),
    ]
    assert found[1].found == (
        "about 2,304 open files are needed for the loaders' workers, 1,024 allowed"
    )
    assert [f.level for f in check_limits(Demand(examples=10_000), shared=none)] == ["ok"]


# ---------------------------------------------------------------- facts


def recipe_of(folder: Path, **changes: Any) -> Facts:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return Facts(load_recipe(file), folder / "scratch")


def test_what_a_stage_begins_with_is_followed_back(tmp_path: Path) -> None:
    facts = recipe_of(tmp_path)
    [start] = facts.starts()
    assert (start.folder, start.source) == (tmp_path / "model", None)
    stages = {"base": {"kind": "convert", "source": "InternVL3-1B"}, **RECIPE["stages"]}
    stages["sft"] = {**stages["sft"], "model": "base"}
    [start] = recipe_of(tmp_path, stages=stages).starts()
    assert start.source == tmp_path / "InternVL3-1B"
    assert start.folder == tmp_path / "scratch" / "base"


def test_each_file_is_looked_at_once(tmp_path: Path) -> None:
    files = {file.path.name: file for file in recipe_of(tmp_path).files()}
    assert set(files) == {"sft.jsonl", "preference.jsonl", "rl.jsonl", "heldout.jsonl"}
    assert files["heldout.jsonl"].stages == ("evaluate.sft", "evaluate.mpo", "evaluate.rl")
    trained = {name for name, file in files.items() if file.trained}
    assert trained == {"sft.jsonl", "preference.jsonl", "rl.jsonl"}
    assert files["preference.jsonl"].answers
    assert not files["sft.jsonl"].answers


def test_processes_of_a_launch(tmp_path: Path) -> None:
    (tmp_path / "fsdp.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 16\nnum_machines: 2\n"
    )
    facts = recipe_of(tmp_path, launch={"config_file": "fsdp.yaml"})
    assert facts.launch(facts.stages["mpo"]) == Launch(16, 8, sharded=True)
    facts = recipe_of(tmp_path, launch={"num_processes": 4})
    assert facts.launch(facts.stages["mpo"]) == Launch(4, 4)


@pytest.mark.parametrize(
    ("top", "told"),
    [
        ({"common": {"max_tiles": "twelve"}}, "stages.sft.max_tiles is 'twelve'; give a number"),
        ({"common": {"learning_rate": "fast"}}, "stages.sft.learning_rate is 'fast'; give a num"),
        ({"sample": {"n": "many"}}, "stages.pairs.sample.n is 'many'; give a number"),
        ({"evaluate": {"questions": "q", "samples": None}}, "stages.sft.evaluate.samples is None"),
        ({"launch": {"num_processes": "two"}}, "stages.sft.launch.num_processes is 'two'; give a "),
    ],
)
def test_what_is_no_number(top: dict[str, Any], told: str, tmp_path: Path) -> None:
    """The recipe is told, in one line, and not Python's own words."""
    file = tmp_path / "r.yaml"
    stages = {
        "sft": {"kind": "sft", "model": "m", "train_file": "x"},
        "pairs": {"kind": "pairs", "model": "m", "questions": "q"},
    }
    file.write_text(yaml.safe_dump({"stages": stages, **top}, sort_keys=False))
    facts = Facts(load_recipe(file), tmp_path)
    sft, pairs = facts.stages.values()
    with pytest.raises(UserError, match=re.escape(f"{file}: {told}")):
        for name in ("max_tiles", "learning_rate"):
            facts.option(sft, name)
        facts.sampling(pairs), facts.evaluation(sft), facts.launch(sft)
    file.write_text(yaml.safe_dump({"stages": stages, "common": {"learning_rate": "1e-5"}}))
    facts = Facts(load_recipe(file), tmp_path)
    assert facts.option(facts.stages["sft"], "learning_rate") == 1e-5


def test_the_defaults_are_those_of_the_commands() -> None:
    from cascade.cli import build_parser as cascade_parser
    from mmpr.cli import build_parser as mmpr_parser
    from mpo.config import MPOConfig
    from rl.config import RLConfig
    from sft.config import SFTConfig
    from training.cli import ModelArguments

    model = ModelArguments(model_name_or_path="ckpt")
    rl = RLConfig(output_dir="x", train_file="x", max_steps=1)
    mpo = MPOConfig(output_dir="x", train_file="x")
    for args in (SFTConfig(output_dir="x", train_file="x"), mpo, rl):
        own_defaults = RL_DEFAULTS if args is rl else MPO_DEFAULTS if args is mpo else {}
        stated = {**DEFAULTS, **own_defaults}
        own = {field.name for field in fields(args)}
        for name, default in stated.items():
            if name == "max_steps" and args is rl:
                continue  # it has none
            holder = args if name in own else model
            if name in own or hasattr(model, name):
                assert getattr(holder, name) == default, name
    parsed = [
        (mmpr_parser(), ["sample", "q", "--model", "m", "--output", "o"], SAMPLE_DEFAULTS),
        (cascade_parser(), ["evaluate", "q", "--model", "m", "--output", "o"], EVALUATE_DEFAULTS),
    ]
    for parser, words, defaults in parsed:
        args = parser.parse_args(words)
        assert {name: vars(args)[name.replace("-", "_")] for name in defaults} == defaults


def test_memory_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    facts = recipe_of(tmp_path)
    config, parameters = read_config(tiny_model)[0], count_parameters(tiny_model)[0]
    mpo = facts.stages["mpo"]

    def level(total: int, free: int) -> str:
        [found] = check_memory(facts, mpo, config, parameters, Device(total, free, gpu=False))
        assert found.where == "stages.mpo"
        return found.level

    assert level(2**34, 2**33) == "ok"
    assert level(2**34, 2**20) == "warning"  # for now something else has it
    assert level(2**22, 2**22) == "error"  # weights, gradients and optimizer alone are more
    assert (moments("adamw_torch_fused"), moments("adamw_8bit"), moments("sgd")) == (8, 2, 0)


def test_every_code_is_explained() -> None:
    root = Path(__file__).resolve().parent.parent
    groups = ("environment", "recipe", "data", "checkpoint", "memory", "engine", "mpo", "hours")
    code = re.compile(rf'"((?:{"|".join(groups)})\.[a-z0-9-]+)"')
    used = {
        found
        for file in (root / "cascade" / "doctor").glob("*.py")
        for found in code.findall(file.read_text(encoding="utf-8"))
    }
    explained = set(
        re.findall(r"\*\*([a-z]+\.[a-z0-9-]+)\*\*", (root / "docs/doctor.md").read_text())
    )
    assert explained == used


# ---------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize(
    "family",
    ["qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "qwen3")],
)
def test_a_published_checkpoint_is_brought_in_and_sound(tmp_path: Path, family: str) -> None:
    """Of every published family: its template, tokens, tiles and pixels are no fault."""
    make_published(tmp_path / "published", family)
    (tmp_path / "scratch").mkdir()
    stages = {"base": {"kind": "convert", "source": "published"}, **RECIPE["stages"]}
    stages["sft"] = {**stages["sft"], "model": "base"}
    facts = recipe_of(tmp_path, stages=stages, backend="transformers")
    checkpoints = Checkpoints(facts, quick=False, say=lambda what: None)
    findings = checkpoints.check()
    assert [finding for finding in findings if finding.level != "ok"] == []
    assert checkpoints.main == tmp_path / "scratch" / "base"
    quick = Checkpoints(facts, quick=True, say=lambda what: None)
    [found] = quick.check()
    assert found.found.endswith("looked at no further (--quick)")
    assert quick.main is None
