r"""Does a prediction match a gold answer? Pure functions (prediction, gold, options) -> score.

    name     decides                                              source
    exact    equal after normalisation                            SQuAD-style exact match
    vqa      equal after VQA normalisation                        VQA v2 evaluation (Antol et al.)
    choice   the option, by letter or by its text                 ScienceQA, AI2D, MMMU practice
    number   numbers with units, percent, thousands separators    exact fractions, no tolerance
    relaxed  within 5% of the gold number, years exactly          ChartQA (Masry et al. '22)
    anls     1 - distance / length, 0 from a distance of half on  DocVQA (Biten et al. '19), eq. 1-2
    math     mathematical equality                                math-verify (see rewards/maths.py)

A score is in [0, 1]; above 0 is a match (only anls gives anything between). A gold answer that
means nothing to its matcher raises `CannotJudge`: the prediction is then neither right nor wrong.
No text is ever evaluated as code, and a gold answer that merely occurs inside the prediction
("5" in "15") is no match.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from rapidfuzz.distance import Levenshtein

from rewards.extract import clean
from rewards.maths import match_math
from rewards.quantities import NUMBER_WORDS, Number, read_number, same_number
from rewards.reasons import CannotJudge

Options = Sequence[str] | None
Matcher = Callable[[str, str, Options], float]

RELAXED_TOLERANCE = Fraction(5, 100)  # ChartQA, section 5.1
ANLS_THRESHOLD = 0.5  # Biten et al. 2019, tau
YEARS = range(1500, 2101)  # a gold integer in here is taken for a year

_SPACES = re.compile(r"\s+")


def normalise(text: str) -> str:
    """Unicode compatibility forms, case, spaces and the wrapping taken off.

    >>> normalise(" **Paris**.")
    'paris'
    """
    text = clean(unicodedata.normalize("NFKC", text))
    return _SPACES.sub(" ", text).casefold().strip()


def _require(gold: str, normalised: str) -> str:
    if not normalised:
        raise CannotJudge(f"gold answer {gold!r} is empty once normalised")
    return normalised


def match_exact(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are equal after `normalise`; raises CannotJudge for an empty gold."""
    return float(_require(gold, normalise(gold)) == normalise(prediction))


