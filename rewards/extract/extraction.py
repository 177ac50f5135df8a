"""What is found in a completion: the answer, where it stood, and what was wrong with the format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Style = Literal["final", "boxed", "r1", "letter", "short", "box", "prose", "none"]


@dataclass(frozen=True)
class Extraction:
    """What was read from one completion.

    text: the final answer without markdown and closing punctuation, None where there is none.
    style: where it was found ("prose": "the answer is ..", which no prompt style asks for; "short":
    the completion is nothing but the answer). format_ok: a prompt style was followed as asked.
    fault: why it was not, or why nothing was read, in one sentence.
    """

    text: str | None
    style: Style
    format_ok: bool
    fault: str | None = field(default=None, compare=False, repr=False)


NO_ANSWER = "no final answer"
UNMARKED = "the completion is an answer, but no final answer was marked"
TWO = "two final answers"
MORE = "text after the final answer"
IN_A_SENTENCE = "the answer stands in a sentence, not after 'Final answer:'"


def nothing(fault: str = NO_ANSWER) -> Extraction:
    """The finding that there is no answer."""
    return Extraction(None, "none", False, fault)


def found_at(text: str, style: Style, fault: str | None) -> Extraction:
    """An answer; the format was followed unless there is a fault."""
    return Extraction(text, style, fault is None, fault)
