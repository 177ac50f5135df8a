"""mmpr's pure functions: verdicts of rollouts, pairs in MMPR's format, selection for RL."""

from collections import Counter
from itertools import groupby
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl.errors import UserError
from mmpr.groups import strip_rollout
from mmpr.pairs import PairConfig, build_pairs, contains_answer, even_pairs
from mmpr.select import accuracy, select_questions
from mmpr.verify import as_asked, judged_record
from rewards import VerifierPool, task_of

# verify


def rollout(completion, answer="9", **more):
    return {
        "id": "q", "question": "?", "answer": answer, "sample": 0, "completion": completion,
        "finish_reason": "stop", **more,
    }  # fmt: skip


def judged(record):
    return judged_record(
        record, VerifierPool().judge(task_of(as_asked(record), record["completion"]))
    )


def test_judged_record():
    record = judged(rollout("Final Answer: 9"))
    assert record == rollout("Final Answer: 9") | {
        "outcome": "correct", "extracted": "9", "matcher": "number", "score": 1.0,
        "format_ok": True,
    }  # fmt: skip
    assert type(record["outcome"]) is str
    record = judged(rollout("Final Answer: 9", answer="red", matcher="number"))
    assert record["outcome"] == "cannot_judge" and "not a number" in record["reason"]
    again = judged(record | {"answer": "9"})
    assert again["outcome"] == "correct" and "reason" not in again


@pytest.mark.parametrize("answer", ["", [" "]])
def test_without_a_gold_answer_nothing_is_missing_from_a_completion(answer):
    record = judged(rollout("A dog on the lawn.", answer=answer))
    assert (record["outcome"], record["score"]) == ("cannot_judge", None)
    assert record["reason"] == "the question has no gold answer"


def test_a_completion_that_was_cut_off_did_not_follow_the_format():
    record = judged(rollout("Final Answer: 9", finish_reason="length"))
    assert (record["outcome"], record["format_ok"]) == ("correct", False)


def test_the_questions_own_matcher_survives():
    asked = judged(rollout("Final Answer: 9", matcher="relaxed"))
    assert (asked["matcher"], asked["requested_matcher"]) == ("relaxed", "relaxed")
    free = judged(rollout("Final Answer: 9"))
    assert strip_rollout(asked) == {"id": "q", "question": "?", "answer": "9", "matcher": "relaxed"}
    assert strip_rollout(free) == {"id": "q", "question": "?", "answer": "9"}
    again = judged(free)  # a verdict verified again asks for nothing either
    assert again == free


# pair


def grouped(verdicts):
    """The verdicts of each question, which stand together."""
    return [list(group) for _, group in groupby(verdicts, key=itemgetter("id"))]


def verdict(outcome, text, qid="q", extracted="1", format_ok=True, **more):
    return {
        "id": qid, "question": "?", "answer": "9", "completion": text, "outcome": outcome,
        "extracted": None if outcome == "no_answer" else extracted, "format_ok": format_ok, **more,
    }  # fmt: skip


def question(qid, correct, wrong, no_answer=0):
    """Verdicts of one question, all completions distinct."""
    return [
        *[verdict("correct", f"{qid} right {i}", qid, "9") for i in range(correct)],
        *[verdict("wrong", f"{qid} wrong {i}", qid, "1") for i in range(wrong)],
        *[verdict("no_answer", f"{qid} none {i}", qid, format_ok=False) for i in range(no_answer)],
    ]


def test_pair_is_mmprs_record():
    verdicts = [
        verdict("correct", "so 9", extracted="9", image=["a.png", "b.png"], answer=["9", "nine"]),
        verdict("wrong", "so 1", extracted="1", image=["a.png", "b.png"], answer=["9", "nine"]),
    ]
    pairs, report = build_pairs(grouped(verdicts), PairConfig())
    assert pairs == [
        {
            "id": "q-0", "image": ["a.png", "b.png"], "question": "?", "chosen": "so 9",
            "rejected": "so 1", "answer_gt": "9", "kind": "correctness",
        }
    ]  # fmt: skip
    assert (report.correctness, report.format, report.questions_with_pairs) == (1, 0, 1)


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        (question("q", 4, 0), "none wrong"),
        (question("q", 0, 4), "none correct"),
        (question("q", 0, 2, 2), "none correct"),
        ([verdict("cannot_judge", "a"), verdict("timeout", "b")], "nothing could be judged"),
        (
            [verdict("correct", "a", format_ok=False), verdict("wrong", "b")],
            "correct only with a broken format",
        ),
        (
            [verdict("correct", "a", extracted="9"), verdict("wrong", "b", extracted="9 apples")],
            "every correct answer stands in the wrong ones",
        ),
        (question("q", 2, 0, 2), "only format pairs, over their share"),
    ],
)
def test_questions_that_give_no_pair(verdicts, reason):
    pairs, report = build_pairs(grouped(verdicts), PairConfig())
    assert pairs == []
    assert report.without_pairs == {reason: 1}


def test_what_cannot_be_judged_is_never_in_a_pair():
    verdicts = [
        *question("q", 1, 1),
        verdict("cannot_judge", "unsure"),
        verdict("timeout", "slow"),
        verdict("correct", "sloppy", format_ok=False),
    ]
    pairs, _ = build_pairs(grouped(verdicts), PairConfig(max_format_share=1))
    texts = {text for pair in pairs for text in (pair["chosen"], pair["rejected"])}
    assert texts == {"q right 0", "q wrong 0"}


def test_format_pairs_keep_to_their_share():
    verdicts = [row for i in range(20) for row in question(f"q{i}", 2, 1, 5)]
    for share, expected in [(0.0, 0), (0.2, 10), (0.5, 40), (1.0, 200)]:
        _, report = build_pairs(grouped(verdicts), PairConfig(max_format_share=share))
        assert (report.correctness, report.format) == (40, expected), share
    _, report = build_pairs(grouped(verdicts), PairConfig(format_negatives=False))
    assert (report.correctness, report.format) == (40, 0)


