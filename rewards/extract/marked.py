r"""Answers that are marked as final: "Final answer: 9", "答案:9", \boxed{9}."""

from __future__ import annotations

import re

from rewards.extract.answers import answer_after, box_answer, boxes_opened, has_more, last_box
from rewards.extract.extraction import MORE, TWO, Extraction, found_at, nothing

# The marker may be bold or a heading ("**Final Answer** \n 9"), its colon half or full width.
# or a line of its own. Both patterns begin with plain text: that is what makes them fast.
_FINAL = re.compile(
    r"final[\s*_]{1,4}answers?(?:(?:\s{0,2}\([^()\n]{0,30}\))?(?:\s{1,3}is)?[\s*_`]{0,4}(?:[:：=→]|[-–—]\s)"
    r"|(?P<heading>[ \t*_#`.]{0,6}(?=\n)|(?:\*\*|__)[ \t]{1,4}(?=[-+$(\\\d])))"
)
_FINAL_CN = re.compile(
    r"答案(?:[\s*_`]{0,4}(?:应?[是为]|如下)?[\s*_`]{0,3}[:：=]|】[:：]?"
    r"|(?P<heading>[ \t*_#`]{0,6}(?=\n)))"
)
_BEFORE_HEADING = re.compile(
    r"[ \t>#*_`-]*(?:(?:step )?\d{1,2}[.:)] ?)?[*_]*(?:the |最终|最終|最后的?|正确)?"
)
_LETTER_AND_TEXT = re.compile(
    r"(?:[Oo]ption\s)?(\(?[A-Z]\)?)(?:\s?[(（](?!\s?(?:(?:or|and|not|maybe)\b|或|和))[^()（）]{1,200}[)）]"
    r"|\s?(?:is|是)\s?(?:the\s)?(?:correct|right|正确)(?:的|\sanswer|\soption|\schoice|答案)?)"
)
_MAX_EMPTY_MARKERS = 16
_MARKS = ("final answer", "答案", "最终答案")  # a marker at the very end is no answer of another


def marked(text: str, low: str, *, boxes: bool = True) -> Extraction:
    """The answer after the last marker, or in the last box where that comes later.

    boxes: a box that stands apart from the marker's answer counts (it does unless the prompt asked
    for the marker).
    """
    marks = _last_marks(text, low)
    has_box = "\\boxed" in text or "\\fbox" in text
    box = last_box(text) if has_box else None
    if not marks:
        return boxed(text) if boxes and has_box else nothing()
    stop = len(text)
    for start, end in reversed(marks):
        inside = box is not None and end <= box[0] < stop
        apart = inside and box is not None and _stands_apart(text[end : box[0]])
        if box is not None and inside and apart and boxes:
            return found_at(box_answer(box[2]), "boxed", TWO)
        if box is not None and inside and not apart:
            answer, more = box_answer(box[2]), has_more(text[box[1] : stop])
            several = boxes_opened(text[end:stop]) > 1
        else:
            answer, more = answer_after(text[end:stop])
            several = False
        if answer and answer.lower() not in _MARKS:
            fault = TWO if len(marks) > 1 or several else MORE if more else None
            return found_at(_bare_letter(answer), "final", fault)
        stop = start
    found = boxed(text) if boxes else nothing()
    return found if found.text is not None else nothing("nothing follows the final answer's marker")


def _last_marks(text: str, low: str) -> list[tuple[int, int]]:
    """The last markers of a text, in order: more than anybody writes, but not a million."""
    found = [*_FINAL.finditer(low)] if "final" in low else []
    if "答案" in text:
        found += _FINAL_CN.finditer(low)
        found.sort(key=re.Match.start)
    marks: list[tuple[int, int]] = []
    for mark in reversed(found):
        if _is_mark(mark):
            marks.append(mark.span())
            if len(marks) == _MAX_EMPTY_MARKERS:
                break
    return marks[::-1]


def _is_mark(mark: re.Match[str]) -> bool:
    """Whether a marker without a colon has its line to itself."""
    if mark["heading"] is None:
        return True
    line = mark.string[max(0, mark.start() - 24) : mark.start()].rpartition("\n")
    if mark.start() > 24 and not line[1]:
        return False
    return _BEFORE_HEADING.fullmatch(line[2]) is not None


def _bare_letter(answer: str) -> str:
    """ "B" of "B (red)" and of "B is correct"; any other answer as it is."""
    if answer[-1] not in ")）terne的确案" or len(answer) < 3:
        return answer
    found = _LETTER_AND_TEXT.fullmatch(answer)
    return found[1] if found else answer


def _stands_apart(between: str) -> bool:
    """Whether a box is an answer of its own, by the text between the marker and it."""
    between = between.strip(" \t\n*$")
    return "\n" in between and not between.endswith((":", "：", "=", " is", " are"))


def boxed(text: str) -> Extraction:
    if "\\boxed" not in text and "\\fbox" not in text:
        return nothing("nothing is boxed, as style boxed asks")
    box = last_box(text)
    answer = box_answer(box[2]) if box else ""
    if not answer:
        return nothing("the box is empty or never closed")
    return found_at(answer, "boxed", TWO if boxes_opened(text) > 1 else None)
