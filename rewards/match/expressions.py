r"""A mathematical answer made ready for a LaTeX parser, and what can be said of it without one.

"sqrt(3)/2"  "2**10"  "x = 1 or x = 2"  "12 cm"  "1,234"  "50%"  "sin 30°"  ->  LaTeX
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.markup import clean, fold
from rewards.match.quantities import Number, read_number
from rewards.match.texts import normalise
from rewards.match.units import read_unit

_PLACES = 6  # decimals from which on a number may be a rounded one, as in math-verify
_LETTER_BESIDE = re.compile(r"\d\s?[A-Za-z](?![A-Za-z])|\d\s?[A-Za-z]{2,}\d")
_JOINED = re.compile(r"=|[\s}](?:and|or)[\s\\]|\bto\b|[,;]\s|:|\\pm|\bas\b")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z][a-z]{3,}(?![A-Za-z])")
_TEXT = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+){0,9}")
_FUNCTIONS = (
    "sinh cosh tanh arcsin arccos arctan sin cos tan cot sec csc ln log exp pi theta alpha beta "
    "gamma delta lambda mu sigma phi omega infty infinity sqrt pm cdot times leq geq neq"
)
_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS.split())})(?![A-Za-z])")
_NAMES_OF_TEXT = frozenset(["and", "or", "if", "in", "no", "is", *_FUNCTIONS.split()])
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"\s?(?:\^\s?(?:\{\s?\\circ\s?\}|\\circ)|°|\\degree(?:\b|s)?)")
_IN_DEGREES = re.compile(rf"(\d{{1,9}}(?:\.\d{{1,9}})?){_DEGREES.pattern}")
_TEXT_COMMAND = re.compile(
    r"\\(?:text|mathrm|mbox|textrm|textbf|textit|operatorname)\s?\{([^{}]*)\}"
)
_TAIL = re.compile(
    r"(?:\s|\\[,;:! ]|~)*\\(?:text|mathrm|mbox|textrm)\s?\{([^{}]{1,40})\}((?:\^\{?[23]\}?)?)$"
    r"|(?:\s|\\[,;:! ]|~)+([A-Za-z][A-Za-z /]{0,24}?)((?:\^\{?[23]\}?)?)$"
    r"|(?<=\d)([A-Za-z]{2,8})((?:\^\{?[23]\}?)?)$"
)
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:display|text|script)style\b|\\limits\b|~")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,12}\}")
_POWER = re.compile(r"\^\s?(-?\s?[A-Za-z0-9.]{2,}|-\s?[A-Za-z0-9])(?![A-Za-z0-9.])")
_TOWER = re.compile(r"\^([\w.]{1,40}(?:\^[\w.]{1,40}){1,9})")
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z\d\\])(\d{1,20}(?:\.\d{1,20})?)[eE]([+-]?\d{1,3})(?![\d.A-Za-z])"
)
_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3}(?: \d{3})+)(?![\d.]? ?\d)")
_MIXED = re.compile(r"(?<![\d./^])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d.])")
_APART = re.compile(r"(?<!_)\d\s+\d")  # "1 2": two numbers, of which the parser would make 3
_SHORT_FRAC = re.compile(r"\\([dtc]?frac)\s?(\d)\s+(\d)")
_CALL = re.compile(r"(?<![A-Za-z])\\?(sqrt|abs)\s?\(")
_LEAD = re.compile(  # "The area is 24", "≈ 3.5", "答案是 5"; but not "it is not 5"
    r"(?!.{0,60}\b(?i:not?|none|neither|never)\b)"
    r"[A-Za-z][A-Za-z' ]{0,40}\s(?:is|are|equals)\s*:?(?=\s)"
    r"|[\u4e00-\u9fff]{0,12}(?<!不)[是为]\s*[:：]?|\\approx|≈|\\sim\b|="
)
_NAME = re.compile(r"[A-Z]{2,12}")
_EMPTY = re.compile(r"(?:the )?(?:no (?:real )?solutions?|empty set)|none", re.IGNORECASE)
_SETS = str.maketrans(
    {sign: rf"\mathbb{{{name}}}" for sign, name in zip("ℝℤℕℚℂ", "RZNQC", strict=True)}
)
_SIGNS = str.maketrans(
    {"·": "*", "∙": "*", "⋅": "*", "−": "-", "、": ",", "，": ",", "；": ";", "：": ":", "（": "("}
    | {"）": ")", "【": "[", "】": "]", "\n": " ", "\t": " ", "$": " ", "\u2009": " ", "⁄": "/"}
)
_ROOT = re.compile(r"√\s?(?:(\d{1,20}(?:\.\d{1,20})?)|\{|(\()|([A-Za-z]))")


class Amount(NamedTuple):
    """A plain number, and how many decimals it was written with."""

    number: Number
    decimals: int


def read_amount(text: str) -> Amount | None:
    """The plain number, with its unit, that an answer is; None for any other expression.

    "12m", "5k" and "2 a" are none: a letter beside a number may be a variable.
    """
    if len(text) > 80 or _LETTER_BESIDE.search(text) or _JOINED.search(text):
        return None
    number = read_number(text)
    if number is None:
        return None
    if len(number.unit) == 2 and read_unit(number.unit, known_only=True) is None:
        return None  # "3 xy"
    decimals = re.search(r"\.(\d+)", text)
    return Amount(number, len(decimals[1]) if decimals else 0)


def same_amount(given: Amount, wanted: Amount) -> bool:
    """Equal values in units that do not contradict each other.

    A number of six decimals or more may be a rounded or cut one: "0.333333" is 1/3 (math-verify's
    rule); "0.33" is not.
    """
    if given.number.unit_differs(wanted.number):
        return False
    readings = given.number.readings(wanted.number)
    if wanted.number.value in readings:
        return True
    decimals = max(given.decimals, wanted.decimals)
    exact = wanted.number.value if given.decimals >= wanted.decimals else given.number.value
    if decimals < _PLACES or exact.denominator == 1:
        return False
    off = Fraction(1, 10**decimals)
    return any(abs(value - wanted.number.value) < off for value in readings)


def read_ratio(text: str) -> list[Fraction] | None:
    """The terms of a ratio of three or more, "1:2:3", as shares of the first; None for others.

    Ratios of two are left to the parser, for which "3:4" is 3/4.
    """
    if text.count(":") < 2 or len(text) > 80:
        return None
    terms = [read_number(term) for term in text.split(":")]
    values = [term.value for term in terms if term is not None and not term.unit]
    if len(values) < len(terms) or values[0] == 0:
        return None
    return [value / values[0] for value in values]


def is_words(text: str) -> bool:
    """Whether an answer is words ("Tuesday", "even", "\\text{isosceles}") and no expression."""
    text = clean(text)
    if _NAME.fullmatch(text):
        return True  # "ACB" is an order or a name: no product
    if _TEXT.fullmatch(text) is None or _EMPTY.fullmatch(text):
        return False
    words = re.findall(r"[^\W\d_]+", text)
    return not _NAMES_OF_TEXT.issuperset(words) and any(_is_word(word) for word in words)


def _is_word(word: str) -> bool:
    """Whether letters are a word: two small letters or more after the first ("even", not "xy")."""
    return len(word) > 2 and word[1:].islower() and word not in ("abc", "xyz", *_NAMES_OF_TEXT)


def same_words(given: str, wanted: str) -> bool:
    """Whether two answers in words are the same text."""
    return normalise(given) == normalise(wanted)


def as_latex(text: str) -> tuple[str, str] | None:
    r"""An answer as one LaTeX expression and its unit ("" for none), or None for prose.

    Source of the unit rule: an answer without its unit is the same answer, another unit is not.

    >>> as_latex("2**10 cm"), as_latex("sqrt(3)/2")
    (('2^{10}', 'cm'), ('\\sqrt{3}/2', ''))
    >>> as_latex("4 because the chart says so") is None
    True
    """
    text = clean(fold(text.translate(_SETS))).translate(_SIGNS)
    text = text.replace(r"\$", " ").replace("{,}", ",").replace("**", "^").strip()
    if lead := _LEAD.match(text):
        text = text[lead.end() :].strip()
    if _EMPTY.fullmatch(text):
        return r"\emptyset", ""
    text, unit = _without_unit(text)
    text = _TEXT_COMMAND.sub(r" \1 ", _SPACING.sub(" ", text))
    text = re.sub(r"\s*(?:或者?|和|与|及)\s*", " or ", text)
    text = _FUNCTION.sub(lambda found: "\\" + found[1].replace("infinity", "infty"), text)
    text = _ROOT.sub(_root, text)
    text = _braced_calls(re.sub(r"\\sqrt\s?(\d{2,})", r"\\sqrt{\1}", text))
    text = _SHORT_FRAC.sub(r"\\\1{\2}{\3}", text)
    if _TRIGONOMETRY.search(text):
        text = _IN_DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text)
    text = _DEGREES.sub("", text)
    if _WORD.search(_ENVIRONMENT.sub(" ", text)):
        return None
    text = _THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _POWER.sub(r"^{\1}", _TOWER.sub(_nest, text))
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    text = re.sub(r"\s+", " ", text).strip()
    return None if not text or _APART.search(text) else (text, unit)


def kind_of_list(latex: str) -> str | None:
    r"""Whether LaTeX is a "set" in braces, a "tuple" (a point, an interval), or neither.

    >>> kind_of_list(r"\{1,2\}"), kind_of_list("(1,2)"), kind_of_list("1,2")
    ('set', 'tuple', None)
    """
    latex = latex.replace(r"\left", "").replace(r"\right", "").strip()
    if "," not in latex:
        return None
    if latex.startswith(("{", r"\{")) and latex.endswith("}"):
        return "set"
    return "tuple" if latex[0] in "([" and latex[-1] in ")]" else None


def _without_unit(text: str) -> tuple[str, str]:
    """A text and the unit that it ends with; a letter of its own is one only after a number."""
    tail = _TAIL.search(text)
    if tail is None or tail.start() == 0:
        return text, ""
    command, command_power, words, words_power, attached, attached_power = tail.groups()
    name = (command or words or attached).strip(" ~.")
    power = (command_power or words_power or attached_power or "").strip("^{}")
    unit = read_unit(name + power, known_only=True)
    if unit is None or not unit or (name.lower() in _NAMES_OF_TEXT and not command):
        return text, ""
    before = text[: tail.start()]
    if not command and re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", before):
        return text, ""  # "2a m": with variables about, letters are variables
    return before.strip(), unit


def _root(found: re.Match[str]) -> str:
    number, opening, letter = found.groups()
    if opening:
        return r"\sqrt("
    return rf"\sqrt{{{number or letter}}}" if number or letter else r"\sqrt{"


def _braced_calls(text: str) -> str:
    """A text whose "sqrt(..)" and "abs(..)" are LaTeX's own."""
    while call := _CALL.search(text):  # each turn takes one away
        depth, end = 1, call.end()
        while end < len(text) and depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        inside = text[call.end() : end - 1 if depth == 0 else end]
        left, right = (r"\sqrt{", "}") if call[1] == "sqrt" else ("|", "|")
        text = text[: call.start()] + left + inside + right + text[end:]
    return text


def _nest(found: re.Match[str]) -> str:
    """A tower of powers, which is read from the right: "^a^b" as "^{a^{b}}"."""
    parts = found[1].split("^")
    return "".join("^{" + part for part in parts) + "}" * len(parts)
