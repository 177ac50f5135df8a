"""Every matcher by the tables of match_cases*.py, and against independent plain versions."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from match_cases import CASES, CHOICE, CHOICE_OF

from rewards import MATCHERS, CannotJudge
from rewards.match.grounding import best_assignment, box_iou

RULES = [name for name, matcher in MATCHERS.items() if not matcher.slow]


def score(matcher, prediction, gold, options=None):
    """A matcher's score, or None where it cannot judge."""
    try:
        return MATCHERS[matcher](prediction, gold, options)
    except CannotJudge:
        return None


def short(value):
    return repr(value)[:40]


@pytest.mark.parametrize(
    ("matcher", "gold", "prediction", "options", "expected"),
    CASES,
    ids=[f"{case[0]} {short(case[1])} {short(case[2])}" for case in CASES],
)
def test_match(matcher, gold, prediction, options, expected):
    found = score(matcher, prediction, gold, options)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))
    assert found is None or 0.0 <= found <= 1.0


def test_the_table_is_large_and_has_both_verdicts_of_every_matcher():
    assert len(CASES) >= 500
    assert len({(*case[:3], str(case[3])) for case in CASES}) == len(CASES), "a row is there twice"
    for name, matcher in MATCHERS.items():
        expected = [case[4] for case in CASES if case[0] == name]
        right = sum(value is not None and value >= matcher.least for value in expected)
        assert right >= 10 and None in expected, name
        assert sum(value is not None and value < matcher.least for value in expected) >= 10, name


def test_a_gold_answer_matches_itself_under_every_row():
    for name, gold, _, options, expected in CASES:
        if expected is not None and name != "math":
            assert score(name, gold, gold, options) == 1.0, (name, gold)
        elif name in ("exact", "vqa", "anls", "relaxed") and gold.strip():
            assert score(name, gold, gold) in (1.0, None), (name, gold)


@pytest.mark.parametrize("wrap", [" {}\n", "**{}**", "**{}", "`{}`", "{}.", '"{}"', "\t*{}*"])
def test_spaces_and_markdown_around_a_prediction_change_nothing(wrap):
    for name, gold, prediction, options, expected in CASES:
        loose = name in ("exact", "vqa", "anls", "relaxed") and not prediction.strip("*. \t\n-_")
        if name in ("math", "list", "box", "point") or loose or set(prediction) & set("*`\"'_…"):
            continue
        if prediction.endswith((".", "!", "?", ",", "\\")) or len(prediction) > 1000:
            continue
        prediction = prediction.strip()
        if prediction:
            found = score(name, wrap.format(prediction), gold, options)
            assert found == (None if expected is None else pytest.approx(expected)), prediction


# Independent versions: slow, plain, and written from the definition


def plain_anls(prediction, gold):
    """Biten et al. 2019, eq. 1-2, for one gold, by the dynamic programme of the edit distance."""
    row = list(range(len(gold) + 1))
    for index, char in enumerate(prediction, 1):
        previous, row[0] = row[0], index
        for place, other in enumerate(gold, 1):
            previous, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, previous + (char != other)),
            )
    likeness = 1 - row[-1] / max(len(prediction), len(gold))
    return likeness if likeness > 0.5 else 0.0


@settings(max_examples=150)
@given(st.text("abc é", max_size=12), st.text("abc é", min_size=1, max_size=12))
def test_anls_is_the_formula(prediction, gold):
    prediction, gold = " ".join(prediction.split()), " ".join(gold.split())
    if gold:
        expected = plain_anls(prediction, gold)
        assert score("anls", prediction, gold) == pytest.approx(expected, abs=1e-12)


BOX = st.tuples(*[st.integers(0, 11)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1)
)


def cells(box):
    return set(itertools.product(range(box[0], box[2]), range(box[1], box[3])))


@settings(max_examples=100)
@given(BOX, BOX)
def test_iou_is_the_share_of_cells(one, other):
    both, either = cells(one) & cells(other), cells(one) | cells(other)
    assert box_iou(one, other) == pytest.approx(len(both) / len(either))
    assert score("box", str(list(one)), str(list(other))) == pytest.approx(len(both) / len(either))


def test_boxes_are_paired_as_well_as_trying_every_order():
    generator = random.Random(4)
    for _ in range(200):
        rows, columns = sorted((generator.randint(1, 5), generator.randint(1, 5)))
        weights = [[generator.choice([0, generator.random()]) for _ in range(columns)]
                   for _ in range(rows)]  # fmt: skip
        chosen = best_assignment(weights)
        assert len(set(chosen)) == rows
        best = max(
            sum(weights[row][column] for row, column in enumerate(order))
            for order in itertools.permutations(range(columns), rows)
        )
        assert sum(weights[row][chosen[row]] for row in range(rows)) == pytest.approx(best)


