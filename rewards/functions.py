r"""Rewards for online RL: pure functions of completions, in the shape that TRL's trainers call.

    (prompts, completions, **columns) -> list[float | None], one each; None: does not apply

    name        value                                             columns that it reads
    accuracy    1 correct, 0 wrong or no answer, None not judged  verdicts, or answer, matcher, ..
    format      1 where the format was followed, else 0           the same, and clipped
    overlong    0 .. -1 over the last L_cache tokens              completion_ids
    repetition  0 .. max_penalty by the share of repeats          completion_ids, or the text

A prompt is a list of messages and a completion is a list of one, [{"role": "assistant", "content":
text}], as TRL hands out conversational data, so its own functions (`trl.rewards:..`) work here and
these work there; a completion that is a plain text is read, too. A column is a list as long as the
completions. A user's own function is found by `rewards.loading.load_reward`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.pool import shared_pool
from rewards.verdict import Outcome, Verdict, task_of

RewardFunction = Callable[..., "list[float | None]"]

# the weight that each has unless the user says otherwise; overlong and repetition carry their scale
BUILT_IN = {"accuracy": 1.0, "format": 0.1, "overlong": 1.0, "repetition": 1.0}
UNJUDGED = (Outcome.CANNOT_JUDGE, Outcome.TIMEOUT)

# scripts that are written without spaces: a character is a word (kana, Han, their punctuation)
_UNSPACED = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\s{_UNSPACED}]+|[{_UNSPACED}]")


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the content of its last message.

    >>> text_of([{"role": "assistant", "content": "9"}])
    '9'
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _verdicts(
    completions: Sequence[Any], verdicts: Sequence[Verdict] | None, columns: dict[str, Any]
) -> Sequence[Verdict]:
    """The verdicts that came with the completions, or those of the columns' questions."""
    if verdicts is not None:
        return verdicts
    if "answer" not in columns:
        raise ValueError("accuracy and format need the column 'answer' (or 'verdicts')")
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    records = [{name: values[i] for name, values in lists.items()} for i in range(len(completions))]
    tasks = (task_of(r, text_of(c)) for r, c in zip(records, completions, strict=True))
    return list(shared_pool().map(tasks))


def accuracy_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    verdicts: Sequence[Verdict] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 for correct, 0 for wrong or no answer, None where nothing could be judged.

    >>> accuracy_reward([""] * 2, ["Final answer: 9", "Final answer: 8"], answer=["9", "9"])
    [1.0, 0.0]
    """
    return [
        None if verdict.outcome in UNJUDGED else float(verdict.outcome == Outcome.CORRECT)
        for verdict in _verdicts(completions, verdicts, columns)
    ]


def format_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    verdicts: Sequence[Verdict] | None = None,
    clipped: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 for a completion that follows the format, else 0, whatever its answer.

    clipped: which were cut by their length; such a one never followed it, whatever it holds.
    """
    found = _verdicts(completions, verdicts, columns)
    cut = [False] * len(found) if clipped is None else clipped
    return [float(verdict.format_ok and not c) for verdict, c in zip(found, cut, strict=True)]


def overlong_reward(max_completion_length: int, soft_punish_cache: int) -> RewardFunction:
    """The soft punishment of long completions (DAPO, arXiv 2503.14476, eq. 13); in tokens.

    0 up to L_max - L_cache, then falling in a line to -1 at L_max. max_completion_length: L_max.
    soft_punish_cache: L_cache. Raises ValueError unless 0 < L_cache < L_max.

    >>> punish = overlong_reward(100, 20)
    >>> punish([""] * 3, [""] * 3, completion_ids=[[1] * 80, [1] * 90, [1] * 100])
    [0.0, -0.5, -1.0]
    """
    if not 0 < soft_punish_cache < max_completion_length:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}; the tokens over which the punishment grows "
            f"are more than 0 and fewer than max_completion_length ({max_completion_length})"
        )
    free = max_completion_length - soft_punish_cache

    def overlong(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        lengths = [len(ids) for ids in completion_ids]
        return [0.0 if n <= free else max(-1.0, (free - n) / soft_punish_cache) for n in lengths]

    return overlong


def words_of(text: str) -> list[str]:
    """The words of a text; a character where the script is written without spaces.

    >>> words_of("The bar 红色柱")
    ['The', 'bar', '红', '色', '柱']
    """
    return _WORD.findall(text)


def repeated_share(units: Sequence[Any], ngram: int) -> float:
    """1 - distinct n-grams / n-grams; 0 where there are fewer than n units.

    >>> repeated_share([5, 5, 5, 5, 5], 2)
    0.75
    """
    total = len(units) - ngram + 1
    if total < 1:
        return 0.0
    shifted = [units[start : start + total] for start in range(ngram)]
    return 1.0 - len(set(zip(*shifted, strict=True))) / total


def repetition_reward(ngram: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """The punishment of repeated n-grams (Yeo et al. 2025, arXiv 2502.03373, appendix C.2).

    max_penalty * (1 - distinct n-grams / n-grams), over token ids, or without them over words.
    Raises ValueError for an ngram under 1 and a max_penalty that is not under 0.

    >>> repetition_reward(2)([""], ["to be to be to be"])
    [-0.6]
    """
    if ngram < 1:
        raise ValueError(f"repetition_ngram is {ngram}; it is at least 1")
    if not -1e9 < max_penalty < 0:
        raise ValueError(f"repetition_max_penalty is {max_penalty:g}; a punishment is under 0")

    def repetition(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        units: Sequence[Sequence[Any]] = (
            [words_of(text_of(completion)) for completion in completions]
            if completion_ids is None
            else completion_ids
        )
        shares = [repeated_share(one, ngram) for one in units]
        return [max_penalty * share if share else 0.0 for share in shares]

    return repetition


@dataclass(frozen=True)
class RewardTerm:
    """One of the rewards that are added up.

    name: as it is logged. weight: 0 for one that is only looked at. decisive: where this term is
    None, the whole reward is.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    decisive: bool = False


def combine_rewards(
    terms: Sequence[RewardTerm], values: Sequence[Sequence[float | None]]
) -> list[float | None]:
    """The weighted sum of each completion; values: one list a term, of one value a completion.

    A None from a user's function means, as in TRL, that the term does not apply to this completion:
    it is left out, and where no term applies the reward is None. But a decisive term's None
    (accuracy's: its verdict is cannot_judge or timeout) makes the whole reward None, however well
    the format was followed: what could not be judged must count neither as right nor as wrong. A
    term of weight 0 takes no part.

    >>> terms = [RewardTerm("accuracy", accuracy_reward, 1.0, decisive=True)]
    >>> terms += [RewardTerm("format", format_reward, 0.1), RewardTerm("mine", len, 2.0)]
    >>> combine_rewards(terms, [[1.0, None, 0.0], [1.0, 1.0, 0.0], [None, 1.0, 0.25]])
    [1.1, None, 0.5]
    """
    counted = [(term, v) for term, v in zip(terms, values, strict=True) if term.weight]
    rewards: list[float | None] = []
    for index in range(len(values[0])):
        total, applied, judged = 0.0, False, True
        for term, column in counted:
            value = column[index]
            if value is None:
                judged = judged and not term.decisive
                continue
            total += term.weight * value
            applied = True
        rewards.append(total if applied and judged else None)
    return rewards
