r"""The final answer of a completion, and whether the completion kept to the format.

    style    what the prompt asked for                               found
    final    "... end with 'Final answer: ..'"                       Final answer: 9 · 答案:9
    boxed    "... put your final answer within \boxed{}"             \boxed{\frac{1}{2}}
    r1       "<think> reasoning </think>, then the boxed answer"     the box after </think>
    letter   "Answer with the option's letter"                       B · (B) · B. · The answer is B
    short    "Answer with a word or a phrase"                        the whole completion
    box      a place in the picture                                  <box>[[1, 2, 3, 4]]</box>
    auto     not known: the last "Final answer:" or \boxed{} wins, then the last "the answer is ..",
             then a completion that is nothing but an option's letter or a short answer (and of a
             multiple-choice question then as letter: rewards/verdict.py)

Two findings are kept apart. `text` is the answer, wherever it could be read. `format_ok` says that
a style was followed as asked: one final answer (not several), nothing of substance after it, a
closed <think>. So a rambling completion can be correct and still not be a good example to learn
from. Text inside <think>..</think> never counts as an answer. Neither finding changes with space
or markdown around the completion or around the answer.

All of it is linear in the completion's length: it runs in the caller's process, without a clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from rewards.extract.answers import MAX_ANSWER, bracket_end, has_more, has_verb, peel_line, readable
from rewards.extract.extraction import (
    IN_A_SENTENCE,
    MORE,
    NO_ANSWER,
    TWO,
    UNMARKED,
    Extraction,
    Style,
    found_at,
    nothing,
)
from rewards.extract.marked import boxed, marked
from rewards.extract.phrases import labelled, said
from rewards.extract.places import coordinates_only, lone_place, tagged_places
from rewards.extract.thinking import after_think, in_answer_tag

STYLES = ("auto", "final", "boxed", "r1", "letter", "short", "box")


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
    text = readable(completion)
    low = _lower(text)
    thought, fault = False, None
    if "think" in low and "<" in low:
        rest, fault = after_think(text, low)
        if rest is None:
            return nothing(fault or NO_ANSWER)
        thought = rest is not text
        text, low = rest, _lower(rest)
    if style == "r1" or (style == "auto" and thought):
        if not thought:
            fault = "no <think> .. </think> before the answer, as style r1 asks"
        return _r1(text, low, fault, strict=style == "r1")
    if "<answer" in low and (tagged := in_answer_tag(text, low)):
        if style == "auto":
            found = _tagged(*tagged)
            fault = found.fault or "<answer> without <think> before it"
            return found if found.text is None else found_at(found.text, "prose", fault)
        text = tagged[0].strip()
        low = _lower(text)
    return _READERS[style](text, low)


def _lower(text: str) -> str:
    """The text in lower case, each character in its place (İ alone would become two)."""
    if not text.isascii() and "İ" in text:
        text = text.replace("İ", "i")
    return text.lower()


# Thinking first


def _r1(text: str, low: str, fault: str | None, *, strict: bool) -> Extraction:
    """The answer after the thinking; strict: style r1 was asked for, so it must be boxed.

    An answer in <answer> .. </answer> is as good: DeepSeek-R1's own template asks for it.
    """
    tagged = in_answer_tag(text, low) if "<answer" in low else None
    if tagged:
        found = _tagged(*tagged)
    else:
        found = boxed(text) if strict else _auto(text, low)
        if found.text is None and strict:
            found = _auto(text, low)
            fault = fault or "the answer is not boxed, as style r1 asks"
    return found if found.text is None else found_at(found.text, "r1", fault or found.fault)


def _tagged(inner: str, tail: str, closed: bool) -> Extraction:
    """The answer that <answer> .. </answer> holds; it may be marked or boxed in there."""
    inner = inner.strip()
    found = marked(inner, _lower(inner))
    answer = found.text if found.text is not None else peel_line(inner)
    if not answer:
        return nothing("<answer> holds nothing")
    fault = (MORE if has_more(tail) else None) if closed else "<answer> is never closed"
    return found_at(answer, "prose", fault)


def _final(text: str, low: str) -> Extraction:
    found = marked(text, low, boxes=False)
    if found.text is None and (phrase := said(text, low, final=True)):
        return found_at(phrase.text, "final", MORE if phrase.more else None)
    return found


# Answers without a marker

_HASHES = re.compile(r"#{4}[ \t]{0,3}([-+$€£]?\d[\d,./]{0,30}%?)[ \t*_`]{0,4}(?=\n|$)")

_LETTER = re.compile(r"[(\[（]?([A-Z])[)\]）]?[.。:：,，]?")
_SMALL_LETTER = re.compile(r"[(\[（]?([a-z])[)\]）]?")
_LETTERS = re.compile(
    r"[A-J](?:(?:\s?[,，、/&]\s?|\s)?(?:(?:and|和)\s?)?[A-J]){1,8}"
)  # "A, C" · "ACD"
_OPTION = re.compile(r"(?:option|choice|选项)\s{0,2}(?=[(\[（]?[A-Z]\b)", re.IGNORECASE)
_LETTER_THEN_TEXT = re.compile(
    r"\(?[A-J](?:\)[.:]?|[.:：、])\s{0,3}(?!(?:is|was|are|can|cannot|does|has|and|or|would)\b)\S.*"
)
_LONE = re.compile(r"^[ \t>#*_([-]{0,9}([A-Z])[)\].:*_]{0,6}[ \t]{0,9}$", re.MULTILINE)
_LABELLED = re.compile(r"^[ \t>#*_([-]{0,9}([A-J])[)\].:：、*_]{1,6}(?!\w)", re.MULTILINE)
_LONGEST_LETTER = 300  # characters of an option with its text
_BARE = re.compile(
    r"[-+−~≈]?\s?[$€£¥]?\d(?:[\d,.]{0,20}\d)?(?:\s?[/:×xX-]\s?\d[\d,.]{0,20}){0,3}"  # 42 · 3/4
    r"(?:\s?%|\s?[°$€£¥℃]?[CFKk]?|\s?[^\W\d_]{1,15}(?:[/^][\w^-]{1,6}|[²³])?"
    r"|\s(?:square|cubic|sq|degrees?|million|billion|thousand|hundred|percentage|per|US)"
    r"\.?\s[^\W\d_]{1,15})"
    r"|[\w.,:/%+$€£¥°'’&^\\{}()=<>|-]{1,40}"  # one word: Paris · 2019-05-01 · \frac{1}{2}
)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CJK_PHRASE = re.compile(r"答案|选|\w是\w|无法|不能")
_LONGEST_CJK_WORD = 4  # characters without a space: five may be a sentence


def _unmarked(core: str) -> Extraction:
    """A completion that is nothing but an option's letter or a short answer."""
    core = _OPTION.sub("", core, count=1)
    if alone := _LETTER.fullmatch(core):
        return found_at(alone[1], "letter", None)
    if _LETTERS.fullmatch(core) and (_in_order(core) or not core.isalpha()):
        return found_at(core, "letter", None)
    if len(core) <= _LONGEST_LETTER and _LETTER_THEN_TEXT.fullmatch(core):
        return found_at(core, "letter", None)
    if core[:1] in ("[", "{") and re.search(r"[\d,\"']", core) and bracket_end(core) == len(core):
        return found_at(_of_record(core), "short", UNMARKED)
    if (
        len(core) <= 80
        and _BARE.fullmatch(core)
        and has_more(core)
        and core.count("{") == core.count("}")
        and (core.isascii() or _is_word(core))
    ):
        return found_at(core, "short", UNMARKED)
    return nothing()


