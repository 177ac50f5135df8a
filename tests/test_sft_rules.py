"""The filter's rules: what each measures, what it marks, and that sound responses pass."""

from __future__ import annotations

from typing import Any

import pytest
from data_tool_cases import row
from hypothesis import given
from hypothesis import strategies as st

from sft.data_tools.rules import (
    NGRAM_UNITS,
    RULES,
    character_run,
    find_findings,
    long_response,
    long_sentence,
    long_word,
    repeated_characters,
    repeated_lines,
    repeated_ngrams,
    short_response,
    zero_run,
)
from sft.data_tools.texts import find_units

THRESHOLDS = {rule.name: rule.default for rule in RULES}
WORDS = [f"w{number}" for number in range(400)]

# ---------------------------------------------------------------- the rules

HITS = [  # (rule, text, its value, what is marked)
    (long_sentence, "One two. Three four five six", 4, [" Three four five six"]),
    (long_sentence, "短句。这里有九个汉字呢吧", 9, ["这里有九个汉字呢吧"]),
    (long_sentence, "3.5 and v1.2.3 are one", 6, ["3.5 and v1.2.3 are one"]),
    (long_sentence, "a b\nc d e\nf", 3, ["c d e"]),
    (long_word, "see https://a.b/c?d=e now", 17, ["https://a.b/c?d=e"]),
    (long_word, "汉字没有空格abc汉字", 3, ["abc"]),
    (long_word, "<box>[[1,2,3,4],[5,6,7,8]]</box> dog", 3, ["dog"]),
    (short_response, " No. ", 3, []),
    (long_response, " No. ", 3, []),
    (zero_run, "1000 and 0, 0, 0.0 0", 5, ["0, 0, 0.0 0"]),
    (zero_run, "[0|0|0]\n0", 3, ["0|0|0"]),
    (zero_run, "10", 1, ["0"]),
    (character_run, "sooo!", 3, ["ooo"]),
    (character_run, "no!!!!!!!!!!!! -------------------", 12, ["!!!!!!!!!!!!"]),
    (character_run, "好好好好好好好好好好好", 11, ["好好好好好好好好好好好"]),
]


@pytest.mark.parametrize(("rule", "text", "value", "marked"), HITS)
def test_what_a_rule_measures(rule: Any, text: str, value: float, marked: list[str]) -> None:
    """It hits beyond its threshold, not at it."""
    assert rule(text, value) is None
    hit = rule(text, value + 0.5 if rule is short_response else value - 0.5)
    assert hit.value == value
    assert [text[start:end] for start, end in hit.spans] == marked


def test_a_text_of_boxes_without_an_end_is_looked_through_once() -> None:
    assert long_word("<box>" * 200_000, 500).value == 1_000_000  # type: ignore[union-attr]


def test_drawn_lines_are_no_runs() -> None:
    table = "| a | b |\n|-----------------|:---------------:|\n" + "=" * 80 + "_" * 80 + "." * 80
    assert character_run(table, 10) is None


def test_repeated_lines() -> None:
    lines = ["The bar is red.", "}", "", *["  The bar is red. "] * 4, "The other one is blue."]
    hit = repeated_lines("\n".join(lines), 0.3)
    # 4 of 6 lines of 5 characters and more: 60 of 15 x 5 + 22 characters
    assert hit is not None and hit.value == round(60 / 97, 4)
    assert hit.told == "4 of 6 lines stood before: 62% of the characters"
    assert repeated_lines("\n".join(lines), 60 / 97) is None
    assert repeated_lines("\n".join(lines[1:]), 0) is None  # three repeat: too few
    assert repeated_lines("\n".join(["});"] * 40), 0) is None  # lines too short to count


def plain_share(words: list[str], n: int) -> float:
    """Of the words, the share that lies in an n-gram that stood before: plainly."""
    inside = set()
    for start in range(len(words) - n + 1):
        if any(words[start : start + n] == words[before : before + n] for before in range(start)):
            inside.update(range(start, start + n))
    return len(inside) / len(words)


@given(st.lists(st.sampled_from("abc"), min_size=50, max_size=80), st.data())
def test_repeated_ngrams_against_the_plain_count(words: list[str], data: st.DataObject) -> None:
    hit = repeated_ngrams(" ".join(words), -1)
    assert hit is not None and hit.value == round(plain_share(words, NGRAM_UNITS), 4)


def test_repeated_ngrams_in_words_and_characters() -> None:
    phrase = " ".join(WORDS[:10])
    text = " ".join([phrase, *WORDS[100:140], phrase])
    hit = repeated_ngrams(text, 0.1)
    assert hit is not None and hit.value == round(10 / 60, 4)
    assert [text[start:end] for start, end in hit.spans] == [phrase]
    assert repeated_ngrams(text, 10 / 60) is None
    assert repeated_ngrams(" ".join(WORDS), 0) is None
    chinese = "这张图片里有一只红色的猫和一只狗。" * 5
    hit = repeated_ngrams(chinese, 0.4)
    assert hit is not None and hit.value == 0.8  # all but the first time, by characters
    assert repeated_ngrams(chinese[: 17 * 3], 0) is None  # 48 characters: too few to say
    assert repeated_characters("=?x1!" * 60, 0.5) is not None  # no words at all
    assert repeated_characters("=?x1!" * 39, 0.5) is None  # 195 characters


@given(st.text(st.sampled_from("ab0 \n.!。好哈,-"), max_size=300))
def test_marks_lie_in_the_text(text: str) -> None:
    for rule in RULES:
        hit = rule.find(text, 10**9 if rule.name == "short_response" else 0)
        for start, end in hit.spans if hit else []:
            assert 0 <= start < end <= len(text)


def test_sound_responses_pass() -> None:
    """What training data is full of: tables, code, steps, boxes, long numbers, Chinese."""
    rows = "\n".join(f"| row {n} | {n * n} |" for n in range(40))
    table = f"| name | value |\n| --- | --- |\n{rows}"
    code = "\n".join(f"x{n} = f({n})\nif x{n}:\n    return" for n in range(20))
    code = f"```python\n{code}\n```"
    steps = "\n".join(f"Step {n}: {n} + {n + 1} = {2 * n + 1}, so we add {n}." for n in range(30))
    boxes = "<ref>dogs</ref><box>[" + ", ".join(f"[{n}, 2, 3, 4]" for n in range(60)) + "]</box>"
    chinese = "。".join(f"第{n}步：先把{n}加上{n * 7}，得到{n * 8}" for n in range(20))
    numbers = "1000000 is 10^6; 0.0000001; [[1, 0, 0], [0, 1, 0], [0, 0, 1]]"
    for text in ("3", table, code, steps, boxes, chinese, numbers):
        turns = row(0, "?", text)["conversations"]
        assert find_findings(turns, THRESHOLDS) == [], text


def test_a_threshold_may_be_any_number() -> None:
    assert character_run("哈" * 20_000, 1e12) is None
    assert character_run("哈" * 20_000, 19_999.0) is not None


def test_questions_are_not_looked_at() -> None:
    turns = row(0, "0" * 99, "Yes.", "again?", "0" * 60)["conversations"]
    (found,) = find_findings(turns, THRESHOLDS)
    assert (found.rule, found.turn, found.spans) == ("zero_run", 3, [(0, 60)])
    assert find_findings(turns, THRESHOLDS, skip=["zero_run"]) == []


def test_units() -> None:
    text = "It's 3.5 柱高 naïve_x"
    assert [text[start:end] for start, end in find_units(text)] == [
        "It's", "3.5", "柱", "高", "naïve", "x",
    ]  # fmt: skip
