r"""The final answer of a completion, and whether the completion kept to the format.

    style    what the prompt asked for                               found
    final    "... end with 'Final answer: ..'"                       Final answer: 9 · 答案:9
    boxed    "... put your final answer within \boxed{}"             \boxed{\frac{1}{2}}
    r1       "<think> reasoning </think>, then the boxed answer"     the box after </think>
    letter   "Answer with the option's letter"                       B · (B) · B. · The answer is B
    auto     not known: the last "Final answer:" or \boxed{} wins, then a closing "the answer
             is ..", then a completion that is nothing but an option letter

Two findings are kept apart. `text` is the answer, wherever it could be read. `format_ok` says that
a style was followed as asked: one final answer (not several), nothing of substance after it, a
closed <think>. So a rambling completion can be correct and still not be a good example to learn
from. Text inside <think>..</think> never counts as an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from rewards.markup import brace_end, clean

Style = Literal["final", "boxed", "r1", "letter", "prose", "none"]
STYLES = ("auto", "final", "boxed", "r1", "letter", "short", "box")

# The marker may be bold or a heading ("**Final Answer:** 9"), its colon half or full width.
_MARKER = re.compile(
    r"(?:final\s{1,3}answer|(?:最终|最后的?|正确)?答案)\s{0,3}(?:\*{1,2}\s{0,3})?[:：]|(?:最终|正确)?答案[是为]",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
# "the answer is 9"; "the correct option is (B)", "故选 B" (an option must go with its letter)
_PROSE = re.compile(
    r"\banswer\s{1,3}(?:is|would be)\s{0,3}[:：]?|\banswer\s{0,3}[:：]"
    r"|\b(?:option|choice)\s{1,3}(?:is|would be)\s{0,3}[:：]?(?=\s{0,3}[(\[*]{0,3}[A-Z]\b)"
    r"|(?:答案|选项|选择?)\s{0,3}[:：]?(?=\s{0,3}[(（\[*]{0,3}[A-Z](?![A-Za-z]))",
    re.IGNORECASE,
)
_PROSE_LETTER = re.compile(r"[(\[（*]{0,3}([A-Z])(?:[)\]）*]{1,3}|(?=[.。,，:：;]|\s|$))(?=\W|$)")
_LETTER = re.compile(r"[(\[（]?([A-Z])[)\]）]?[.。:：,，]?")
_LETTER_THEN_TEXT = re.compile(r"\(?[A-Z](?:\)[.:]?|[.:：、])\s{0,3}\S.*")
_CLOSERS = " \t\r\n*_`.。$"  # what may stand after an answer without being more text


@dataclass(frozen=True)
class Extraction:
    """What was read from one completion.

    text: the final answer without markdown and closing punctuation, None where there is none.
    style: where it was found ("prose": "the answer is ..", which no prompt style asks for).
    format_ok: a prompt style was followed as asked. fault: why it was not, or why nothing was read.
    """

    text: str | None
    style: Style
    format_ok: bool
    fault: str | None = field(default=None, compare=False, repr=False)


NOTHING = Extraction(None, "none", False)


def extract(completion: str, style: str = "auto") -> Extraction:
    r"""The final answer of a completion under one prompt style; the last occurrence wins.

    Raises ValueError for an unknown style.

    >>> extract("7 + 2 = 9. **Final Answer:** 9.")
    Extraction(text='9', style='final', format_ok=True)
    >>> extract(r"<think>2 or \boxed{3}?</think> It is \boxed{\frac{1}{2}}.", "r1").text
    '\\frac{1}{2}'
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown; one of: {', '.join(STYLES)}")
    if style in ("short", "box"):
        return Extraction(clean(completion) or None, "prose", format_ok=bool(clean(completion)))
    if style == "letter":
        return _letter(_after_think(completion) or "", anywhere=True)
    if style == "final":
        return _final(_after_think(completion) or "")
    if style == "boxed":
        return _boxed(_after_think(completion) or "")
    if style == "r1" or "<think>" in completion or "</think>" in completion:
        return _r1(completion, strict_box=style == "r1")
    return _auto(completion)


def _after_think(completion: str) -> str | None:
    """The text after the last </think>; None while the thinking was never closed."""
    if "</think>" in completion:
        rest = completion.rpartition("</think>")[2]
        return None if "<think>" in rest else rest
    return None if "<think>" in completion else completion