def test_several_boxes_match_when_some_order_meets_every_gold():
    generator = random.Random(5)
    met = 0
    for _ in range(300):
        count = generator.randint(1, 4)
        gold = [near([0, 0, 20, 20], generator) for _ in range(count)]
        given_boxes = [near(box, generator) for box in gold]
        generator.shuffle(given_boxes)
        found = score("box", str(given_boxes), str(gold))
        wanted = any(
            all(box_iou(one, other) >= 0.5 for one, other in zip(gold, order, strict=True))
            for order in itertools.permutations(given_boxes)
        )
        assert (found >= MATCHERS["box"].least) == wanted
        met += wanted
    assert 50 < met < 250


def near(box, generator):
    x1, y1, x2, y2 = (value + generator.randint(-5, 5) for value in box)
    return [x1, y1, max(x1 + 1, x2), max(y1 + 1, y2)]


def test_a_choice_is_right_for_its_own_letter_and_text_only():
    options = ["red", "The blue bar", "7", "None of these"]
    spellings = ["{0}", "({0})", "{0}.", "**{0}**", "Option {0}", "{0}. {1}", "({0}) {1}", "{1}",
                 "{0}: {1}", "{1}.", "The answer is {0}"]  # fmt: skip
    for right, given_place in itertools.product(range(4), repeat=2):
        for spelling in spellings:
            prediction = spelling.format("ABCD"[given_place], options[given_place])
            for gold in ("ABCD"[right], options[right]):
                found = score("choice", prediction, gold, options)
                assert found == float(right == given_place), (prediction, gold)


def test_a_choice_between_two_letters_is_wrong():
    letters = "ABCDE"
    for one, other in itertools.permutations(letters, 2):
        for text in (f"{one} or {other}", f"{one}/{other}", f"({one}) or ({other})",
                     f"{one}, {other}", f"{one} and {other}", f"{one}{other}"):  # fmt: skip
            assert score("choice", text, one) == 0.0, text
            assert score("choice", text, one, ["v", "w", "x", "y", "z"]) == 0.0, text


def test_options_rows_hold_without_their_options_where_only_letters_are_used():
    rows = [row for row in CHOICE if row[2] is not None and re.fullmatch("[A-E]", row[0])]
    for gold, prediction, expected in rows:
        options = ["one option", "two options", "three options", "four options", "five options"]
        assert score("choice", prediction, gold, options) in (expected, 0.0), prediction
    assert len(rows) > 40 and len(CHOICE_OF) > 50


# Text of any length

LONG = {
    "brackets": "(" * 10**6,
    "square brackets": "[" * 10**6,
    "braces": "\\boxed{" * 150_000,
    "dollars": "$" * 10**6,
    "stars": "*" * 10**6,
    "bold": "**a" * 300_000,
    "quotes": "'a," * 300_000,
    "digits": "9" * 10**6,
    "groups": "1,234," * 160_000,
    "pairs": "[1,2]," * 160_000,
    "boxes": "[1,2,3,4]," * 100_000,
    "words": "one " * 250_000,
    "and": " and" * 250_000,
    "letters": "A or " * 200_000,
    "labels": "B. " * 300_000,
    "lines": "- x\n" * 250_000,
    "spaces": "9" + " " * 10**6 + "9",
    "combining marks": "a" + "\u0316\u0301" * 500_000,  # quadratic in Python's NFKC
    "superscripts": "9" + "²" * 10**6,
    "full width": "９" * 10**6,
    "Chinese": "一" * 10**6,
    "surrogates": "\ud800" * 10**6,
    "slashes": "\\" * 10**6,
    "minus": "-" * 10**6,
    "json": '{"a":' * 200_000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("length", [3 * 10**4, pytest.param(10**6, marks=pytest.mark.slow)])
def test_a_megabyte_is_wrong_and_no_gold_answer_that_is_judged(name, length):
    text = LONG[name][-length:]
    golds = {"choice": "B", "list": "a, b", "box": "[1, 2, 3, 4]", "point": "[1, 2, 3, 4]"}
    for matcher in RULES:
        found = score(matcher, text, golds.get(matcher, "7"))
        assert found is not None and found < MATCHERS[matcher].least, matcher
        assert score(matcher, "7", text) in (0.0, None), matcher
