"""Matchers of texts: exact, VQA's normalisation, ANLS."""

from __future__ import annotations

import re
import unicodedata

from rapidfuzz.distance import Levenshtein

from rewards.markup import clean
from rewards.quantities import NUMBER_WORDS
from rewards.reasons import CannotJudge, Options

ANLS_THRESHOLD = 0.5  # Biten et al. 2019, tau

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


def match_anls(prediction: str, gold: str, options: Options = None) -> float:
    """ANLS of one pair: 1 - d / max length, 0 when d / max length reaches 0.5.

    d is the Levenshtein distance of the case-folded texts. (The published pipeline scores
    d / length itself, so that "banana" matches "1998" and an exact answer fails.)
    Raises CannotJudge for an empty gold.
    """
    wanted = _require(gold, normalise(gold))
    distance = Levenshtein.normalized_distance(normalise(prediction), wanted)
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0
