"""From golds and matchers to a verdict: what is compared with what, and what follows from it."""

import pytest

from rewards import Task, request_fault, task_of, verify
from rewards.extract import Extraction
from rewards.verdict import (
    Comparison,
    Plan,
    Result,
    choose_matcher,
    conclude,
    gold_answers,
    plan_comparisons,
)


@pytest.mark.parametrize(
    ("answer", "matchers", "golds"),
    [
        ("9", (), ("9",)),
        (9, (), ("9",)),
        (0.5, (), ("0.5",)),
        (["NYC", "New York"], (), ("NYC", "New York")),
        (["NYC", 9], (), ("NYC", "9")),
        (("a", "b"), (), ("a", "b")),
        # under "list" a flat list is one gold, a list of lists several
        (["a", "b"], ("list",), ('["a", "b"]',)),
        (["a, b", "a, c"], ("list",), ("a, b", "a, c")),
        ([["a", "b"], ["a", "c"]], ("list",), ('["a", "b"]', '["a", "c"]')),
        ("a, b", ("list",), ("a, b",)),
        # coordinates are one gold, texts are several
        ([1, 2, 3, 4], ("box",), ("[1, 2, 3, 4]",)),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], ("box",), ("[[1, 2, 3, 4], [5, 6, 7, 8]]",)),
        ([5, 6], ("point",), ("[5, 6]",)),
        (["[1, 2, 3, 4]", "[5, 6, 7, 8]"], ("box",), ("[1, 2, 3, 4]", "[5, 6, 7, 8]")),
    ],
)
def test_gold_answers(answer, matchers, golds):
    assert gold_answers(answer, matchers) == golds


@pytest.mark.parametrize("answer", [None, True, {"a": 1}, [None], [[]], object()])
def test_what_is_no_answer_is_said(answer):
    with pytest.raises(ValueError, match=r"neither a text nor a list of texts|empty list"):
        gold_answers(answer)


@pytest.mark.parametrize(
    ("gold", "matcher"),
    [
        ("<box>[[1, 2, 3, 4]]</box>", "box"),
        ("<ref>dog</ref><box>[[1, 2, 3, 4]]</box>", "box"),
        ("[[1, 2, 3, 4]]", "box"),
        ("[[1, 2], [3, 4]]", "exact"),
        ("[1, 2, 3, 4]", "exact"),
        ("\\frac{1}{2}", "number"),  # a plain fraction is a number
        ("\\sqrt{2}", "math"),
        ("x^2+1", "math"),
        ("2π", "math"),
        ("A", "choice"),
        ("A red bar", "exact"),
    ],
)
def test_the_golds_form_chooses(gold, matcher):
    assert choose_matcher(gold) == matcher


def test_fast_matchers_are_compared_first():
    task = Task("Final answer: B", ("B", "\\sqrt{2}"), ("math", "choice"))
    assert plan_comparisons(task).comparisons == (
        Comparison("choice", "B", "B"),
        Comparison("choice", "B", "\\sqrt{2}"),
        Comparison("math", "B", "B"),
        Comparison("math", "B", "\\sqrt{2}"),
    )


def test_options_belong_to_choice_alone():
    task = Task("Final answer: B", ("B",), ("math", "choice"), ("3", "4"))
    first, second = plan_comparisons(task).comparisons
    assert (first.options, second.options) == (("3", "4"), None)


FOUND = Extraction("x", "final", True)
RIGHT, HALF, WRONG = Result(1.0), Result(0.7), Result(0.0)
UNKNOWN, LATE = Result(None, "no gold"), Result(None, "5 s", timeout=True)