_MAX_OPEN_BOXES = 8  # each unclosed box costs a scan of the rest: hostile input stays linear


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each complete, outermost \boxed{} of a text."""
    found = []
    position = unclosed = 0
    while unclosed < _MAX_OPEN_BOXES and (opening := _BOX.search(text, position)):
        end = brace_end(text, opening.end())
        if end is None:
            unclosed += 1
            position = opening.end()
            continue
        found.append((opening.start(), end, text[opening.end() : end - 1]))
        position = end
    return found


def _boxed(text: str) -> Extraction:
    boxes = _boxes(text)
    if not boxes:
        return NOTHING
    answer = clean(boxes[-1][2])
    if not answer:
        return NOTHING
    opened = len(_BOX.findall(text))
    return Extraction(answer, "boxed", format_ok=opened == 1)


def _answer_line(rest: str) -> tuple[str, bool]:
    """The answer after a marker, and whether anything of substance follows it."""
    boxes = _boxes(rest)
    if boxes:
        tail = rest[boxes[-1][1] :]
        return clean(boxes[-1][2]), bool(tail.strip(_CLOSERS + "\\)]"))
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        lead = rest.lstrip(" \t\r\n*")
        if lead.startswith(opening) and closing in lead[2:]:
            block, _, tail = lead[2:].partition(closing)
            return clean(block), bool(tail.strip(_CLOSERS))
    lines = rest.splitlines()
    for index, line in enumerate(lines):
        if line.strip(" \t*_`"):
            return clean(line), bool("".join(lines[index + 1 :]).strip(_CLOSERS))
    return "", False


def _final(text: str) -> Extraction:
    markers = list(_MARKER.finditer(text))
    if not markers:
        return NOTHING
    answer, more = _answer_line(text[markers[-1].end() :])
    if not answer:
        return NOTHING
    return Extraction(answer, "final", format_ok=len(markers) == 1 and not more)


def _r1(completion: str, *, strict_box: bool) -> Extraction:
    rest = _after_think(completion)
    if rest is None:
        return NOTHING
    found = _boxed(rest)
    if found.text is None:
        found = _auto(rest)
        if found.text is None:
            return NOTHING
        format_ok = found.format_ok and not strict_box
    else:
        format_ok = found.format_ok
    one_block = completion.count("<think>") == 1 and completion.count("</think>") == 1
    opens = completion.lstrip().startswith("<think>")
    return Extraction(found.text, "r1", format_ok=format_ok and one_block and opens)


def _auto(text: str) -> Extraction:
    marker = _last(_MARKER, text)
    boxes = _boxes(text)
    if marker is None:
        return _boxed(text) if boxes else _letter(text, anywhere=False)
    if boxes and _stands_apart(text, marker.end(), boxes[-1][0]):
        found = _boxed(text)
        return Extraction(found.text, found.style, format_ok=False)  # two answers, one was asked
    found = _final(text)
    return found if found.text is not None else _boxed(text)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    return last


def _stands_apart(text: str, marker_end: int, box_start: int) -> bool:
    """Whether a box comes after the marker's own answer (an answer of its own, later)."""
    return box_start >= marker_end and "\n" in text[marker_end:box_start].strip(" \t\r\n*$")


def _letter(text: str, *, anywhere: bool) -> Extraction:
    """An option letter, alone or after a closing "the answer is".

    After "the answer is" any answer is read, not letters only: it is legible, though no style
    asks for it (format_ok False). anywhere: a letter alone in the last line counts too.
    """
    whole = clean(text)
    if not whole:
        return NOTHING
    if _LETTER.fullmatch(whole) or ("\n" not in whole and _LETTER_THEN_TEXT.fullmatch(whole)):
        return Extraction(_bare_letter(whole), "letter", format_ok=True)
    last_line = whole.splitlines()[-1]
    if phrase := _last(_PROSE, last_line):
        answer = last_line[phrase.end() :].strip()
        head = _PROSE_LETTER.match(answer)
        # "the answer is A red bar" names no option: A and I are words too
        if head and not (head.group(1) in "AI" and re.match(r"\s+[a-z]", answer[head.end() :])):
            tail = answer[head.end() :].strip(_CLOSERS + ")")
            return Extraction(head.group(1), "letter", format_ok=not tail)
        if answer := clean(answer):
            return Extraction(answer, "prose", format_ok=False)
    last_line = clean(last_line)
    if anywhere and _LETTER.fullmatch(last_line):
        return Extraction(_bare_letter(last_line), "letter", format_ok=False)
    return NOTHING


def _bare_letter(text: str) -> str:
    alone = _LETTER.fullmatch(text)
    return alone.group(1) if alone else text