_ARTICLES = {"a", "an", "the"}
_APOSTROPHES = re.compile(r"['’`´]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"[^\w\s.%$€£°+-]|(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\d)|_")


def normalise_vqa(text: str) -> str:
    """VQA's normalisation: number words to digits, no articles, no punctuation, no apostrophes.

    The published script maps "dont" to "don't"; dropping every apostrophe makes the same pairs
    equal with no table.

    >>> normalise_vqa("The two dogs, don't!")
    '2 dogs dont'
    """
    text = _APOSTROPHES.sub("", normalise(text))
    text = _PUNCTUATION.sub(" ", _THOUSANDS.sub("", text))
    words = (str(NUMBER_WORDS.get(word, word)) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def match_vqa(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are equal after `normalise_vqa`; raises CannotJudge for an empty gold.

    The benchmark's min(1, votes / 3) over ten annotators is an average over golds; here a list of
    golds means "any of these is right".
    """
    normalised = normalise_vqa(gold) or normalise(gold)  # a gold that is only an article: "a"
    return float(_require(gold, normalised) == (normalise_vqa(prediction) or normalise(prediction)))


_OPTION_LETTER = re.compile(
    r"(?:(?:option|choice|选项)\s{0,3})?[(\[（]?([A-Za-z])(?:[)\]）][.:：]?|[.:：、)])?",
    re.IGNORECASE,
)
_OPTION_BOTH = re.compile(r"[(\[（]?([A-Za-z])(?:[)\]）][.:：]?|[.:：、])\s{0,3}(\S.*)", re.DOTALL)


def option_letter(text: str) -> str | None:
    """The letter of "B", "(B)", "B.", "Option B", "B. Paris"; None for other text."""
    text = clean(text)
    if alone := _OPTION_LETTER.fullmatch(text):
        return alone.group(1).upper()
    both = _OPTION_BOTH.fullmatch(text)
    return both.group(1).upper() if both else None


def _option_texts(options: Sequence[str]) -> list[str]:
    """The options without their own letters ("A. Paris" at place 0 is "paris")."""
    texts = []
    for index, option in enumerate(options):
        both = _OPTION_BOTH.fullmatch(clean(option))
        own = both is not None and both.group(1).upper() == chr(ord("A") + index)
        texts.append(normalise(both.group(2) if both and own else option))
    return texts


def _chosen_option(text: str, texts: list[str]) -> str | None:
    """The letter that a text names: by letter, by the option's text, or both if they agree."""
    whole = clean(text)
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    if (alone := _OPTION_LETTER.fullmatch(whole)) and alone.group(1).upper() in letters:
        return alone.group(1).upper()
    if normalise(whole) in texts:
        return letters[texts.index(normalise(whole))]
    if both := _OPTION_BOTH.fullmatch(whole):
        letter, rest = both.group(1).upper(), normalise(both.group(2))
        contradicts = rest in texts and letters[texts.index(rest)] != letter
        return letter if letter in letters and not contradicts else None
    return None


def match_choice(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both name the same option.

    With `options` either may be the letter or the option's text. Raises CannotJudge when the gold
    names no option (or, without options, is no letter).
    """
    if options:
        texts = _option_texts(options)
        wanted = _chosen_option(gold, texts)
        if wanted is None:
            raise CannotJudge(f"gold answer {gold!r} is none of the {len(texts)} options")
        return float(_chosen_option(prediction, texts) == wanted)
    wanted = option_letter(gold)
    if wanted is None:
        raise CannotJudge(f"gold answer {gold!r} is no option letter, and no options are given")
    return float(option_letter(prediction) == wanted)


def _gold_number(gold: str) -> Number:
    number = read_number(gold)
    if number is None:
        raise CannotJudge(f"gold answer {gold!r} is not a number")
    return number


def match_number(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are the same number, in units that do not contradict each other.

    A unit missing on one side is forgiven, another unit is not. Raises CannotJudge when the gold
    is no number.
    """
    wanted = _gold_number(gold)
    given = read_number(prediction)
    return float(given is not None and same_number(given, wanted))


def match_relaxed(prediction: str, gold: str, options: Options = None) -> float:
    """ChartQA's relaxed accuracy: within 5% of a gold number, equal text otherwise.

    A gold year (a plain integer in 1500..2100) and a gold zero must be met exactly.
    Raises CannotJudge for an empty gold.
    """
    wanted = read_number(gold)
    if wanted is None:
        return match_exact(prediction, gold)
    given = read_number(prediction)
    if given is None:
        return 0.0
    if same_number(given, wanted):
        return 1.0
    year = re.fullmatch(r"\d{4}", gold.strip()) is not None and int(gold) in YEARS
    if year or wanted.value == 0 or wanted.unit_differs(given):
        return 0.0
    allowed = abs(wanted.value) * RELAXED_TOLERANCE
    return float(any(abs(value - wanted.value) <= allowed for value in given.readings(wanted)))


def match_anls(prediction: str, gold: str, options: Options = None) -> float:
    """ANLS of one pair: 1 - d / max length, 0 when d / max length reaches 0.5.

    d is the Levenshtein distance of the case-folded texts. (The published pipeline scores
    d / length itself, so that "banana" matches "1998" and an exact answer fails.)
    Raises CannotJudge for an empty gold.
    """
    wanted = _require(gold, normalise(gold))
    distance = Levenshtein.normalized_distance(normalise(prediction), wanted)
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


MATCHERS: dict[str, Matcher] = {
    "exact": match_exact,
    "vqa": match_vqa,
    "choice": match_choice,
    "number": match_number,
    "relaxed": match_relaxed,
    "anls": match_anls,
    "math": match_math,
}


def get_matcher(name: str) -> Matcher:
    """The matcher of that name; raises ValueError, naming the known ones, for another."""
    if name not in MATCHERS:
        raise ValueError(f"matcher {name!r} is unknown; one of: {', '.join(MATCHERS)}")
    return MATCHERS[name]
