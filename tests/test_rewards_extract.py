"""The final answer of a completion, and whether it kept to the format: tables in extract_cases*."""

import pytest
from extract_cases import BARE, IN_SENTENCES, LETTERS, NOTHING
from extract_cases_marked import BOXED, MARKED, THOUGHT
from extract_cases_styles import STYLED

from rewards import STYLES, extract
from rewards.extract.answers import MAX_ANSWER

TABLES = (MARKED, BOXED, THOUGHT, LETTERS, IN_SENTENCES, BARE, NOTHING)
ROWS = [("auto", *row) for table in TABLES for row in table]
ROWS += [(style, *row) for style, table in STYLED.items() for row in table]


@pytest.mark.parametrize(("style", "completion", "text", "found", "format_ok"), ROWS)
def test_extract(style, completion, text, found, format_ok):
    extraction = extract(completion, style)
    assert (extraction.text, extraction.style, extraction.format_ok) == (text, found, format_ok)
    # whatever is not in order is said in a sentence, and nothing else is
    assert (extraction.fault is None) == format_ok


@pytest.mark.parametrize(
    "around",
    [
        "  {}  ", "\n\n{}\n\n", "\t{}\r\n", "\u3000{}\xa0", "\u200b{}\u200f", "**{}**", "***{}***",
        "_{}_", "*{}*", "`{}`", "> {}", "- {}", "* {}", "# {}", "### {}", "> **{}**",
        "```\n{}\n```", "{}\n\n---", "{}\n***",
    ],
)  # fmt: skip
def test_markup_around_a_completion_changes_nothing(around):
    for style, completion, *_ in ROWS:
        in_a_fence_twice = "`" in around and "```" in completion
        if in_a_fence_twice or completion.endswith("|>"):  # nothing stands after a closing token
            continue
        wrapped = around.replace("{}", completion)
        assert extract(wrapped, style) == extract(completion, style), wrapped


UNMARKED = "the completion is an answer, but no final answer was marked"


@pytest.mark.parametrize(
    ("style", "completion", "fault"),
    [
        ("auto", "I cannot tell.", "no final answer"),
        ("auto", "Final answer: 3\nFinal answer: 4", "two final answers"),
        ("auto", "\\boxed{3}, \\boxed{4}", "two final answers"),
        ("auto", "Final answer: 3\n\nSo \\boxed{4}", "two final answers"),
        ("auto", "Final answer: 9\nBye now.", "text after the final answer"),
        ("auto", "Final answer: B. It is tall.", "text after the final answer"),
        ("auto", "Final answer:", "nothing follows the final answer's marker"),
        ("auto", "\\boxed{9", "the box is empty or never closed"),
        ("auto", "9", UNMARKED),
        ("auto", "<box>[[1,2,3,4]]</box>", UNMARKED),
        ("auto", "The answer is 9.", "the answer stands in a sentence, not after 'Final answer:'"),
        ("auto", "So 9.\n#### 9", "the answer stands after ####, as no style asks"),
        ("auto", "<answer>9</answer>", "<answer> without <think> before it"),
        ("auto", "<answer>9", "<answer> is never closed"),
        ("auto", "<think>Final answer: 9", "<think> is never closed"),
        ("auto", "<think>a</think><think>b</think>\\boxed{9}", "several <think> blocks"),
        ("auto", "b</think>\\boxed{9}", "</think> without <think>"),
        ("auto", "Hm. <think>b</think>\\boxed{9}", "text before <think>"),
        ("r1", "<think>b</think>Final answer: 9", "the answer is not boxed, as style r1 asks"),
        ("r1", "\\boxed{9}", "no <think> .. </think> before the answer, as style r1 asks"),
        ("r1", "<think>b</think><answer></answer>", "<answer> holds nothing"),
        ("boxed", "Final answer: 9", "nothing is boxed, as style boxed asks"),
        ("final", "\\boxed{9}", "no final answer"),
        ("letter", "Final answer: Paris", "the answer is no option's letter"),
        ("letter", "\\boxed{B}", "the letter is boxed, as style letter does not ask"),
        ("letter", "B\nIt is tall.", "text around the option's letter"),
        ("short", "Final answer: red", "more than the word or phrase that was asked"),
        ("short", "The bar is red.", "the answer is a sentence, not a word or a phrase"),
        ("short", "red\nblue", "the answer is no single short line"),
        ("box", "<box>[[1,2,3,4]]</box> or <box>[[1,2,3,5]]</box>", "two final answers"),
        ("box", "Final answer: [1,2,3,4]", "the answer is no <box>, as style box asks"),
        ("box", "It is at [1,2,3,4].", "the place is not tagged, and not all there is"),
    ],
)  # fmt: skip
def test_faults(style, completion, fault):
    found = extract(completion, style)
    assert (found.format_ok, found.fault) == (False, fault)


def test_an_unknown_style_is_clear():
    with pytest.raises(ValueError, match="style 'xml' is unknown; one of: auto, final, boxed, r1,"):
        extract("Final answer: 9", "xml")


# Hostile completions. Each takes 1-200 ms; a second pass over the rest at every unit would take
# minutes, so a reading that is not linear shows as a test that never ends.

UNITS = [
    "(", "\\boxed{", "Final answer:", "<think>", "A. ", "*", "答案", "\n", "answer is ", "#",
    "<box>[[", "$", "`", "_", "> ", "- ", "答案是 ", "选 ", "<answer>", "\\boxed{}",
    "final answer\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_of_one_thing_is_read_in_linear_time(unit):
    flood = unit * (10**6 // len(unit.encode()))
    for style in STYLES:
        text = extract(flood, style).text
        # a flood holds no answer; under style short it may well be one, as a whole
        assert text is None or (style == "short" and len(text) > MAX_ANSWER), (style, text[:80])


@pytest.mark.parametrize(
    "unit", [unit for unit in UNITS if "think" not in unit and "<ans" not in unit]
)
def test_a_flood_does_not_hide_the_answer(unit):
    flood = unit * (10**5 // len(unit))
    assert extract(f"{flood}\n\nFinal answer: 9").text == "9"