def _of_record(core: str) -> str:
    """The "answer" of a JSON object that has one; any other text as it is."""
    try:
        record = json.loads(core) if "answer" in core else None
    except (ValueError, RecursionError):  # nested a thousand deep
        return core
    if isinstance(record, dict):
        for key in ("final_answer", "answer"):
            value = record.get(key)
            if isinstance(value, str | int | float) and (answer := peel_line(str(value))):
                return answer
    return core


def _in_order(letters: str) -> bool:
    """Whether letters are a set of options ("ACD"), not a word ("BAD")."""
    named = [letter for letter in letters if "A" <= letter <= "J"]
    return named == sorted(set(named))


def _is_word(core: str) -> bool:
    """Whether a text without spaces is a word, by its Chinese characters."""
    return len(_CJK.findall(core)) <= _LONGEST_CJK_WORD and not _CJK_PHRASE.search(core)


def _may_be_bare(text: str) -> bool:
    """Whether a text is short enough to be nothing but an answer; a list may be longer."""
    start = text[:16]
    return len(text) <= _LONGEST_LETTER or (
        len(text) <= MAX_ANSWER and ("[" in start or "{" in start)
    )


def _spoken(text: str, low: str, *, doubtful: bool) -> Extraction:
    """An answer in a sentence; doubtful: also one such as "the answer is clear"."""
    phrase = said(text, low)
    if phrase is None or (phrase.doubtful and not doubtful):
        return nothing()
    if phrase.final or phrase.letter:
        style: Style = "final" if phrase.final else "letter"
        return found_at(phrase.text, style, MORE if phrase.more else None)
    return found_at(phrase.text, "prose", IN_A_SENTENCE)


