"""The final answer of a completion, and whether it kept to the format: one table."""

import pytest

from rewards import extract

# completion, style asked, text read, style found, format followed
EXTRACTIONS = [
    # "Final answer:" in its spellings
    ("7 + 2 = 9. Final Answer: 9", "auto", "9", "final", True),
    ("so 9.\nFinal answer: 9", "auto", "9", "final", True),
    ("**Final Answer:** 9.", "auto", "9", "final", True),
    ("**Final answer**: `9`", "auto", "9", "final", True),
    ("Final Answer: **9**", "auto", "9", "final", True),
    ("FINAL ANSWER: 9", "auto", "9", "final", True),
    ("Final answer：9", "auto", "9", "final", True),
    ("Final answer:\n9\n", "auto", "9", "final", True),
    ("Final answer: the red bar.", "auto", "the red bar", "final", True),
    ("Final Answer: \\boxed{9}", "auto", "9", "final", True),
    ("Final Answer: $\\frac{1}{2}$", "auto", "\\frac{1}{2}", "final", True),
    ("Final Answer:\n$$\n4\n$$", "auto", "4", "final", True),
    ("Final Answer: \\text{B}", "auto", "B", "final", True),
    ("Final answer: $1$ and $2$", "auto", "$1$ and $2$", "final", True),
    ("Final answer: -3", "auto", "-3", "final", True),
    ("Final Answer: 9", "final", "9", "final", True),
    # Chinese
    ("所以 答案：红色。", "auto", "红色", "final", True),
    ("最终答案： **42**", "auto", "42", "final", True),
    ("答案是B", "auto", "B", "final", True),
    ("故选 B。", "auto", "B", "letter", True),
    # the last one wins, and two are one too many for the format
    ("Final answer: 3\nWait.\nFinal answer: 4", "auto", "4", "final", False),
    ("Final answer: 3\n\nSo \\boxed{4}", "auto", "4", "boxed", False),
    ("\\boxed{3} so Final answer: 4", "auto", "4", "final", True),
    ("\\boxed{3} then \\boxed{4}", "auto", "4", "boxed", False),
    ("Final answer: 9\nAnd some more words.", "auto", "9", "final", False),
    # boxes
    ("We get \\boxed{\\frac{1}{2}}.", "boxed", "\\frac{1}{2}", "boxed", True),
    (
        "\\boxed{\\sqrt{\\frac{1}{2}} + \\{x\\}}",
        "auto",
        "\\sqrt{\\frac{1}{2}} + \\{x\\}",
        "boxed",
        True,
    ),
    ("\\boxed {9} is it", "auto", "9", "boxed", True),
    ("\\fbox{9}", "auto", "9", "boxed", True),
    ("\\boxed{\\text{(B)}}", "auto", "(B)", "boxed", True),
    ("\\boxed{3} then \\boxed{4", "auto", "3", "boxed", False),
    ("### Final Answer\n\\boxed{7}", "auto", "7", "final", True),
    ("\\boxed{9", "auto", None, "none", False),
    ("\\boxed{}", "auto", None, "none", False),
    # R1
    ("<think>\\boxed{1}?</think>\n\\boxed{2}", "r1", "2", "r1", True),
    ("<think>a</think>\n\\boxed{2}", "auto", "2", "r1", True),
    ("<think>Final answer: 1</think>Final answer: 9", "auto", "9", "r1", True),
    ("<think>a</think>Final answer: 9", "r1", "9", "r1", False),
    ("a</think> \\boxed{2}", "auto", "2", "r1", False),
    ("\\boxed{2}", "r1", "2", "r1", False),
    ("<think>a</think>b<think>\\boxed{1}", "auto", None, "none", False),
    ("<think>so \\boxed{1}", "auto", None, "none", False),
    ("<think>so Final answer: 1", "auto", None, "none", False),
    ("<think>a</think> nothing", "auto", "nothing", "r1", False),
    # letters
    ("B", "auto", "B", "letter", True),
    ("(B)", "letter", "B", "letter", True),
    ("B.", "auto", "B", "letter", True),
    ("**B**", "auto", "B", "letter", True),
    ("B. Paris", "auto", "B. Paris", "letter", True),
    ("The answer is B", "auto", "B", "letter", True),
    ("The answer is **(B)**.", "auto", "B", "letter", True),
    ("The correct option is C.", "auto", "C", "letter", True),
    ("The answer is B. It is tall.", "auto", "B", "letter", False),
    ("It is tall.\nB", "letter", "B", "letter", False),
    ("It is tall.\nB", "auto", None, "none", False),
    # legible, though no style asks for it
    ("The answer is 42.", "auto", "42", "prose", False),
    ("The answer is A red bar", "auto", "A red bar", "prose", False),
    ("Answer: 9", "auto", "9", "prose", False),
    # nothing
    ("I cannot tell.", "auto", None, "none", False),
    ("The last option is wrong. Who knows.", "auto", None, "none", False),
    ("9", "auto", "9", "short", False),
    ("Final Answer:", "auto", None, "none", False),
    ("Final Answer: **", "auto", None, "none", False),
    ("", "auto", None, "none", False),
    ("The answer is 9", "final", None, "none", False),
    ("Final answer: 9", "boxed", None, "none", False),
]


@pytest.mark.parametrize(("completion", "style", "text", "found", "format_ok"), EXTRACTIONS)
def test_extract(completion, style, text, found, format_ok):
    extraction = extract(completion, style)
    assert (extraction.text, extraction.style, extraction.format_ok) == (text, found, format_ok)
