"""What is refused in a recipe, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_cases import TOP, changed, read

from cascade.recipe import load_recipe
from cascade.recipe_stage import Place
from internvl.errors import UserError

EVALUATED = {"evaluate": {"questions": "q"}}
WRONG = [
    ({"stage": {}}, {}, "unknown key 'stage'; did you mean 'stages'?"),
    ({"gates": {}}, {}, "unknown key 'gates'; did you mean 'gate'?"),
    ({"seed": "x"}, {}, "seed is 'x'; give a whole number"),
    ({"seeds": [1, 1]}, {}, "seeds is [1, 1]; give a list of whole numbers, 0 or "
        "more, each once"),
    ({"seed": 1, "seeds": [1]}, {}, "seed is 1; seeds are given, too; give one of the two"),
    ({"parallel": 2}, {}, "parallel is 2; it needs seeds: [0, 1, ...]"),
    ({"backend": "vlm"}, {}, "backend is 'vlm'; did you mean 'vllm'?"),
    ({"overlap": "yes"}, {}, "overlap is 'yes'; give auto, true or false"),
    ({"common": [1]}, {}, "common is [1]; expected entries like 'key: value'"),
    (
        {"arms": {"all": "r"}, "seeds": [1], **TOP},
        {},
        "arms.all is 'r'; it is an evaluated stage; did you mean 'rl'?",
    ),
    (
        {"arms": {"all": "rl"}, "compute_from": "stf", "seeds": [1], **TOP},
        {},
        "compute_from is 'stf'; it is an arm or a stage; did you mean 'sft'?",
    ),
    ({"compute_from": "sft"}, {}, "compute_from is 'sft'; it needs arms"),
    (
        {"report": ["base"], **TOP},
        {},
        "report is 'base'; evaluated stages; there are: sft, mpo, rl",
    ),
    (
        {},
        {"rl": {"kind": "gspo"}},
        "stages.rl.kind is 'gspo'; there are: world, convert, merge, sft, mpo, rl, pairs, select, "
        "evaluate",
    ),
    ({}, {"rl": {"kind": None}}, "stages.rl: kind is missing, one of world, convert, merge, sft, "),
    ({}, {"mpo": {"data": "pair"}}, "stages.mpo.data is 'pair'; it is an earlier stage of kind "
        "pairs; did you mean 'pairs'?"),
    ({}, {"mpo": {"model": "rl"}}, "stages.mpo.model is 'rl'; stage rl does not come before mpo"),
    ({}, {"mpo": {"model": "pairs"}}, "stages.mpo.model is 'pairs'; it is a stage that makes a "
        "model; there are: base, sft"),
    ({}, {"mpo": {"model": None}}, "stages.mpo: model is missing: a stage or a folder"),
    ({}, {"mpo": {"train_file": "x"}}, "stages.mpo.data is 'pairs'; train_file is given, too; "
        "give one of the two"),
    ({}, {"mpo": {"output_dir": "x"}}, "stages.mpo.output_dir is 'x'; a run says it itself, by "
        "output, at the top"),
    ({}, {"sft": {"data": "base"}}, "stages.sft.data is 'base'; sft takes no data"),
    ({}, {"pairs": {"questions": None}}, "stages.pairs: questions is missing: a file of questions"),
    ({}, {"pairs": {"pair": False}}, "stages.pairs: pair and dropout are both off: no pairs"),
    ({}, {"pairs": {"verify": False}}, "stages.pairs.verify is False; pair reads verdicts; set "
        "pair: false, too"),
    ({}, {"pairs": {"sampel": {}}}, "stages.pairs: unknown key 'sampel'; did you mean 'sample'?"),
    ({}, {"mpo": {"gate": {"max_drop": -1}}, }, "stages.mpo.gate is {'max_drop': -1}; the stage is "
        "not evaluated"),
    ({"gate": {"max_drop": "x"}, "evaluate": {"questions": "q"}}, {}, "stages.mpo.gate.max_drop is "
        "'x'; give a number, 0 or more"),
    ({"evaluate": {"questions": "q"}}, {"sft": {"gate": {}, }}, "stages.sft.gate is {}; the model "
        "that it starts from is not evaluated"),
    ({"evaluate": {"samples": 1}}, {}, "stages.sft.evaluate: questions is missing"),
    ({"gate": {"metric": "smapled"}, **EVALUATED}, {}, "stages.mpo.gate.metric is 'smapled'; did "
        "you mean 'sampled'?"),
    ({"gate": {"metric": "pass@4"}, **EVALUATED}, {}, "stages.mpo.gate.metric is 'pass@4'; did you "
        "mean 'pass@"),
    ({"gate": {"max_drop": 0.1}}, {}, "gate is {'max_drop': 0.1}; no stage has one: it is for "),
    ({"arms": {"all": "rl"}, **EVALUATED}, {}, "arms is {'all': 'rl'}; they need seeds: [0, 1, "),
    ({"start_seconds": {"gspo": 3}}, {}, "start_seconds.gspo is 3; kinds of processes are: "),
    ({"environment": {"A": None}}, {}, "environment.A is None; give a text or a number"),
    ({}, {"pairs": {"questions": []}}, "stages.pairs.questions is []; give at least one file"),
    ({}, {"Rl": {"kind": "rl"}}, "stages: 'Rl' is no name for a stage: small letters, digits, - "),
    ({}, {"logs": {"kind": "rl"}}, "stages: 'logs' is no name for a stage"),
    ({}, {"pairs": {"sample": False}}, "stages.pairs.sample is False; data: STAGE takes the "),
    ({}, {"select": {"sample": False}}, "stages.select.sample is False; data: STAGE takes the "),
    ({}, {"select": {"verify": False}}, "stages.select.verify is False; select reads verdicts"),
    ({}, {"pairs": {"verify": False, "pair": False, "dropout": {}}, "select": {"data": "pairs",
        "model": None, "questions": None}}, "stages.select.data is 'pairs'; stages.pairs has "
        "verify: false, but select reads verdicts"),
    ({}, {"select": {"data": "pairs", "model": None, "questions": None, "verify": {}}},
        "stages.select.verify is {}; data is given: it is said in stages.pairs, leave it out"),
    ({}, {"select": {"data": "pairs", "model": None, "questions": None, "image_root": "x"}},
        "stages.select.image_root is 'x'; data is given: it is said in stages.pairs, leave it out"),
    ({"common": {"bf16": True, "max_steps": 2, "max-steps": 3}}, {}, "common.max-steps is 3; it "
        "stands there in another spelling, too"),
    ({"sample": {"max-tokens": 2, "max_tokens": 3}}, {}, "sample.max_tokens is 3; it stands "),
    ({}, {"mpo": {"max-steps": 2, "max_steps": 3}}, "stages.mpo.max_steps is 3; it stands "),
]  # fmt: skip


@pytest.mark.parametrize(("top", "stages", "told"), WRONG, ids=[told[:40] for *_, told in WRONG])
def test_what_is_refused(
    top: dict[str, Any], stages: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, changed(**stages), **top)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/r.yaml: {told}")
    assert "\n" not in said


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    """YAML would take the second `mpo` for the first, without a word."""
    file = tmp_path / "r.yaml"
    file.write_text("stages:\n  mpo: {kind: mpo}\n  mpo: {kind: rl}\n")
    with pytest.raises(UserError, match=r"r\.yaml: cannot be read: 'mpo' stands there twice"):
        load_recipe(file)
    file.write_text("stages:\n  a: &a {kind: convert, source: x}\n  b: {<<: *a, source: y}\n")
    assert load_recipe(file).stages["b"].model == Place(tmp_path / "y")
    file.write_text("- a\n")
    with pytest.raises(UserError, match=r"r\.yaml: expected entries like 'stages: \.\.\.'"):
        load_recipe(file)
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_recipe(tmp_path / "none.yaml")
