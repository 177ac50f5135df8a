"""Matchers of texts: exact, VQA's normalisation, ANLS."""

from __future__ import annotations

import re

from rapidfuzz.distance import Levenshtein

from rewards.markup import clean, fold
from rewards.match.number_words import NUMBER_WORDS, english_runs
from rewards.match.reasons import CannotJudge, Options

ANLS_THRESHOLD = 0.5  # Biten et al. 2019, tau
MAX_ANLS = 20_000  # characters of a gold; a distance costs their square / 64


def normalise(text: str) -> str:
    """Unicode compatibility forms, case, spaces and the wrapping taken off.

    A text that is nothing but wrapping ("*", "...") is itself; only a blank one is empty.

    >>> normalise(" **Paris**."), normalise("*")
    ('paris', '*')
    """
    folded = text if text.isascii() else fold(text)
    return " ".join((clean(folded) or folded.strip(" \t\r\n*`") or folded).split()).casefold()


def _require(gold: str, normalised: str) -> str:
    if not normalised:
        raise CannotJudge(f"gold answer {gold[:40]!r} is empty")
    return normalised


def match_exact(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are equal after `normalise`; raises CannotJudge for a blank gold.

    Source: SQuAD's exact match (Rajpurkar et al. 2016), but articles and punctuation inside the
    text count: an answer "the bar" to "bar" is for vqa or anls to accept.
    """
    return float(_require(gold, normalise(gold)) == normalise(prediction))


_ARTICLES = {"a", "an", "the"}
_APOSTROPHES = re.compile(r"['’`´]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PERIODS = re.compile(r"\.(?!\d)")
# what the published script lists, and its full-width and typographic kin; a sign before a digit,
# a slash or a colon between digits and the plus of "C++" stay, for they carry meaning
_PUNCTUATION = re.compile(
    r"[;\[\]\"{}()=\\_><@,?!“”„«»《》「」、。·…*~|]|(?<!\d)[/:]|[/:](?!\d)|(?<=\w)-|-(?!\d)"
)
_MARK = re.compile(r"[^\w ]|_")


def normalise_vqa(text: str) -> str:
    """VQA's normalisation: number words to digits, no articles, no punctuation, no apostrophes.

    Rules of the VQA v2 evaluation (Antol et al. 2015): commas of thousands and periods that no
    digit follows are dropped, other punctuation parts words. Different from the published script:
    "dont" = "don't" by dropping every apostrophe instead of a table; number words go beyond ten;
    the sign of "-3" stays.

    >>> normalise_vqa("The twenty-one dogs, don't!")
    '21 dogs dont'
    """
    text = normalise(text)
    if _MARK.search(text):
        text = _THOUSANDS.sub("", _APOSTROPHES.sub("", text))
        text = _PUNCTUATION.sub(" ", _PERIODS.sub("", text))
    words = text.split()
    if not NUMBER_WORDS.isdisjoint(words):
        words = english_runs([word for word in words if word not in _ARTICLES])
    return " ".join(["0" if word == "none" else word for word in words if word not in _ARTICLES])


def match_vqa(prediction: str, gold: str, options: Options = None) -> float:
    """1.0 when both are equal after `normalise_vqa`; raises CannotJudge for a blank gold.

    The benchmark's min(1, votes / 3) over ten annotators is an average over golds; here a list of
    golds means "any of these is right".
    """
    wanted = normalise_vqa(gold) or normalise(gold)  # a gold that is only an article: "a"
    return float(_require(gold, wanted) == (normalise_vqa(prediction) or normalise(prediction)))


def match_anls(prediction: str, gold: str, options: Options = None) -> float:
    """ANLS of one pair: 1 - d / max length, 0 when d / max length reaches 0.5.

    d is the Levenshtein distance of the normalised texts (Biten et al. 2019, eq. 1-2; the best of
    several golds is taken by the caller). The published pipeline scores d / length itself, so that
    "banana" matches "1998" and an exact answer fails.
    Raises CannotJudge for a blank gold, or one of more than 20,000 characters.
    """
    wanted, given = _require(gold, normalise(gold)), normalise(prediction)
    if wanted == given:
        return 1.0
    longest = max(len(wanted), len(given))
    most = (longest - 1) // 2  # the largest distance below half
    if abs(len(wanted) - len(given)) > most:
        return 0.0
    if len(wanted) > MAX_ANLS:
        raise CannotJudge(f"gold answer has {len(wanted)} characters (limit {MAX_ANLS})")
    distance = Levenshtein.distance(given, wanted, score_cutoff=most)
    return 1.0 - distance / longest if distance <= most else 0.0