@pytest.mark.parametrize(
    ("results", "outcome", "score", "reason"),
    [
        ([RIGHT, WRONG], "correct", 1.0, None),
        ([WRONG, RIGHT], "correct", 1.0, None),
        ([RIGHT, LATE], "correct", 1.0, None),
        ([UNKNOWN, RIGHT], "correct", 1.0, None),
        ([WRONG, WRONG], "wrong", 0.0, None),
        ([UNKNOWN, WRONG], "wrong", 0.0, None),
        ([WRONG, HALF], "wrong", 0.7, None),
        # the one that hung might have matched
        ([WRONG, LATE], "timeout", None, "5 s"),
        ([UNKNOWN, LATE], "timeout", None, "5 s"),
        ([UNKNOWN, UNKNOWN], "cannot_judge", None, "no gold"),
        ([RIGHT], "correct", 1.0, None),  # the others were not needed
    ],
)
def test_conclude(results, outcome, score, reason):
    comparisons = (Comparison("exact", "x", "y"), Comparison("number", "x", "z"))
    verdict = conclude(Plan(FOUND, "exact", comparisons), results)
    assert (verdict.outcome, verdict.score, verdict.reason) == (outcome, score, reason)
    assert verdict.extracted == "x" and verdict.format_ok


def test_the_matcher_that_decided_is_named():
    comparisons = (Comparison("exact", "x", "y"), Comparison("number", "x", "y"))
    plan = Plan(FOUND, "exact", comparisons)
    assert conclude(plan, [WRONG, RIGHT]).matcher == "number"
    assert conclude(plan, [UNKNOWN, WRONG]).matcher == "number"
    assert conclude(plan, [WRONG, LATE]).matcher == "number"
    assert verify("nothing to see here", "9", matcher=["math", "number"]).matcher == "math"


def test_a_task_may_ask_for_more_than_the_matcher_does():
    def outcome(least):
        task = Task("Final answer: bananas", ("banana",), ("anls",), least=least)
        plan = plan_comparisons(task)
        return conclude(plan, [comparison.run() for comparison in plan.comparisons]).outcome

    assert (outcome(None), outcome(0.85), outcome(0.9)) == ("correct", "correct", "wrong")


def test_one_of_several_matchers_is_enough():
    asked = {"matcher": ["choice", "number"], "options": ["5", "7"]}
    assert verify("Final answer: B", "B", **asked).matcher == "choice"
    assert verify("Final answer: 12", ["D", "12"], **asked).outcome == "correct"
    assert verify("Final answer: 13", ["D", "12"], **asked).outcome == "wrong"


def test_a_questions_record_becomes_a_task():
    question = "Which city?\nA. Paris\nB. London"
    task = task_of({"question": question, "answer": "B"}, "Final answer: London")
    assert task == Task("Final answer: London", ("B",), (), ("Paris", "London"), "auto")
    own = task_of({"question": question, "answer": "B", "options": ["x", "y", "z"]}, "B")
    assert own.options == ("x", "y", "z")
    steps = {"question": "Do this:\nA. count\nB. double", "answer": "12 cm"}
    assert task_of(steps, "12 cm").options is None
    assert task_of({"answer": 7, "matcher": "math"}, "7") == Task("7", ("7",), ("math",))


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"answer": "9"}, None),
        ({"answer": "9", "matcher": "math", "options": ["a", "b"]}, None),
        ({"answer": 9, "matcher": ["choice", "math"]}, None),
        ({}, "field 'answer' is empty: there is nothing to judge completions by"),
        ({"answer": [" "]}, "field 'answer' is empty"),
        ({"answer": {"a": 1}}, "answer {'a': 1} is neither a text nor a list of texts"),
        ({"matcher": "fuzzy"}, "matcher 'fuzzy' is unknown; one of: exact, vqa, choice"),
        ({"matcher": ["math", "fuzzy"]}, "matcher 'fuzzy' is unknown"),
        ({"matcher": 7}, "matcher 7 is neither a name nor a list of names"),
        ({"matcher": [7]}, "matcher [7] is neither a name nor a list of names"),
        ({"answer": "a", "options": "a, b"}, "field 'options' is not a list of strings"),
        ({"answer": "a", "options": ["a", 2]}, "field 'options' is not a list of strings"),
    ],
)
def test_what_is_wrong_with_a_request(record, fault):
    found = request_fault(record)
    assert found == fault if fault is None else found.startswith(fault)


