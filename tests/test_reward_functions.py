"""Rewards for RL: the functions, a user's own by import path, their sum, options and metrics."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from internvl.errors import UserError
from rewards import Outcome, Verdict
from rewards.functions import (
    RewardTerm,
    accuracy_reward,
    combine_rewards,
    format_reward,
    overlong_reward,
    repeated_share,
    repetition_reward,
    words_of,
)
from rewards.loading import RewardError, call_reward, check_columns, load_reward
from rl.config import RLConfig
from rl.rewarding import make_terms
from training.cli import ModelArguments, parse_config

OWN = '''
"""A user's rewards."""
SCALE = 0.01
seen = []

def shorter(prompts, completions, *, completion_ids, **columns):
    seen.append((prompts, completions, columns))
    return [-SCALE * len(ids) for ids in completion_ids]

def by_answer(prompts, completions, answer, solution=None, **columns):
    return [None if gold == "skip" else float(gold in c[0]["content"])
            for gold, c in zip(answer, completions)]

def spoils(prompts, completions, completion_ids, **columns):
    for ids in completion_ids:
        ids.clear()
    completions.clear()
    return [0.0] * len(completion_ids)

def needs(prompts, completions, hardness, **columns):
    return hardness

def closed(prompts, completions):
    return []

def positional(prompts, completions, /, **columns):
    return []

async def later(prompts, completions, **columns):
    return []

class Reward:
    pass

class Called:
    def __call__(self, prompts, completions, **columns):
        return [1] * len(prompts)

instance = Called()
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a user's modules in it."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "__init__.py").write_text("")
    (tmp_path / "kit" / "long.py").write_text(OWN)
    (tmp_path / "wanting.py").write_text("import no_such_library\n")
    (tmp_path / "partial.py").write_text("from json import no_such_name\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mine", "kit", "wanting", "partial", "broken"):
            del sys.modules[name]


# ---------------------------------------------------------------- the functions


def verdict(outcome: Outcome, format_ok: bool = True) -> Verdict:
    return Verdict(outcome, "9", "number", None, format_ok)


def test_accuracy_and_format_of_verdicts() -> None:
    verdicts = [verdict(outcome, index % 2 == 0) for index, outcome in enumerate(Outcome)]
    assert [v.outcome for v in verdicts] == [
        "correct", "wrong", "no_answer", "cannot_judge", "timeout",
    ]  # fmt: skip
    texts = [""] * 5
    assert accuracy_reward(texts, texts, verdicts=verdicts) == [1.0, 0.0, 0.0, None, None]
    assert format_reward(texts, texts, verdicts=verdicts) == [1.0, 0.0, 1.0, 0.0, 1.0]
    clipped = [True, False, False, False, False]
    assert format_reward(texts, texts, verdicts=verdicts, clipped=clipped)[0] == 0.0


def test_accuracy_and_format_in_trls_own_trainer() -> None:
    """Without verdicts the columns of the data set say what is right."""
    texts = ["Final answer: 9", "It is 9", "Final answer: B", "Final answer: 9"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns: dict[str, Any] = {
        "answer": ["9", "9", "red", "many"],
        "matcher": [None, "exact", "choice", "number"],
        "options": [None, None, ["blue", "red"], None],
        "trainer_state": object(),
        "log_extra": None,
    }
    prompts = [[{"role": "user", "content": "?"}]] * 4
    assert accuracy_reward(prompts, completions, **columns) == [1.0, 0.0, 1.0, None]
    assert format_reward(prompts, completions, **columns) == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="need the column 'answer'"):
        accuracy_reward(prompts, completions)


@pytest.mark.parametrize(("longest", "cache"), [(100, 20), (64, 1), (64, 63), (1000, 333)])
def test_overlong_is_trls(longest: int, cache: int) -> None:
    ids = [[1] * length for length in range(longest + 5)]
    ours = overlong_reward(longest, cache)(ids, ids, completion_ids=ids)
    assert ours == get_soft_overlong_punishment(longest, cache)(completion_ids=ids)
    assert ours[longest] == ours[-1] == -1.0 and ours[longest - cache] == 0.0


