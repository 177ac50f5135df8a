"""Verdicts of whole completions, and what holds for any text.

The rows of each matcher are in match_cases*.py (test_rewards_matches.py), the defects of the
published pipeline in test_published_defects.py.
"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rewards import Outcome, Verdict, verify
from rewards.verdict import choose_matcher

ROOT = Path(__file__).resolve().parent.parent

OPTIONS = ["Paris", "London", "New York"]


@pytest.mark.parametrize(
    ("gold", "options", "matcher"),
    [
        ("B", None, "choice"),
        ("(B)", None, "choice"),
        ("London", OPTIONS, "choice"),
        ("9", None, "number"),
        ("-3.5", None, "number"),
        ("12 cm", None, "number"),
        ("nine", None, "number"),
        ("b", None, "exact"),
        ("red", None, "exact"),
        ("3 Doors Down", None, "exact"),
        ("2019-05-01", None, "exact"),
        ("", None, "exact"),
    ],
)
def test_default_matcher(gold, options, matcher):
    assert choose_matcher(gold, options) == matcher


def test_verdicts():
    assert verify("Final Answer: 9", "9") == Verdict(Outcome.CORRECT, "9", "number", 1.0, True)
    assert verify("Final Answer: 8", "9") == Verdict(Outcome.WRONG, "8", "number", 0.0, True)
    assert verify("It is 9.", "9") == Verdict(Outcome.NO_ANSWER, None, "number", 0.0, False)
    judged = verify("Final Answer: 9", "red", matcher="number")
    assert judged.outcome == "cannot_judge" and judged.score is None
    assert judged.reason == "gold answer 'red' is not a number"
    partial = verify("Final answer: bananas", "banana", matcher="anls")
    assert partial.outcome == "correct" and partial.score == pytest.approx(6 / 7)
    assert verify("The answer is 9", "9") == Verdict(Outcome.CORRECT, "9", "number", 1.0, False)


def test_outcomes_are_their_strings():
    assert [str(outcome) for outcome in Outcome] == [
        "correct", "wrong", "no_answer", "cannot_judge", "timeout",
    ]  # fmt: skip
    assert verify("Final Answer: 9", "9").outcome == "correct"


def test_the_best_of_several_golds_decides():
    assert verify("Final answer: New York City", ["NYC", "New York City"]).outcome == "correct"
    mixed = verify("Final answer: red", ["9", "red"])
    assert (mixed.outcome, mixed.matcher) == ("correct", "exact")
    best = verify("Final answer: bananas", ["xxxxxxx", "banana"], matcher="anls")
    assert best.score == pytest.approx(6 / 7)
    # one gold that does not parse does not hide a verdict by the other
    assert verify("Final answer: 8", ["9", "red"], matcher="number").outcome == "wrong"
    assert verify("Final answer: 8", ["blue", "red"], matcher="number").outcome == "cannot_judge"


def test_unknown_names_are_clear():
    known = "exact, vqa, choice, number, relaxed, anls, math, list, box, point"
    with pytest.raises(ValueError, match=f"matcher 'fuzzy' is unknown; one of: {known}"):
        verify("no answer at all", "9", matcher="fuzzy")
    with pytest.raises(ValueError, match="style 'xml' is unknown; one of: auto, final, boxed"):
        verify("Final answer: 9", "9", style="xml")
    with pytest.raises(ValueError, match="empty list"):
        verify("Final answer: 9", [])


# Safety


def test_math_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(verify("\\boxed{0.5}", "\\frac{1}{2}", matcher="math").outcome)
    )
    thread.start()
    thread.join()
    assert found == ["correct"]


HOSTILE = {
    "open brackets": "(" * 10**5,
    "unclosed boxes": "\\boxed{" * 10**4,
    "braces": "\\boxed{" + "{" * 10**5,
    "markers": "Final answer:" * 10**4,
    "letters": "A. " * 3 * 10**4,
    "stars": "*" * 10**5,
    "digits": "Final answer: " + "9" * 10**5,
    "lone surrogate": "\ud800 Final answer: \ud800",
    "right to left": "Final answer: \u202e9\u202c",
    "null": "Final answer: \x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_judged_and_not_correct(name):
    for matcher in ("number", "anls"):
        assert verify(HOSTILE[name], "5", matcher=matcher).outcome in ("wrong", "no_answer")


def test_import_is_light():
    code = (
        "import sys, rewards; print(sorted({'torch', 'sympy', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