def test_a_question_without_an_answer_may_be_asked_for_pairs_alone():
    assert request_fault({"answer": ""}, unanswered=True) is None
    assert request_fault({"answer": "", "matcher": "fuzzy"}, unanswered=True) is not None
    assert verify("Final answer: 9", "").outcome == "cannot_judge"


def test_the_prompts_style_is_the_extractions():
    boxed = {"answer": "9", "prompt_style": "boxed"}
    assert task_of(boxed, "\\boxed{9}").style == "boxed"
    assert task_of(boxed, "9", style="final").style == "final"
    assert task_of({"answer": "9", "prompt_style": "none"}, "9").style == "auto"


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        ("B\n\nThe picture shows Big Ben.", "B", "correct"),
        ("It shows Big Ben.\n\n**B. London**", "B", "correct"),
        ("It shows Big Ben.\n\n**B. London**", "A", "wrong"),
        ("A. Paris\nB. London\n\nI am not sure.", "A", "no_answer"),  # the options again
        ("Let me see.\n\nA. Paris: the Eiffel", "A", "no_answer"),  # cut in the middle of one
        ("It shows Big Ben.\nIs it A?", "A", "no_answer"),
    ],
)
def test_a_line_that_is_an_option_answers_a_multiple_choice_question(completion, gold, outcome):
    verdict = verify(completion, gold, options=["Paris", "London"])
    assert (verdict.outcome, verdict.format_ok) == (outcome, False)


RECORD = '{"company": "ABC", "total": "9.00"}'


@pytest.mark.parametrize(
    ("completion", "outcome", "format_ok"),
    [
        ("Final answer:\ncompany: ABC\ntotal: 9.00", "correct", True),
        ("Final answer: company: ABC\ntotal: 9.00", "correct", True),
        ("Final answer:\n**Company:** ABC\n**Total:** 9.00\n\nThat is all.", "correct", False),
        ("The answer is:\ncompany: ABC\ntotal: 9.00\nNote: it is paid.", "correct", False),
        ("<think>total: 8</think>Final answer:\ncompany: ABC\ntotal: 9.00", "correct", True),
        ("Final answer:\n- company: ABC\n- total: 9.00", "correct", True),
        ("Final answer:\ncompany: ABC\ntotal: 8.00", "wrong", True),
        ("Final answer:\ncompany: ABC\ntotal: 9.00\ndate: 1 May", "wrong", True),
        ("Final answer:\ncompany: ABC\n\ntotal: 9.00", "wrong", False),  # an empty line ends it
        ("\\boxed{company: ABC}\ntotal: 9.00", "wrong", True),
    ],
)
def test_a_record_on_several_lines_is_one_answer_for_list(completion, outcome, format_ok):
    verdict = verify(completion, RECORD, matcher="list")
    assert (verdict.outcome, verdict.format_ok) == (outcome, format_ok)
    # of other matchers the answer stays the first line
    assert verify("Final answer:\nx: 5\ny: 6", "x: 5", matcher="exact").outcome == "correct"


@pytest.mark.parametrize("options", ["AB", {"A": "Paris"}, ["Paris", 1], 5])
def test_options_that_are_no_texts_are_said(options):
    with pytest.raises(ValueError, match="is not a list of texts"):
        verify("B", "B", options=options)


@pytest.mark.parametrize("completion", [None, 9, b"Final answer: 9"])
def test_a_completion_that_is_no_text_is_said(completion):
    with pytest.raises(ValueError, match="is no text"):
        verify(completion, "9")


@pytest.mark.parametrize(
    ("completion", "extracted", "outcome"),
    [
        ("B\n\nBecause the bar is tall.\nResult: 12", "B", "correct"),
        ("It is tall.\nAns: C", "C", "wrong"),
        ("B\n\nThe answer is 12.", "12", "wrong"),  # a sentence that says it is firmer
    ],
)
def test_a_line_that_is_an_option_comes_before_a_label(completion, extracted, outcome):
    verdict = verify(completion, "B")
    assert (verdict.extracted, verdict.outcome) == (extracted, outcome)
