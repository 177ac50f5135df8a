"""The options that a question lists."""

import pytest

from rewards import task_of
from rewards.extract import options_in

PARIS = ["Paris", "London"]
CITIES = ["Paris", "London", "Rome"]

LISTED = [
    # one a line, in every spelling of the label
    ("Which city?\nA. Paris\nB. London", PARIS),
    ("Q\n(A) Paris\n(B) London\n(C) Rome", CITIES),
    ("Q\nA) Paris\nB) London", PARIS),
    ("Q\nA: Paris\nB: London", PARIS),
    ("Q\n[A] Paris\n[B] London", PARIS),
    ("题\nA、巴黎\nB、伦敦", ["巴黎", "伦敦"]),
    ("选项：\nA．巴黎\nB．伦敦", ["巴黎", "伦敦"]),
    ("题\n（A）巴黎\n（B）伦敦", ["巴黎", "伦敦"]),
    ("Q\n- A. Paris\n- B. London", PARIS),
    ("Q\n* (A) Paris\n* (B) London", PARIS),
    ("Q\n**A.** Paris\n**B.** London", PARIS),
    ("Q\n**A. Paris**\n**B. London**", PARIS),
    ("Q\n  A.  Paris \n\tB.  London ", PARIS),
    ("Q\nA.Paris\nB.London", PARIS),
    ("Q\r\nA. Paris\r\nB. London\r\n", PARIS),
    ("Q\n\nA. Paris\n\nB. London\n\nC. Rome", CITIES),
    ("Q\nA.\nParis\nB.\nLondon", PARIS),
    ("A) 1\nB) 2\nC) 3\nD) 4\nE) 5", ["1", "2", "3", "4", "5"]),
    ("Q?\nA. 3.5\nB. 4.25\nC. 10", ["3.5", "4.25", "10"]),
    ("Q?\nA. $x^2$\nB. $\\frac{1}{2}$", ["$x^2$", "$\\frac{1}{2}$"]),
    ("Q?\nA. I. Newton\nB. A. Einstein", ["I. Newton", "A. Einstein"]),
    ("Q?\nA. the (A) panel\nB. the (B) panel", ["the (A) panel", "the (B) panel"]),
    ("Q?\nA. yes.\nB. no.", ["yes.", "no."]),
    # what stands before and after them
    ("Options:\nA. Paris\nB. London\n", PARIS),
    ("Q?\nA. Paris\nB. London\nAnswer with the option's letter.", PARIS),
    ("Context:\nA. intro\nB. more\nQ?\nA. Paris\nB. London", PARIS),  # the last run counts
    ("Hint: answer A or B. Q?\nA. Paris\nB. London", PARIS),
    ("If A = 30 and B = 60, find C.\nA. 90\nB. 60", ["90", "60"]),
    # in one line
    ("Which? A. Paris B. London C. Rome", CITIES),
    ("Which? (A) Paris (B) London", PARIS),
    ("Which city is it (A) Paris (B) London (C) Rome", CITIES),
    ("Options: A. Paris B. London", PARIS),
    ("Options: A. Paris; B. London; C. Rome", CITIES),
    ("Choices: (A) Paris (B) London", PARIS),
    ("选项：A. 巴黎 B. 伦敦", ["巴黎", "伦敦"]),
    ("题目？A.巴黎 B.伦敦 C.罗马", ["巴黎", "伦敦", "罗马"]),
    ("Q? A. 3.5 B. 4.25 C. 10", ["3.5", "4.25", "10"]),
    ("Q? A.3 B.4 C.5 D.6", ["3", "4", "5", "6"]),
    ("Q?\nA. 5 cm B. 6 cm\nC. 7 cm D. 8 cm", ["5 cm", "6 cm", "7 cm", "8 cm"]),
    ("Q?\n(A) 5 (B) 6\n(C) 7 (D) 8", ["5", "6", "7", "8"]),
    ("Q? A. Paris B. London C. Rome. Answer with the option's letter.", CITIES),
    ("Q? (A) Paris (B) London. Please choose.", PARIS),
    ("Q? A. red and blue B. green", ["red and blue", "green"]),
]

NOT_LISTED = [
    "",
    "A B",
    "A. Paris",
    "A. Einstein, one line",
    "Who was A. Einstein?",
    "Who was it, A. Einstein or N. Bohr?",
    "A. Einstein and B. Podolsky wrote what?",
    "A. Einstein, B. Podolsky and N. Rosen wrote it. When?",
    "A. Einstein, B. Podolsky wrote it",
    "By A. Einstein, B. Podolsky",
    "Q\nA. Paris\nC. London",  # a gap
    "Q\nB. Paris\nC. London",  # no A
    "Q\nA. Paris\nA. London",
    "Q\nB. Paris\nA. London",
    "Q\na. Paris\nb. London",
    "In (A) and (B), which is taller?",
    "(A) shows a cat and (B) shows a dog. What is in (C)?",
    "Plan A: go. Plan B: stay.",
    "Vitamin A. Which B. vitamin",
    "What does U.S.A. B. mean?",
    "图中A、B两点",
    "如图，A、B、C三点在圆上",
    "$A: y=x$\n$B: y=2x$",
    "Q\nA.\nB.",
]


@pytest.mark.parametrize(("question", "options"), LISTED)
def test_options_are_read(question, options):
    assert options_in(question) == options
    assert options_in(f"<image>\n{question}\n") == options


@pytest.mark.parametrize("question", NOT_LISTED)
def test_nothing_else_is_taken_for_options(question):
    assert options_in(question) is None


def test_a_record_without_options_takes_those_of_its_question():
    record = {"question": "Which? (A) Paris (B) London", "answer": "B"}
    assert task_of(record, "London").options == ("Paris", "London")


UNITS = [
    "A. ",
    "A. x\n",
    "(A) ",
    "A. x B. y ",
    "\nA.",
    "(",
    "A",
    "**A.** x\n",
    "A. x\nB. y\n",
    "、",
]


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_of_one_thing_is_read_in_linear_time(unit):
    found = options_in(unit * (10**6 // len(unit)))
    assert found in (None, ["x", "y"])
