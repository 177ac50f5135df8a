"""The ablation's recipe: what makes its arms comparable, asked of the file that is shipped."""

from __future__ import annotations

from pathlib import Path

from cascade.plan import plan
from cascade.recipe import load_recipe

FILE = Path(__file__).parent.parent / "examples" / "demo" / "ablation.yaml"
ONLINE = ("num_generations", "steps_per_generation", "per_device_train_batch_size", "freeze_vit")


def test_all_arms_start_from_one_checkpoint_and_count_from_it() -> None:
    recipe = load_recipe(FILE)
    assert [*recipe.arms] == ["sft", "sft_more", "mpo", "gspo", "cascade"]
    assert recipe.stages["gspo_fresh"].optional
    assert recipe.compute_from == "sft" and len(recipe.seeds) >= 5
    start = {name: recipe.stages[name].model for name in ("pairs", "pairs_more", "warm")}
    others = ("mpo", "sft_more", "gspo", "gspo_fresh")
    start |= {name: recipe.stages[name].model for name in others}
    assert {str(place and place.stage) for place in start.values()} == {"sft"}
    cascade = recipe.stages["cascade"].model
    assert cascade is not None and cascade.stage == "warm"
    data = {name: recipe.stages[name].data for name in ("warm", "mpo", "sft_more")}
    assert data == {"warm": "pairs", "mpo": "pairs_more", "sft_more": "pairs_more"}


def test_gspo_alone_is_built_as_the_cascades_and_the_fresh_one_differs() -> None:
    recipe = load_recipe(FILE)
    options = {name: recipe.stages[name].options for name in ("gspo", "cascade", "gspo_fresh")}
    alone = {key: value for key, value in options["gspo"].items() if key != "max_steps"}
    assert alone == {key: v for key, v in options["cascade"].items() if key != "max_steps"}
    assert [options["gspo"][key] for key in ONLINE] == [16, 16, 8, True]
    assert [options["gspo_fresh"][key] for key in ONLINE] == [8, 2, 16, False]
    assert recipe.stages["sft_more"].options["loss_weights"] == [0.0, 0.0, 1.0]


def test_no_process_of_an_arm_is_without_its_start(tmp_path: Path) -> None:
    """A start that is not taken off would make the arm with more processes look dearer."""
    recipe = load_recipe(FILE)
    stages = plan(recipe, tmp_path, recipe.seeds[0])
    kinds = {stage.kind for stage in stages} - {"evaluate", "world"}
    assert kinds == set(recipe.start_seconds)
    assert all(seconds > 0 for seconds in recipe.start_seconds.values())
