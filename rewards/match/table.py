r"""Does a prediction match a gold answer? Pure functions (prediction, gold, options) -> score.

    name     decides                                              source
    exact    equal after normalisation                            SQuAD-style exact match
    vqa      equal after VQA normalisation                        VQA v2 evaluation (Antol et al.)
    choice   the option, by letter or by its text                 ScienceQA, AI2D, MMMU practice
    number   numbers with units, percent, thousands separators    exact fractions, no tolerance
    relaxed  within 5% of the gold number, years exactly          ChartQA (Masry et al. '22)
    anls     1 - distance / length, 0 from a distance of half on  DocVQA (Biten et al. '19), eq. 1-2
    math     mathematical equality                                math-verify (see maths.py)
    list     the same items in any order                          SROIE (Huang et al. '19), task 3
    box      intersection over union, a match from 0.5 on         RefCOCO's Acc@0.5 (Yu et al. '16)
    point    inside the gold box, or near the gold point          ScreenSpot (Cheng et al. '24)

A score is in [0, 1]; `Matcher.least` is the least score that is a match. A gold answer that means
nothing to its matcher raises `CannotJudge`: the prediction is then neither right nor wrong.
No text is ever evaluated as code, and a gold answer that merely occurs inside the prediction
("5" in "15") is no match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rewards.match.choices import match_choice
from rewards.match.grounding import BOX_THRESHOLD, match_box, match_point
from rewards.match.lists import match_list
from rewards.match.maths import decide_early, match_math
from rewards.match.numbers import match_number, match_relaxed
from rewards.match.reasons import Options
from rewards.match.texts import ANLS_THRESHOLD, match_anls, match_exact, match_vqa


@dataclass(frozen=True)
class Matcher:
    """A way to compare a prediction with a gold answer.

    score: the pure function. least: the least score that is a match. slow: it may run for long on
    a hostile expression, and therefore runs in a process that can be killed (rewards/pool/pool.py).
    early: the score where a slow matcher's is plain without running it, else None.
    """

    score: Callable[[str, str, Options], float]
    least: float = 1.0
    slow: bool = False
    early: Callable[[str, str, Options], float | None] | None = None

    def __call__(self, prediction: str, gold: str, options: Options = None) -> float:
        """The score of a prediction; raises CannotJudge for a gold that means nothing to it."""
        return self.score(prediction, gold, options)


MATCHERS: dict[str, Matcher] = {
    "exact": Matcher(match_exact),
    "vqa": Matcher(match_vqa),
    "choice": Matcher(match_choice),
    "number": Matcher(match_number),
    "relaxed": Matcher(match_relaxed),
    "anls": Matcher(match_anls, least=ANLS_THRESHOLD),
    "math": Matcher(match_math, slow=True, early=decide_early),
    "list": Matcher(match_list),
    "box": Matcher(match_box, least=BOX_THRESHOLD),
    "point": Matcher(match_point),
}


def get_matcher(name: str) -> Matcher:
    """The matcher of that name; raises ValueError, naming the known ones, for another."""
    if name not in MATCHERS:
        raise ValueError(f"matcher {name!r} is unknown; one of: {', '.join(MATCHERS)}")
    return MATCHERS[name]