def test_a_wrong_answer_that_was_cut_off_is_a_format_negative():
    verdicts = [*question("q", 1, 1), verdict("wrong", "Final Answer: 1", finish_reason="length")]
    pairs, _ = build_pairs(grouped(verdicts), PairConfig())
    assert [(pair["rejected"], pair["kind"]) for pair in pairs] == [
        ("q wrong 0", "correctness"),
        ("Final Answer: 1", "format"),
    ]


def test_duplicates_count_once():
    verdicts = [verdict("correct", f"so 9{' ' * i}", extracted="9") for i in range(5)]
    verdicts += [verdict("wrong", "so 1") for _ in range(5)]
    pairs, report = build_pairs(grouped(verdicts), PairConfig())
    assert len(pairs) == 1 and report.left_out["duplicate completion"] == 8


@settings(max_examples=40)
@given(
    correct=st.integers(1, 12), wrong=st.integers(1, 12), limit=st.integers(1, 15),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pairs_are_distinct_even_and_repeatable(correct, wrong, limit, seed):
    verdicts = question("q", correct, wrong)
    config = PairConfig(max_pairs=limit, seed=seed)
    pairs, report = build_pairs(grouped(verdicts), config)
    assert build_pairs(grouped(verdicts), config)[0] == pairs
    assert len(pairs) == min(limit, correct * wrong)
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == len(pairs)
    for side, number in (("chosen", correct), ("rejected", wrong)):
        uses = Counter(pair[side] for pair in pairs)
        counts = [uses[name] for name in uses] + [0] * (number - len(uses))
        assert max(counts) - min(counts) <= 1, "one completion is used far more than another"
    assert report.left_out["over the pairs per question"] == correct * wrong - len(pairs)


def test_the_items_of_a_list_are_one_answer():
    """A wrong list has right items in it; it is no less wrong."""
    answer = ["red", "green", "blue"]
    rows = [
        verdict("correct", "r", extracted="red, green, blue", matcher="list", answer=answer),
        verdict("wrong", "w", extracted="red, green, yellow", matcher="list", answer=answer),
    ]
    (pair,), _ = build_pairs(grouped(rows), PairConfig())
    assert (pair["chosen"], pair["rejected"], pair["answer_gt"]) == ("r", "w", "red, green, blue")


def test_a_wrong_option_may_hold_the_words_of_the_right_one():
    rows = [
        verdict("correct", "r", extracted="A", matcher="choice", answer="A"),
        verdict("wrong", "w", extracted="C. A triangle", matcher="choice", answer="A"),
    ]
    assert len(build_pairs(grouped(rows), PairConfig())[0]) == 1
    rows = [{**row, "matcher": "exact"} for row in rows]
    assert not build_pairs(grouped(rows), PairConfig())[0]


def test_other_questions_do_not_change_a_questions_pairs():
    alone, _ = build_pairs(grouped(question("q", 4, 6)), PairConfig(max_pairs=3))
    among, _ = build_pairs(
        grouped(question("p", 3, 3) + question("q", 4, 6)), PairConfig(max_pairs=3)
    )
    assert [pair for pair in among if pair["id"].startswith("q-")] == alone
    other, _ = build_pairs(grouped(question("q", 4, 6)), PairConfig(max_pairs=3, seed=1))
    assert other != alone


def test_even_pairs_covers_the_table():
    pairs = list(even_pairs(["a", "b", "c", "d"], ["x", "y"]))
    assert len(set(pairs)) == len(pairs) == 8
    assert pairs[:4] == [("a", "x"), ("b", "y"), ("c", "x"), ("d", "y")]


@pytest.mark.parametrize(
    ("inside", "answer", "expected"),
    [
        ("5 apples", "5", True), ("about 5.", "5", True), ("Red bar", "red", True),
        ("红色的", "红色", True), ("5%", "5", True),
        ("15", "5", False), ("5.5", "5", False), ("1,500", "1", False), ("-5", "5", False),
        ("不是", "是", False), ("是", "是", True), ("not possible", "possible", False),
        ("no, it is possible", "possible", True), ("nothing", "thing", False),
        ("−5", "5", False), ("reddish", "red", False), ("3", "5", False), ("3", "", False),
    ],
)  # fmt: skip
def test_contains_answer(inside, answer, expected):
    assert contains_answer(inside, answer) is expected


# select


def test_select():
    verdicts = [row for n in range(6) for row in question(f"q{n}", n, 5 - n)]
    verdicts += [verdict("cannot_judge", "a", "u")]
    verdicts += [*question("j", 1, 1), verdict("timeout", "b", "j")]  # 1 of 2 judged
    selected, report = select_questions(grouped(verdicts))
    assert [row["id"] for row in selected] == ["q1", "q2", "q3", "q4", "j"]
    assert selected[0] == {"id": "q1", "question": "?", "answer": "9"}
    counts = (report.questions, report.selected, report.too_hard, report.too_easy)
    assert (*counts, report.not_judged) == (8, 5, 1, 1, 1)
    assert {name: count for name, count in report.histogram.items() if count} == {
        "0": 1, "0.2-0.3": 1, "0.4-0.5": 1, "0.5-0.6": 1, "0.6-0.7": 1, "0.8-0.9": 1, "1": 1,
    }  # fmt: skip
    assert accuracy([verdict("timeout", "a")]) is None
    with pytest.raises(UserError, match=r"bounds are 0.8 and 0.2"):
        select_questions(grouped(verdicts), min_accuracy=0.8, max_accuracy=0.2)
