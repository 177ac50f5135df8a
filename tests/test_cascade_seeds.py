"""`cascade run` of a recipe with seeds: what is begun anew, and where a seed's run lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from play_runs import ALL, RECIPE, Play, ended, play

from cascade.cli import main
from cascade.recipe import Recipe
from cascade.run import RunOptions

__all__ = ["play"]  # a fixture
SEEDS = {**RECIPE, "seeds": [4, 7]}


def test_from_is_handed_once_to_each_seed(
    play: Play, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed that ended well keeps what it made, while the other one begins anew once more."""
    asked: list[tuple[int, str | None]] = []
    fails: set[int] = set()

    def command(recipe: Recipe, folder: Path, seed: int, options: RunOptions) -> list[str]:
        asked.append((seed, options.start))
        return ["-c", f"raise SystemExit({9 if seed in fails else 0})"]

    def starts(*words: str) -> list[tuple[int, str | None]]:
        asked.clear()
        if fails:
            ended(2, lambda: play.run(*words, recipe=SEEDS), capsys)
        else:
            play.run(*words, recipe=SEEDS)
        return [*asked]

    monkeypatch.setattr("cascade.seeds.seed_command", command)
    monkeypatch.setattr("cascade.report.write_report", lambda output, many: output)
    assert starts() == [(4, None), (7, None)]
    fails.add(7)
    assert starts("--from=mpo") == [(4, "mpo"), (7, "mpo")]
    assert starts("--from=mpo") == [(4, None), (7, "mpo")]
    assert starts("--from=sft") == [(4, "sft"), (7, "sft")]  # another one
    fails.clear()
    assert starts() == [(4, None), (7, None)]  # ends well without it, too
    assert not (play.folder / "anew.json").exists()
    assert starts("--from=sft") == [(4, "sft"), (7, "sft")]


def test_one_seed_of_a_recipe_with_seeds_has_its_own_folder(play: Play) -> None:
    play.write({**SEEDS, "output": str(play.folder)})
    main(["run", str(play.root / "r.yaml"), "--seed=7"])
    manifest = json.loads((play.folder / "seed-7" / "manifest.json").read_text())
    assert (manifest["seed"], len(manifest["stages"])) == (7, len(ALL))
    assert not (play.folder / "manifest.json").exists()


@pytest.mark.parametrize("output", [".", "../run"])
def test_the_run_s_own_folder_may_be_where_it_is_started(
    output: str, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play.run()
    assert play.calls() == ALL
    monkeypatch.chdir(play.folder)
    main(["run", "../r.yaml", f"--output={output}"])
    assert play.calls() == []


def test_seeds_are_no_less_than_0(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"seed": -1}, "seed is -1; give a whole number, 0 or more"),
        ({"seeds": [-1]}, "seeds is [-1]; give a list of whole numbers, 0 or more, each once"),
    ]
    for keys, told in wrong:
        said = ended(2, lambda keys=keys: play.run(recipe={**RECIPE, **keys}), capsys)  # type: ignore[misc]
        assert said == f"error: {play.root}/r.yaml: {told}\n"