def _auto(text: str, low: str) -> Extraction:
    found = marked(text, low)
    if found.text is not None:
        return found
    spoken = _spoken(text, low, doubtful=False)
    fault, found = found.fault, spoken
    if (
        found.text is None
        and "####" in text
        and (hashes := _HASHES.match(text, text.rfind("####")))
    ):
        found = found_at(hashes[1], "prose", "the answer stands after ####, as no style asks")
    if found.text is None and (answer := labelled(text, low)):
        found = found_at(answer, "prose", IN_A_SENTENCE)
    if found.text is None:
        found = _unmarked(peel_line(text)) if _may_be_bare(text) else found
    if found.text is None and (places := tagged_places(text)):
        found = found_at(places[0], "box", UNMARKED)
    if found.text is None and "nswer" in low:
        found = _spoken(text, low, doubtful=True)
    return found if found.text is not None else nothing(fault or NO_ANSWER)


def _letter(text: str, low: str) -> Extraction:
    """An option's letter: alone, marked, in a sentence, or in the first or the last line."""
    core = peel_line(text) if _may_be_bare(text) and "\\boxed" not in text else ""
    found = _unmarked(core)
    if found.style == "letter":
        return found
    if small := _SMALL_LETTER.fullmatch(core):
        return found_at(small[1].upper(), "letter", None)
    for other in (marked(text, low), _spoken(text, low, doubtful=False)):
        if other.text is None:
            continue
        inner = _unmarked(other.text) if len(other.text) <= _LONGEST_LETTER else nothing()
        if inner.text is None or inner.style != "letter":
            return found_at(other.text, other.style, "the answer is no option's letter")
        boxed = "the letter is boxed, as style letter does not ask"
        return found_at(inner.text, "letter", boxed if other.style == "boxed" else other.fault)
    first, _, _ = text.partition("\n")
    for line in (first, text.rpartition("\n")[2]):
        core = peel_line(line) if len(line) <= _LONGEST_LETTER else ""
        alone = _unmarked(core)
        # what lists the options again chooses none of them; an explanation may go through them
        others = _LONE if _LETTER.fullmatch(core) else _LABELLED
        if alone.style == "letter" and alone.text and len({*others.findall(text)}) <= 1:
            return found_at(alone.text, "letter", "text around the option's letter")
    if found.text is None and (answer := labelled(text, low)):
        return found_at(answer, "prose", IN_A_SENTENCE)
    return found if found.text is not None else nothing()


_LONGEST_PHRASE = 100


def _short(text: str, low: str) -> Extraction:
    """The whole completion, unless an answer is marked in it or given in a sentence."""
    for found in (marked(text, low), _spoken(text, low, doubtful=False)):
        if found.text is not None:
            return found_at(found.text, found.style, "more than the word or phrase that was asked")
    core = peel_line(text)
    if not core.strip("*_`>#-+•"):
        return nothing()
    one_line = "\n" not in core and len(core) <= _LONGEST_PHRASE
    fault = "the answer is no single short line"
    if one_line:
        fault = (
            "the answer is a sentence, not a word or a phrase"
            if core[0] not in "[{(" and has_verb(core)
            else ""
        )
    return found_at(core, "short", fault or None)


def _box(text: str, low: str) -> Extraction:
    """Tagged places, else a final answer, else coordinates: all there is, or the only ones."""
    if places := tagged_places(text):
        return found_at(places[0], "box", None if places[1] else TWO)
    untagged = "the answer is no <box>, as style box asks"
    for found in (marked(text, low), _spoken(text, low, doubtful=False)):
        if found.text is not None:
            return found_at(found.text, found.style, untagged)
    core = peel_line(text) if len(text) <= MAX_ANSWER else ""
    if coordinates_only(core):
        return found_at(core, "box", None)
    found = _unmarked(core)
    if found.text is not None:
        return found_at(found.text, found.style, untagged)
    if place := lone_place(text):
        return found_at(place, "box", "the place is not tagged, and not all there is")
    return nothing()


_READERS: dict[str, Callable[[str, str], Extraction]] = {
    "auto": _auto,
    "final": _final,
    "boxed": lambda text, low: boxed(text),
    "letter": _letter,
    "short": _short,
    "box": _box,
}
