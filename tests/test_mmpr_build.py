"""mmpr build: all commands from one recipe; killed anywhere, the files come out the same."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from build_runs import FORMULAS, SAMPLES, BuildRun
from PIL import Image

from internvl.data import write_jsonl
from mmpr import cli

QUESTIONS = 32
RECIPE = {
    "questions": "questions.jsonl",
    "model": "model",
    "output": "out",
    "name": "formulas",
    "seed": 7,
    "sample": {"n": SAMPLES, "batch-questions": 4, "max-tokens": 16},
    "verify": {"workers": 1},
    "pair": {"max-pairs-per-question": 2, "format-negatives": "on"},
    "select": {"min-accuracy": 0.1, "max-accuracy": 0.9},
}


def make_folder(
    folder: Path, checkpoint: Path, *, matcher: str | None = "exact", **changes: Any
) -> Path:
    """Questions (two of them bad), and a recipe; its path. matcher: None for no gold answers."""
    folder.mkdir()
    (folder / "model").symlink_to(checkpoint)
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    rows: list[dict[str, Any]] = [
        {
            "id": f"q{i}",
            "image": "a.png",
            "question": "<image>\nWhat is it?",
            **({} if matcher is None else {"answer": FORMULAS[i % 4], "matcher": matcher}),
        }
        for i in range(QUESTIONS)
    ]
    rows[5]["image"] = "missing.png"
    rows[9]["matcher"] = "psychic"
    write_jsonl(folder / "questions.jsonl", rows)
    recipe = folder / "build.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return recipe


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def without_folder(built: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """Files with the names of their own folder taken out: quarantine and build.json tell paths."""
    name = str(folder).encode()
    return {path: text.replace(name, b"") for path, text in built.items()}


def uninterrupted(
    tmp_path: Path, model: Path, pause: float | None, matcher: str, **changes: Any
) -> tuple[dict[str, bytes], float]:
    """The files of a build that nothing stopped, and the seconds that it took."""
    recipe = make_folder(tmp_path / "whole", model, matcher=matcher, **changes)
    run = BuildRun(recipe, pause)
    run.start(0.0)  # the fork server's own start is not timed
    start = time.monotonic()
    code, told = run.start()
    assert code == 0, told
    out = tmp_path / "whole"
    return without_folder(files(out / "out"), out), time.monotonic() - start


def kill_and_go_on(
    tmp_path: Path,
    model: Path,
    kills: int,
    seed: int,
    *,
    pause: float | None = 0.02,
    matcher: str = "exact",
    **changes: Any,
) -> None:
    whole, seconds = uninterrupted(tmp_path, model, pause, matcher, **changes)
    folder = tmp_path / "killed"
    run = BuildRun(make_folder(folder, model, matcher=matcher, **changes), pause)
    rng = random.Random(seed)
    least, most = (0.05, 0.6) if pause is not None else (0.2, 0.95)  # a model is loaded first
    for _ in range(kills):
        code, told = run.start(rng.uniform(least, most) * seconds)
        assert code in (-9, 0), told
    code, told = run.start()
    assert code == 0, told
    assert without_folder(files(folder / "out"), folder) == whole


def test_killed_and_started_again_it_comes_out_the_same(tiny_model: Path, tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, tiny_model, kills=3, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(tiny_model: Path, tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        kill_and_go_on(tmp_path / str(seed), tiny_model, kills=5, seed=seed + 1, matcher="math")


@pytest.mark.slow
def test_killed_with_a_real_model(tiny_model: Path, tmp_path: Path) -> None:
    """The model is untrained: its replies are noise, and none is right."""
    sampling = {**RECIPE["sample"], "backend": "transformers", "max-tokens": 40}
    kill_and_go_on(tmp_path, tiny_model, kills=6, seed=1, pause=None, sample=sampling, pair=False)


def test_what_a_build_leaves(tiny_model: Path, tmp_path: Path) -> None:
    """The same files as the commands one by one, and every question accounted for."""
    recipe = make_folder(tmp_path / "b", tiny_model, matcher="math")
    code, told = BuildRun(recipe).start()
    assert code == 0, told
    assert "python -m mpo trains on" in told
    out = tmp_path / "b" / "out"
    rollouts, verdicts = records(out / "rollouts.jsonl"), records(out / "verdicts.jsonl")
    assert len(rollouts) == (QUESTIONS - 1) * SAMPLES  # one image is missing
    assert len(verdicts) == (QUESTIONS - 2) * SAMPLES  # one matcher is unknown
    keys = [(record["id"], record["sample"]) for record in rollouts if record["id"] != "q9"]
    assert [(record["id"], record["sample"]) for record in verdicts] == keys
    (bad,) = records(out / "rollouts.jsonl.quarantine.jsonl")
    assert bad["line"] == 6 and "missing.png" in bad["reason"]
    assert len(records(out / "verdicts.jsonl.quarantine.jsonl")) == SAMPLES
    by_hand = tmp_path / "v.jsonl"
    root = ("--image-root", str(tmp_path / "b"))
    cli.main(["verify", str(out / "rollouts.jsonl"), "--output", str(by_hand)])
    assert by_hand.read_bytes() == (out / "verdicts.jsonl").read_bytes()
    cli.main(["pair", str(by_hand), "--output", str(tmp_path / "p.jsonl"), "--seed", "7", *root,
              "--max-pairs-per-question", "2"])  # fmt: skip
    assert (tmp_path / "p.jsonl").read_bytes() == (out / "pairs.jsonl").read_bytes()
    assert json.loads((out / "meta.json").read_bytes())["formulas"]["annotation"] == "pairs.jsonl"
    assert records(out / "rl.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"sample": {"n": "many"}}, "build.yaml: sample: argument --n: invalid int value: 'many'"),
        ({"sample": {"m": 3}}, "build.yaml: sample: unknown option m"),
        ({"sample": False}, "sample cannot be switched off"),
        ({"pair": {"output": "x"}}, "pair: output is set at the top, or by the build itself"),
        ({"pair": {"balance-length": 3}}, "balance-length is 3; give true or false"),
        ({"pair": 3}, "pair is 3; give its options, or false"),
        ({"paring": {}}, "unknown paring; there are: questions, model, output"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"verify": {"workers": 0}}, "--workers is 0"),
        ({"verify": {"datasets": "none.yaml"}}, "none.yaml: No such file"),
        ({"verify": {"datasets": ["a"]}}, "datasets is ['a']; give a path"),
        ({"sample": {"help": True}}, "sample: unknown option help"),
        ({"pair": {"format": "trl"}}, "`mmpr export` reads its meta.json"),
        ({"check": {"fix": "good"}}, "`mmpr check --fix` reads its meta.json"),
        # what the later commands refuse is refused before anything is sampled
        ({"pair": {"format-negatives": False, "max-format-share": 0.3}}, "--max-format-share has"),
        ({"dropout": {"start-ratio": 2}}, "start ratio is 2.0"),
        ({"dropout": {"max-tokens": 0}}, "max_tokens is 0"),
        ({"select": {"min-accuracy": 0.9}}, "accuracy bounds are 0.9 and 0.8"),
        ({"check": {"max-length": 0}}, "--max-length is 0"),
    ],
)
def test_what_is_wrong_with_a_recipe(
    changes: dict[str, Any],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_folder(tmp_path / "b", tiny_model, **changes)
    with pytest.raises(SystemExit) as ended:
        cli.main(["build", str(recipe)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and told.count("\n") == 1
    assert not (tmp_path / "b" / "out" / "rollouts.jsonl.meta.json").exists()


@pytest.mark.parametrize(
    ("begun", "message"),
    [
        ('{"verify style": "auto"}', "verify style is 'boxed' now, but"),
        (None, "verdicts.jsonl exists without build.json"),
    ],
)
def test_verdicts_of_another_kind_are_refused(
    begun: str | None,
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_folder(tmp_path / "b", tiny_model, verify={"style": "boxed"})
    out = tmp_path / "b" / "out"
    out.mkdir()
    (out / "verdicts.jsonl").touch()
    if begun is not None:
        (out / "build.json").write_text(begun)
    with pytest.raises(SystemExit):
        cli.main(["build", str(recipe)])
    assert message in capsys.readouterr().err


def test_questions_without_answers_give_no_pairs_and_no_error(
    tiny_model: Path, tmp_path: Path
) -> None:
    """And rollouts that were made anew do not keep the old verdicts."""
    recipe = make_folder(tmp_path / "b", tiny_model, matcher=None)
    out = tmp_path / "b" / "out"
    code, told = BuildRun(recipe).start()
    assert code == 0 and "pairs.jsonl is empty" in told and "python -m mpo" not in told, told
    outcomes = {record["outcome"] for record in records(out / "verdicts.jsonl")}
    assert outcomes == {"cannot_judge"}
    rollouts = records(out / "rollouts.jsonl")
    rollouts[-1]["completion"] = "of another model"
    write_jsonl(out / "rollouts.jsonl", rollouts)
    code, told = BuildRun(recipe).start()
    assert code == 2 and "they are verdicts of other rollouts" in told