def test_repetition_is_trls() -> None:
    rng = random.Random(0)
    ids = [[rng.randrange(1 + size // 12) for _ in range(size)] for size in range(60)]
    for ngram, penalty in [(1, -1.0), (2, -0.5), (3, -1.0), (7, -2.0)]:
        ours = repetition_reward(ngram, penalty)(ids, ids, completion_ids=ids)
        theirs = get_repetition_penalty_reward(ngram, penalty)(completion_ids=ids)
        assert ours == theirs and any(ours)


@pytest.mark.parametrize(
    ("text", "words", "share"),
    [
        ("the bar the bar the bar", 6, 0.6),
        ("红色柱红色柱红色柱", 9, 1 - 3 / 8),
        ("红色 bar,红色 bar,", 6, 1 - 3 / 5),
        ("カードカード", 6, 1 - 3 / 5),
        ("one", 1, 0.0),
        ("", 0, 0.0),
    ],
)
def test_repetition_of_words(text: str, words: int, share: float) -> None:
    """Without token ids: words, and characters where a script has no spaces."""
    assert len(words_of(text)) == words
    (value,) = repetition_reward(2, -1.0)([""], [[{"role": "assistant", "content": text}]])
    assert value == pytest.approx(-share)


def test_repetition_is_linear() -> None:
    started = time.process_time()
    for text in ["a" * 1_000_000, "的" * 300_000, "a " * 300_000]:
        assert repeated_share(words_of(text), 3) >= 0.0
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: overlong_reward(100, 0), "soft_punish_cache is 0; the tokens over which"),
        (lambda: overlong_reward(100, 100), r"fewer than max_completion_length \(100\)"),
        (lambda: repetition_reward(0), "repetition_ngram is 0; it is at least 1"),
        (lambda: repetition_reward(3, 0.5), r"repetition_max_penalty is 0\.5; a punishment"),
        (lambda: repetition_reward(3, float("nan")), "repetition_max_penalty is nan"),
    ],
)
def test_numbers_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- a user's own


