"""Rows of the matchers of texts: exact, vqa, anls. Each is (gold, prediction, expected score).

Expected None: the gold means nothing to the matcher (CannotJudge). `CASES` puts the rows of all
families together as (matcher, gold, prediction, options, expected); add a row where it belongs,
with a comment wherever a careful reader could decide otherwise.
"""

from match_cases_choices import CHOICE, CHOICE_OF, LIST
from match_cases_maths import MATH
from match_cases_numbers import NUMBER, RELAXED
from match_cases_places import BOX, POINT

EXACT = [
    ("Red", " red. ", 1),
    ("the red bar", "**The  Red Bar**", 1),
    ("Ｐａｒｉｓ", "paris", 1),
    ("red", "red bar", 0),
    ("red bar", "the red bar", 0),  # an article is text: vqa forgives it
    ("5", "15", 0),
    ("红色", "红色。", 1),
    ("Straße", "STRASSE", 1),
    ("ΟΔΟΣ", "οδος", 1),  # final and inner sigma are one letter
    ("Café", "Cafe\u0301", 1),  # composed and combining accent
    ("café", "cafe", 0),
    ("naïve", "NAÏVE", 1),
    ("New York", "new\u00a0york", 1),
    ("New York", "new\n york", 1),
    ("New York", "newyork", 0),
    ("Paris", '"Paris"', 1),
    ("Paris", "“Paris”", 1),
    ("北京", "「北京」", 1),
    ("Don't", "don’t", 1),
    ("Paris", "‘Paris’", 1),
    ("Paris", "`Paris`", 1),
    ("Paris", "<b>Paris</b>", 1),
    ("Paris", "Paris</answer>", 1),
    ("p", "<p>", 0),
    ("<p>", "<p>", 1),
    ("102", "10<sup>2</sup>", 0),
    ("1 2", "<b>1</b><b>2</b>", 0),
    ("Paris", "_Paris_", 1),
    ("Paris", "$\\text{Paris}$", 1),
    ("Paris", "\\boxed{Paris}", 1),
    ("Paris", "Paris,", 1),
    ("Paris", "Paris!", 0),  # an exclamation mark may be a factorial or a name's
    ("Yahoo!", "yahoo!", 1),
    ("it's", "its", 0),
    ("...", "...", 1),
    ("...", "..", 0),
    ("*", "*", 1),
    ("*", "**", 0),
    ("*", "x", 0),
    ("$", "$", 1),
    ("-", "-", 1),
    ("2**3", "2**3", 1),
    ("2**3", "23", 0),
    ("102", "10²", 0),  # NFKC alone makes them equal
    ("10^2", "10²", 1),
    ("1 1/2", "1½", 1),
    ("11/2", "1½", 0),
    ("½", "1/2", 1),
    ("-3", "−3", 1),
    ("-3", "3", 0),
    ("9", "\u200b9\u200b", 1),  # zero-width spaces
    ("9", "\u202e9\u202c", 1),  # direction marks
    ("\u200b", "9", None),
    ("№ 5", "No 5", 1),
    ("①", "1", 1),
    ("（甲）", "(甲)", 1),
    ("ﬁne", "fine", 1),
    ("a.b", "ab", 0),
    ("3.50", "3.5", 0),
    ("\ud800", "\ud800", 1),
    ("\ud800", "\udfff", 0),
    ("\x00", "\x00", 1),
    ("", "", None),
    (" \t\n", "", None),
    ("red", "", 0),
    ("red", " ", 0),
]

VQA = [
    ("two dogs", "2 dogs", 1),
    ("the dog", "A dog!", 1),
    ("don't", "dont", 1),
    ("don’t", "don't", 1),
    ("it's a cat", "its cat", 1),
    ("1,000", "1000", 1),
    ("1,000,000", "1000000", 1),
    ("1,2", "12", 0),  # no comma of thousands
    ("blue-green", "blue green", 1),
    ("blue/green", "blue green", 1),
    ("blue, green", "blue green", 1),
    ("blue", "blue green", 0),
    ("3.5", "35", 0),
    ("3.5", "3.5.", 1),
    ("p.m.", "pm", 1),
    ("U.S.A", "usa", 1),
    (".5", "5", 0),
    ("-3", "3", 0),  # the published script drops the sign
    ("10:30", "1030", 0),
    ("10:30", "10:30.", 1),
    ("1/2", "12", 0),
    ("none", "0", 1),  # as published
    ("zero", "0", 1),
    ("ten", "10", 1),
    ("twelve", "12", 1),
    ("twenty-one", "21", 1),
    ("twenty one", "21", 1),
    ("21 people", "twenty-one people", 1),
    ("one hundred and five", "105", 1),
    ("a hundred", "100", 1),
    ("a dozen eggs", "12 eggs", 1),
    ("two thousand", "2000", 1),
    ("one two", "12", 0),
    ("one two", "1 2", 1),
    ("seven", "8", 0),
    ("one", "someone", 0),
    ("a", "A", 1),
    ("a", "the", 0),
    ("the", "the", 1),
    ("an apple", "apple", 1),
    ("cat", "dog", 0),
    ("yes", "Yes.", 1),
    ("yes", "no", 0),
    ("C++", "C", 0),
    ("t-shirt", "t shirt", 1),
    ("tshirt", "t-shirt", 0),  # as published: a hyphen parts words
    ("“stop”", "stop", 1),
    ("stop sign", "stop_sign", 1),
    ("红色", "红色！", 1),
    ("5", "15", 0),
    ("?", "?", 1),
    ("?", "!", 0),
    ("", "the", None),
]

ANLS = [
    ("banana", "banana", 1),
    ("1998", "banana", 0),  # published defect 1: 0.83 of distance taken for likeness
    ("banana", "1998", 0),
    ("banana", "bananas", 1 - 1 / 7),
    ("banana", "BANANA", 1),
    ("abcd", "abxx", 0),  # a distance of exactly half is out
    ("abcde", "abcxx", 1 - 2 / 5),
    ("abc", "abx", 1 - 1 / 3),
    ("ab", "ax", 0),
    ("a", "b", 0),
    ("a", "a.", 1),
    ("kitten", "sitting", 1 - 3 / 7),
    ("flaw", "lawn", 0),
    ("New York City", "NewYork City", 1 - 1 / 13),
    ("New York", "New  York", 1),
    ("5", "15", 0),
    ("15", "5", 0),
    ("2019-05-01", "2019-05-07", 1 - 1 / 10),  # anls forgives digits: verdict.py may not
    ("$1,234.50", "$1,234.50", 1),
    ("北京市", "北京", 1 - 1 / 3),
    ("naïve", "naive", 1 - 1 / 5),
    ("ab", "ba", 0),
    ("abcdef", "abcdfe", 1 - 2 / 6),
    ("word", "", 0),
    ("...", "...", 1),
    ("x" * 30_000, "x" * 30_000, 1),
    ("x" * 30_000, "x" * 10_000, 0),
    ("x" * 30_000, "x" * 29_999, None),  # longer than a distance is worked out for
    ("x" * 100, "x" * 99, 1 - 1 / 100),
    ("", "a", None),
]

CASES = [
    (name, gold, prediction, None, expected)
    for name, rows in [
        ("exact", EXACT),
        ("vqa", VQA),
        ("anls", ANLS),
        ("choice", CHOICE),
        ("number", NUMBER),
        ("relaxed", RELAXED),
        ("list", LIST),
        ("box", BOX),
        ("point", POINT),
        ("math", MATH),
    ]
    for gold, prediction, expected in rows
] + [("choice", *row) for row in CHOICE_OF]
