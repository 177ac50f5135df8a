"""What holds for any completion, gold and matcher (hypothesis), through the public interface."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import MATCHERS, STYLES, CannotJudge, extract, verify

# "math" runs in a process of its own, tests/test_rewards_pool.py; here only what it reads at once
RULES = sorted(set(MATCHERS) - {"math"})
TEXT_MATCHERS = ["exact", "vqa", "anls", "relaxed"]

PIECES = [
    "Final answer:", "答案：", "答案是", "\\boxed{", "}", "<think>", "</think>", "<answer>",
    "the answer is ", "(B)", "B", "故选", "<box>[[", "]]</box>", "\n", "**", "`", "$", "$$", "|",
    "9", "1,234", "50%", "1/0", "[", "]", "{", '"', "\\", "\\frac{", " ", ". ", "#### ", "or", "-",
    "\ud800", "\x00", "\u202e", "\u200b", "İ", "½", "①", "九", "^", "_", "e9999999",
    "9" * 5000, "(" * 300, "[" * 3000,
]  # fmt: skip
# characters of every category, lone surrogates too
TEXT = (
    st.text(st.sampled_from("aZ9 .,:-+/\\{}()$%*^_=\n'\"答案：<>é\u202e"), max_size=40)
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
)


def settled(examples: int) -> settings:
    """So many examples, however long one takes on a busy machine."""
    return settings(max_examples=examples, deadline=None)


# Answers as people and models write them, by the matcher that reads them

NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.integers(-(10**12), 10**12).map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=3).map(str),
    st.integers(1, 999).map("{}%".format),
    st.integers(1, 999).map("${}".format),
    st.tuples(st.integers(-99, 99), st.sampled_from(["cm", "km/h", "kg", "厘米", "million"])).map(
        lambda pair: f"{pair[0]} {pair[1]}"
    ),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.integers(1, 99).map("\\frac{{1}}{{{}}}".format),
)
LETTER = st.sampled_from("ABCDEFGH")
LETTERS = st.tuples(
    LETTER, st.sampled_from(["{}", "({})", "{}.", "{})", "Option {}", "（{}）"])
).map(lambda pair: pair[1].format(pair[0]))
WORDS = st.sampled_from(
    [
        "red", "the red bar", "Paris", "St. Louis", "U.S. Steel", "Dr. Smith", "New York City",
        "红色", "3 Doors Down", "May 12, 1998", "J. R. R. Tolkien", "blue-green", "don't know",
        "一只狗", "C++",
    ]
)  # fmt: skip
LISTS = st.lists(WORDS, min_size=2, max_size=4, unique=True).map(
    lambda items: json.dumps(items, ensure_ascii=False)
) | st.lists(st.sampled_from(["red", "blue", "a dog", "12"]), min_size=2, unique=True).map(
    ", ".join
)
CORNER = st.integers(0, 400)
BOXES = st.tuples(CORNER, CORNER, CORNER, CORNER).map(
    lambda c: f"<box>[[{c[0]}, {c[1]}, {c[0] + c[2] + 1}, {c[1] + c[3] + 1}]]</box>"
)
POINTS = st.tuples(CORNER, CORNER).map(lambda c: f"<point>[[{c[0]}, {c[1]}]]</point>")
ATOMS = st.sampled_from(["x", "y", "2", "3", "\\pi", "\\sqrt{5}"])
FORMULAS = st.recursive(
    ATOMS,
    lambda inner: st.tuples(
        inner, inner, st.sampled_from(["{} + {}", "\\frac{{{}}}{{{}}}", "({})^{{{}}}"])
    ).map(lambda parts: parts[2].format(parts[0], parts[1])),
    max_leaves=4,
)
WRITTEN = {
    "exact": WORDS,
    "vqa": WORDS,
    "anls": WORDS,
    "relaxed": NUMBERS | WORDS,
    "number": NUMBERS,
    "choice": LETTERS,
    "list": LISTS,
    "box": BOXES,
    "point": POINTS,
    "math": FORMULAS,
}
ANSWERS = st.sampled_from(sorted(WRITTEN)).flatmap(
    lambda name: st.tuples(st.just(name), WRITTEN[name])
)


# match(x, x)


@settled(200)
@given(text=TEXT, matcher=st.sampled_from(RULES))
def test_any_text_matches_itself(text, matcher):
    try:
        score = MATCHERS[matcher](text, text, None)
    except CannotJudge:
        if matcher in TEXT_MATCHERS:  # only what shows nothing: spaces, controls, directions
            assert not any(char.isprintable() and not char.isspace() for char in text), matcher
    else:
        assert score == 1.0


@settled(200)
@given(answer=ANSWERS)
def test_a_written_answer_matches_itself(answer):
    matcher, text = answer
    assert MATCHERS[matcher](text, text, None) == 1.0


@settled(150)
@given(answer=ANSWERS.filter(lambda answer: answer[0] != "math"))
def test_a_completion_that_ends_with_the_gold_is_correct(answer):
    matcher, gold = answer
    verdict = verify(f"I look at the picture.\n\n**Final Answer:** {gold}", gold, matcher=matcher)
    assert (verdict.outcome, verdict.score, verdict.format_ok) == ("correct", 1.0, True)


@settled(100)
@given(value=st.integers(-(10**9), 10**9))
def test_thousands_separators_are_read_back(value):
    for matcher in ("number", "relaxed"):
        assert MATCHERS[matcher](f"{value:,}", str(value), None) == 1.0
        assert MATCHERS[matcher](f"{value + abs(value) + 1:,}", str(value), None) == 0.0


# No input raises, and a verdict is in order


@settled(300)
@given(
    completion=TEXT,
    gold=TEXT,
    style=st.sampled_from(STYLES),
    matcher=st.sampled_from([None, *RULES]),
    options=st.none() | st.lists(TEXT, min_size=1, max_size=4),
    marked=st.booleans(),
)
def test_no_input_raises(completion, gold, style, matcher, options, marked):
    if matcher is None and not options:
        matcher = "exact"  # or a formula would be chosen math
    completion = f"Final answer: {completion}" if marked else completion
    verdict = verify(completion, gold, style=style, matcher=matcher, options=options)
    assert (verdict.score is None) == (verdict.outcome in ("cannot_judge", "timeout"))
    assert (verdict.extracted is None) == (verdict.outcome == "no_answer")
    assert verdict.extracted is None or verdict.extracted.strip()
    assert verdict.format_ok is False or verdict.extracted is not None
    if verdict.score is not None:
        assert 0.0 <= verdict.score <= 1.0
        accepted = verdict.score >= MATCHERS[verdict.matcher].least
        assert accepted == (verdict.outcome == "correct")


# Neither space nor markdown around a completion or an answer changes a verdict

AROUND = [
    "{}", " {} ", "\n\n{}\n", "**{}**", "_{}_", "`{}`", "> {}", "- {}", "# {}", "\u200b{}\ufeff",
]  # fmt: skip
TEMPLATES = [
    ("Final answer: {}", "final"), ("It is tall.\n\nFinal Answer:\n{}", "final"),
    ("答案：{}", "final"), ("图中是红色。\n最终答案：{}", "final"),
    ("It is \\boxed{{{}}}.", "boxed"),
    ("<think>Hm.</think>\n\\boxed{{{}}}", "r1"), ("<think>嗯</think><answer>{}</answer>", "r1"),
    ("{}", "short"), ("Final answer: {}", "auto"), ("The final answer is: {}", "auto"),
    ("### Final Answer\n\n{}", "auto"), ("故答案为：{}", "auto"), ("So \\boxed{{{}}}", "auto"),
    ("<think>No: \\boxed{{0}}</think>Final answer: {}", "auto"),
]  # fmt: skip
LETTER_TEMPLATES = [
    "{}", "({})", "{}.", "The answer is {}.", "The correct option is ({}).", "**Answer:** {}",
    "Option {} is correct.", "I choose {}.", "Final answer: {}", "Therefore, the answer is: {}",
    "It is tall, so ({}) is the right answer.", "A is small, but I'd go with option {}",
    "故选 {}。", "所以答案是 {}。", "选项{}正确。", "因此正确答案为（{}）。", "我选择{}",
    "答案选{}",
]  # fmt: skip
SENTENCES = [("The answer is {}", "auto"), ("I cannot tell.", "auto")]
SENTENCES += [(template, style) for template in LETTER_TEMPLATES for style in ("auto", "letter")]


@settled(300)
@given(
    answer=WORDS | NUMBERS | LETTERS,
    template=st.sampled_from(TEMPLATES) | st.sampled_from(SENTENCES),
    around=st.lists(st.sampled_from(AROUND), max_size=3),
)
def test_markup_around_a_completion_changes_nothing(answer, template, around):
    completion = template[0].format(answer)
    wrapped = completion
    for layer in around:
        core = wrapped.strip()
        if layer.strip()[0] not in core[0] + core[-1]:  # "_" inside "_.._" closes it
            wrapped = layer.format(wrapped)
    for gold in (answer, "zebra"):
        told = verify(completion, gold, style=template[1], matcher="exact")
        assert verify(wrapped, gold, style=template[1], matcher="exact") == told, wrapped


@settled(200)
@given(text=TEXT, space=st.text(st.sampled_from(" \n\t\r\u3000\xa0\u200b\u200e"), max_size=5))
def test_space_around_any_completion_changes_nothing(text, space):
    for style in STYLES:
        assert extract(space + text + space, style) == extract(text, style), style


@settled(100)
@given(
    answer=st.sampled_from(["9", "red", "B", "-3.5", "12 cm", "\\frac{1}{2}"]),
    around=st.sampled_from(["{}", "**{}**", "  {}  ", "${}$", "`{}`", "{}.", "\\text{{{}}}"]),
    tail=st.sampled_from(["", "\n", "  ", "\n\n"]),
)
def test_markup_around_an_answer_changes_nothing(answer, around, tail):
    assert verify(f"So. Final answer: {around.format(answer)}{tail}", answer).outcome == "correct"
    assert verify(f"So. Final answer: {around.format('zebra')}{tail}", answer).outcome == "wrong"


# Symmetry


@settled(200)
@given(
    text=TEXT,
    other=TEXT,
    change=st.sampled_from(
        [None, str.upper, str.lower, str.strip, "**{}**".format, "the {}".format]
    ),
    matcher=st.sampled_from(["exact", "vqa"]),
)
def test_equality_of_texts_has_no_direction(text, other, change, matcher):
    other = other if change is None else change(text)
    try:
        there = MATCHERS[matcher](text, other, None)
        back = MATCHERS[matcher](other, text, None)
    except CannotJudge:
        return
    assert there == back


@settled(200)
@given(
    values=st.tuples(*[st.sampled_from([0, 1, 2, 100, 200])] * 2),  # 1 is 1% and 100%
    forms=st.tuples(
        *[st.sampled_from(["{}", "{}.0", "{}%", "{} cm", "{} m", "${}", "x = {}"])] * 2
    ),
)
def test_equality_of_numbers_has_no_direction(values, forms):
    one, other = (form.format(value) for form, value in zip(forms, values, strict=True))
    assert MATCHERS["number"](one, other, None) == MATCHERS["number"](other, one, None)
    if forms[0] == forms[1]:
        assert MATCHERS["number"](one, other, None) == float(values[0] == values[1])


# Options


@settled(150)
@given(
    options=st.lists(WORDS, min_size=2, max_size=6, unique=True),
    picks=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    said=st.sampled_from(["{letter}", "({letter})", "{letter}. {text}", "{text}"]),
    seed=st.integers(0, 99),
)
def test_the_order_of_the_options_changes_no_verdict(options, picks, said, seed):
    wanted, given_ = (options[pick % len(options)] for pick in picks)
    shuffled = random.Random(seed).sample(options, len(options))
    for order in (options, shuffled):
        letter = "ABCDEF"[order.index(given_)]
        completion = f"Final answer: {said.format(letter=letter, text=given_)}"
        for gold in (wanted, "ABCDEF"[order.index(wanted)]):
            verdict = verify(completion, gold, options=order)
            assert verdict.outcome == ("correct" if wanted == given_ else "wrong"), completion


# What is rendered is read back


@settled(400)
@given(answer=WORDS | NUMBERS | LISTS | BOXES, template=st.sampled_from(TEMPLATES))
def test_an_answer_in_a_template_is_read_back(answer, template):
    found = extract(template[0].format(answer), template[1])
    assert (found.text, found.format_ok, found.fault) == (answer, True, None)


@settled(150)
@given(
    letter=LETTER,
    template=st.sampled_from(LETTER_TEMPLATES),
    style=st.sampled_from(["auto", "letter"]),
)
def test_a_letter_in_a_template_is_read_back(letter, template, style):
    found = extract(template.format(letter), style)
    assert (found.text, found.format_ok) == (letter, True)


@settled(100)
@given(places=st.lists(BOXES, min_size=1, max_size=3) | st.lists(POINTS, min_size=1, max_size=3))
def test_places_are_read_back(places):
    for between in ("", ", ", " and ", "<ref>cup 2</ref>", "\n"):
        found = extract("The cups are at " + between.join(places) + ".", "box")
        assert (found.text, found.style, found.format_ok) == ("".join(places), "box", True)