def test_functions_by_import_path(own: Path) -> None:
    for path in ("mine:shorter", "kit.long:shorter"):
        assert load_reward(path)([""], [""], completion_ids=[[1, 2]]) == [-0.02]
    assert load_reward("mine:instance")([""], [""]) == [1]
    theirs = load_reward("trl.rewards:think_format_reward")
    completions = [[{"role": "assistant", "content": "<think>hm</think>9"}]]
    assert theirs(prompts=[[]], completions=completions, answer=["9"]) == [1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("acuracy", r"reward 'acuracy' is no import path 'package.module:function'; did you mean"),
        ("shorter", "built in are: accuracy, format, overlong, repetition"),
        ("mine.py:shorter", r"there is no module 'mine\.py', neither installed nor in /"),
        ("./mine:shorter", r"reward '\./mine:shorter' is no import path"),
        ("mine:", "reward 'mine:' is no import path"),
        ("mine:__import__('os')", "is no import path"),
        ("nowhere:shorter", "there is no module 'nowhere', neither installed nor in /"),
        ("kit.nowhere:shorter", r"there is no module 'kit\.nowhere'"),
        ("wanting:f", "wanting imports 'no_such_library', which is not installed"),
        ("partial:f", "partial cannot be imported: cannot import name 'no_such_name'"),
        ("broken:f", r"broken is not Python: .*broken\.py, line 1"),
        ("mine:shortr", r"mine\.py has no 'shortr'; did you mean 'shorter'\?"),
        ("mine:SCALE", r"is a float and cannot be called; a reward function is \(prompts, comple"),
        ("mine:Reward", "is a class"),
        ("mine:later", "is an async function"),
        ("mine:closed", r"does not take \*\*columns"),
        ("mine:positional", "takes 'prompts' by position only"),
        ("builtins:max", "has no signature that can be read"),
    ],
)
def test_paths_that_lead_nowhere(own: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(path)
    assert f"reward {path!r}" in str(caught.value) and "\n" not in str(caught.value)


def test_columns_that_are_asked_for(own: Path) -> None:
    check_columns("shorter", load_reward("mine:shorter"), {})
    check_columns("by_answer", load_reward("mine:by_answer"), {"answer": None})
    with pytest.raises(ValueError, match="reward 'needs' asks for 'hardness', which no question"):
        check_columns("needs", load_reward("mine:needs"), {"answer": None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "gave 1 values for 2 completions"),
        (None, "gave a NoneType, not a list"),
        ({"a": 1, "b": 2}, "gave a dict, not a list"),
        ([1.0, "0.5"], "value 1: '0.5' is a str; it is a number"),
        ([[1.0], 1.0], r"value 0: \[1\.0\] is a list"),
        ([1.0, float("nan")], "value 1: nan; say None where it does not apply"),
        ([float("-inf"), 1.0], "value 0: -inf; say None"),
    ],
)
def test_what_cannot_be_a_reward(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward 'mine'.*{message}"):
        call_reward("mine", lambda **columns: values, {}, 2)


def test_what_can_be_a_reward() -> None:
    import numpy as np

    given = (None, True, 2, np.float32(0.5), np.float64(-1.5))
    values = call_reward("mine", lambda **columns: given, {}, 5)  # type: ignore[arg-type]
    assert values == [None, 1.0, 2.0, 0.5, -1.5]
    assert {type(value) for value in values[1:]} == {float}


def test_an_error_of_the_function_itself_comes_through() -> None:
    def fails(**columns: Any) -> list[float | None]:
        raise KeyError("hardness")

    with pytest.raises(KeyError) as caught:
        call_reward("mine", fails, {}, 1)
    assert caught.value.__notes__ == ["raised by the reward function 'mine'"]


# ---------------------------------------------------------------- their sum

SUMS: list[tuple[str, list[float], list[float | None], float | None]] = [
    ("af", [1.0, 0.1], [1.0, 1.0], 1.1),
    ("af", [1.0, 0.1], [0.0, 1.0], 0.1),
    ("af", [1.0, 0.1], [None, 1.0], None),  # not judged: not 0.1
    ("afu", [1.0, 0.1, 2.0], [1.0, 1.0, None], 1.1),  # the user's does not apply
    ("afu", [1.0, 0.1, 2.0], [None, 0.0, 5.0], None),
    ("fu", [0.1, 2.0], [1.0, -0.5], -0.9),  # accuracy is not asked for
    ("uu", [1.0, 2.0], [None, None], None),
    ("uu", [1.0, 2.0], [None, 0.0], 0.0),
    ("au", [0.0, 1.0], [None, 0.5], 0.5),  # accuracy is only logged
    ("au", [0.0, 1.0], [1.0, None], None),
    ("u", [-2.0], [0.5], -1.0),
]


@pytest.mark.parametrize(("kinds", "weights", "values", "expected"), SUMS)
def test_the_sum(
    kinds: str, weights: list[float], values: list[float | None], expected: float | None
) -> None:
    terms = [
        RewardTerm(f"{kind}{index}", accuracy_reward, weight, decisive=kind == "a")
        for index, (kind, weight) in enumerate(zip(kinds, weights, strict=True))
    ]
    assert combine_rewards(terms, [[value] for value in values]) == [expected]


def config(tmp_path: Path, *words: str) -> RLConfig:
    """The options as the command reads them."""
    given = ["--model_name_or_path", "m", "--train_file", "t", "--max_steps", "1", *words]
    given += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    args, _ = parse_config([RLConfig, ModelArguments], "rl", given)
    return args


def test_terms_of_options(own: Path) -> None:
    shown = [(t.name, t.weight, t.decisive) for t in make_terms(config(own))]
    assert shown == [("accuracy", 1.0, True), ("format", 0.1, False)]
    words = ["--reward_funcs", "accuracy", "mine:shorter", "kit.long:shorter", "overlong"]
    words += ["repetition", "--soft_punish_cache", "100", "--repetition_ngram", "4"]
    terms = make_terms(config(own, *words))
    names = ["accuracy", "mine:shorter", "kit.long:shorter", "overlong", "repetition"]
    assert [(t.name, t.weight) for t in terms] == [(name, 1.0) for name in names]

    file = own / "rl.yaml"
    file.write_text(
        "reward_funcs: [format, 'mine:shorter']\nreward_weights: [0.25, 2]\n"
        "judge_base_url: http://localhost:1/v1\njudge_model: m\njudge_when: cannot_judge\n"
    )
    args = config(own, "--config", str(file))
    assert [(t.name, t.weight) for t in make_terms(args)] == [("format", 0.25), ("shorter", 2.0)]
    args = config(own, "--config", str(file), "--reward_funcs", "accuracy", "mine:by_answer")
    assert [t.name for t in make_terms(args)] == ["accuracy", "by_answer"]


REFUSED: list[tuple[list[str], str]] = [
    (["--format_weight", "0.1"], "unknown option --format_weight"),
    (["--reward_funcs", "accuracy", "accuracy"], "'accuracy' is no name, or is there more than"),
    (["--reward_weights", "1"], "reward_weights has 1 values for 2 of reward_funcs"),
    (["--reward_weights", "0", "0"], "numbers, and not all of them 0"),
    (["--reward_weights", "1", "nan"], "numbers, and not all of them 0"),
    (["--reward_weights", "1", "x"], "invalid float value: 'x'"),
    (["--reward_funcs", "overlong"], "soft_punish_cache goes with overlong"),
    (["--soft_punish_cache", "8"], "soft_punish_cache goes with overlong"),
    (["--repetition_ngram", "4"], "repetition_ngram is given, but repetition is not among"),
    (["--repetition_max_penalty", "-2"], "repetition_max_penalty is given, but repetition"),
    (["--verifier_workers", "0"], "verifier_workers is 0, at least 1"),
    (["--verifier_limit", "0"], "verifier_limit is 0; seconds"),
    (["--judge_base_url", "http://a/v1"], "judge_base_url is given, but judge_model"),
    (["--judge_model", "m"], "judge_model is given, but judge_base_url is not"),
    (["--judge_timeout", "3"], "judge_timeout is given, but judge_base_url is not"),
    (["--judge_when", "always"], "judge_when is 'always'; one of: named, cannot_judge"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_options_that_cannot_be_honoured(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, *words)


def test_rewards_that_are_refused_before_a_model_is_loaded(own: Path) -> None:
    file = own / "rl.yaml"
    file.write_text("reward_funcs: accuracy\n")
    with pytest.raises(UserError, match="reward_funcs is 'accuracy'; give a list"):
        config(own, "--config", str(file))
    with pytest.raises(UserError, match="reward_funcs: reward 'nowhere:f': there is no module"):
        make_terms(config(own, "--reward_funcs", "nowhere:f"))
    words = ["--reward_funcs", "overlong", "--soft_punish_cache", "1024"]
    with pytest.raises(UserError, match="soft_punish_cache is 1024; the tokens over which"):
        make_terms(config(own, *words))
