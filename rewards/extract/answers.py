r"""The answer that stands at the head of a text, after a marker such as "Final answer:".

It is what follows on the line, or else a block: $$ .. $$, a code fence, a table, a list, JSON.
Of an answer that goes on to explain itself ("9. The chart shows ..") the first sentence is kept,
only where that is safe: "St. Louis", "3.5" and "U.S. Steel" stay whole.

Everything here is linear in the text's length whatever the text is.
"""

from __future__ import annotations

import re

from rewards.markup import brace_end, clean

MAX_ANSWER = 4000  # characters; a box or a bracket that stays open for longer is never closed

# Zero-width characters, directions and soft hyphens show nothing: they must not change a reading.
_UNSEEN = [0xAD, 0x61C, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F)]
_UNSEEN += [*range(0x2060, 0x2065), *range(0x2066, 0x2070)]
_SPACES = [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_READABLE: dict[int, int | None] = {
    **dict.fromkeys(_UNSEEN),
    **dict.fromkeys(_SPACES, ord(" ")),
    **dict.fromkeys([0x85, 0x2028, 0x2029], ord("\n")),
    0xFF0E: ord("."),
    **{code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B))},
    **{code: code - 0xFEE0 for code in range(0xFF41, 0xFF5B)},
}
_ODD = re.compile(f"[{''.join(map(re.escape, map(chr, _READABLE)))}]")

_TOKEN = re.compile(r"<\|[\w ]{1,30}\|>|</s>")

# An emoji beside an answer is no part of it ("9 🎉"); alone it is one.
_EMOJI = "\u2600-\u27bf\u2b50\u2b55\ufe0f\U0001f000-\U0001faff"
_EMOJIS = re.compile(f"[{_EMOJI}]")
_EMOJI_EDGES = re.compile(
    rf"^[{_EMOJI}\s]+(?=\w)|(?<=[\w%.)\]}}*`'\"”」$])\s{{0,9}}[{_EMOJI}][{_EMOJI}\s]*$"
)

_PREFIX = re.compile(r"(?:[ \t]{0,9}(?:>|#{1,6}(?=\s)|[-*+•](?=\s))){1,20}[ \t]{0,9}")
_BULLET = re.compile(r"[ \t]{0,9}(?:>[ \t]{0,3})?(?:[-*+•]|\d{1,2}[.)])[ \t]{1,4}(?=\S)")
# of the marker's emphasis: "**Final answer:** 9"
_CLOSING = re.compile(r"[*_`]{1,3}(?=\s)|</(?:b|strong|i|em|u|span|p)>", re.IGNORECASE)
_SUBSTANCE = re.compile(r"[^\W_]")
_BLOCKS = ("```", "$$", "\\[", "[", "{", "|", "-", "+", "*", "•", ">", "1")
_AROUND = [(mark, mark) for mark in ("***", "**", "*", "__", "_", "`", "$$", "$", '"', "'")]
_AROUND += [("“", "”"), ("‘", "’"), ("「", "」")]
_MARKUP = frozenset("*_`>#-+•$\"'“‘「")
_RULES = ("---", "----", "-----", "***", "___")  # markdown's line across the page
_EMPHASIS = " \t*_`#>"

# A sentence that explains: it begins with one of these words and has a verb, or is labelled.
_SENTENCE = re.compile(
    r"[*_`]{0,3}(?:(?:Explanation|Reason|Reasoning|Note|Because|Here's|Let me|I hope|Hope)\b"
    r"|(?:The|It|This|That|These|Those|They|There|We|I|He|She|You|Since|As|In|So|Both|Each|Here"
    r"|If|But|However|Although|When|While|Given|Therefore|Thus|Hence|From|According|By|Its|Their)\b(?=[^\n]{0,200}?\b(?:is|are|was|were|be"
    r"|has|have|had|does|do|did|can|could|will|would|shows?|showed|indicates?|represents?|equals?"
    r"|means?|gives?|see|seen|need|know|found|find|got|get|adds?|makes?|reads?|says?|stands?)\b))"
)
_STOP = re.compile(r"[.!?][\"'*_`)$]{0,4}\s{1,3}(?=[*_`]{0,3}[A-Z])")
_SHORT = r"(?:\(?[A-Za-z]\)?|[-+$€£]?\d[\d,.]{0,20}\s?%?(?:\s[a-z]{1,12})?|yes|no|true|false)"
_REASON = re.compile(
    rf"[*_`$]{{0,3}}{_SHORT}[*_`$]{{0,3}}(?=[\s,;，；(–—-]{{1,3}}(?:because|since|which|due\sto"
    r"|as\s(?:it|the|this|there|we))\b|[\s,;，；（(]{0,3}(?:因为|由于))",
    re.IGNORECASE,
)
_YES_AND = re.compile(
    r"[*_`]{0,3}(?:yes|no|true|false)[*_`]{0,3}"
    r"(?=[,.;:][*_`]{0,3}\s{1,3}(?:the|it|this|that|there|they|he|she|we|i|you|these|both)\b)",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"[*_`\s]{0,9}(?:(?:so|thus|therefore|hence),?\s{1,3})?(?:(?:the|my)\s{1,3})?"
    r"(?:(?:final|correct)\s{1,3})?answer(?:\s{1,3}is\b\s{0,3}[:：]?|\s{0,3}[:：])\s{0,3}(?=\S)",
    re.IGNORECASE,
)


def readable(text: str) -> str:
    r"""A text without surrounding space and unseen characters; one kind of space and line end.

    Full-width letters, digits and full stops become plain ones; other punctuation stays.

    >>> readable("\uff22\u200b\r\n")
    'B'
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii() and _ODD.search(text):
        text = text.translate(_READABLE)
    text = text.strip()
    for _ in range(6):  # wrapped in what wraps something: a bound keeps hostile input linear
        inner = _unwrapped(text)
        if inner is text:
            break
        text = inner.strip()
    return text


def _unwrapped(text: str) -> str:
    """A completion without one layer of markdown around the whole of it, or a template's token."""
    if text.endswith(("|>", "</s>")) and (token := _TOKEN.fullmatch(text, text.rfind("<"))):
        return text[: token.start()]
    if (last := text[text.rfind("\n") + 1 :].strip()) in _RULES and last != text:
        return text[: text.rfind("\n")]
    if text[:1] not in _MARKUP:
        return text
    if text.startswith("```"):
        whole = text.endswith("```") and text.count("```") == 2
        return _fence(text)[0] if whole else text
    if prefix := _PREFIX.match(text):
        return text[prefix.end() :]
    for left, right in _AROUND:
        inner = text[len(left) : -len(right)]
        if not inner or not (text.startswith(left) and text.endswith(right)):
            continue
        if left[0] not in inner and right not in inner:
            return inner
    return text


def peel(text: str) -> str:
    """An answer without emphasis, wrapping, emoji beside it and closing full stop."""
    if text.isalnum():
        return text
    text = clean(text)
    if (inner := text.strip("*_` \t\n")) != text:
        text = clean(inner)
    if text[:1] == "【" and text[-1] == "】":
        text = text[1:-1].strip()
    if not text.isascii() and len(text) <= MAX_ANSWER and _EMOJIS.search(text):
        text = clean(_EMOJI_EDGES.sub("", text)) or text
    return text if text.strip("*_`") and text not in _RULES else ""


def peel_line(text: str) -> str:
    """As `peel`, of a whole line or text, which may be quoted, a bullet, a heading or a fence."""
    text = text.strip()
    if text.isalnum():
        return text
    if prefix := _PREFIX.match(text):
        text = text[prefix.end() :]
    return peel(_fence(text)[0] if text.startswith("```") else text)


def _fence(text: str) -> tuple[str, str]:
    """What a code fence at the start of a text holds, and what follows it."""
    body, _, tail = text[3:].partition("```")
    first, newline, rest = body.partition("\n")
    language = newline and (not first.strip() or first.strip().isalnum())
    return (rest if language else body).strip(), tail


def has_more(text: str) -> bool:
    """Whether there is anything of substance in what follows an answer."""
    if "</answer>" in text:
        text = text.replace("</answer>", "")
    return _SUBSTANCE.search(text) is not None


def first_answer(line: str) -> tuple[str, str]:
    """The part of a line that is the answer, and the explanation that follows it ("" for none).

    >>> first_answer("B. It is tall"), first_answer("St. Louis")
    (('B', 'It is tall'), ('St. Louis', ''))
    """
    cut = len(line)
    for stop, _ in zip(_STOP.finditer(line), range(8), strict=False):
        if _SENTENCE.match(line, stop.end()):
            cut = stop.start()
            break
    if reason := (_REASON.match(line, 0, cut) or _YES_AND.match(line, 0, cut)):
        cut = reason.end()
    stop_cn = line.find("。", 1, 24)  # a longer answer may well be several sentences
    if 0 < stop_cn < cut and has_more(line[stop_cn + 1 :]):
        cut = stop_cn
    for more_cn in ("【", "，因为", "，由于"):  # 【答案】C【解析】..
        if 0 < (stop_cn := line.find(more_cn, 1, 24)) < cut:
            cut = stop_cn
    return line[:cut], line[cut:].lstrip("*_`$.。,，;； ")


def explains(line: str) -> bool:
    """Whether a line begins an explanation: "Note: ..", "The total is .."."""
    return _SENTENCE.match(line) is not None


_VERB = re.compile(
    r"\b(?:is|are|was|were|am|has|have|had|shows?|can|cannot|can't|could|will|would|do|does|did"
    r"|don't|isn't|appears?|seems?|stands?|depicts?|contains?)\b|\w是\w|无法|不能",
    re.IGNORECASE,
)


def has_verb(text: str) -> bool:
    """Whether a short text reads as a sentence: three words or more, one of them a common verb."""
    return (len(text.split()) >= 3 or not text.isascii()) and _VERB.search(text) is not None


def box_answer(content: str) -> str:
    """What a box holds as an answer, without "The answer is" before it."""
    if "nswer" in content and (lead := _LEAD.match(peel(content))):
        return peel(peel(content)[lead.end() :])
    return peel(content)


def answer_after(rest: str) -> tuple[str, bool]:
    """The answer that stands at the head of a text, and whether anything of substance follows.

    ("", False) for a text that holds nothing.
    """
    if rest[:1] in ("*", "_", "`", "<") and (closing := _CLOSING.match(rest)):
        rest = rest[closing.end() :]
    line, _, tail = rest.partition("\n")
    strip = peel  # "> 5" and "- 3" on the marker's own line are no quote and no bullet
    if not line.strip(_EMPHASIS):
        rest = tail
        for _ in range(4):  # markup, a blank line, markup again
            rest = rest.lstrip()
            line, _, tail = rest.partition("\n")
            if line.strip(_EMPHASIS):
                break
            if line.startswith("```"):
                break
            rest = tail
        else:
            return "", False
        strip = peel_line
    rest = rest.lstrip()
    if rest.startswith(_BLOCKS) and (block := _block(rest)):
        return block
    if "nswer" in line and (lead := _LEAD.match(line)):
        line = line[lead.end() :]
    line = line.strip()
    if len(line) > MAX_ANSWER:
        return strip(line), has_more(tail)
    answer, explanation = first_answer(line)
    return strip(answer), bool(explanation) or has_more(tail)


def _block(rest: str) -> tuple[str, bool] | None:
    """An answer of several lines, and whether anything follows it; None for a plain line."""
    if rest.startswith("```"):
        body, tail = _fence(rest)
        return clean(body), has_more(tail)
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if rest.startswith(opening) and closing in rest[2:]:
            body, _, tail = rest[2:].partition(closing)
            return clean(body), has_more(tail)
    if rest[0] in "[{":
        end = bracket_end(rest)
        if end is None or "\n" not in rest[:end]:
            return None
        return clean(rest[:end]), has_more(rest[end:])
    return _lines(rest)


def _lines(rest: str) -> tuple[str, bool] | None:
    """A table's rows or a list's items, and whether anything follows; None for neither."""
    table = rest.startswith("|")
    lines = rest[:MAX_ANSWER].split("\n")
    count = 0
    while count < len(lines) and (
        lines[count].startswith("|") if table else _BULLET.match(lines[count])
    ):
        count += 1
    if count < 2:
        return None
    kept = [
        line.strip(" \t*_`") if table else peel(_BULLET.sub("", line, count=1))
        for line in lines[:count]
    ]
    return "\n".join(kept), has_more(rest[len("\n".join(lines[:count])) :])


_BRACKET = re.compile(r'"(?:[^"\\\n]|\\.){0,400}"|[\[\]{}]')


def bracket_end(text: str) -> int | None:
    """The index after the bracket that closes the one at the start of a text, or None."""
    depth = 0
    for found in _BRACKET.finditer(text, 0, MAX_ANSWER):
        if found[0] in "[{":
            depth += 1
        elif found[0] in "]}":
            depth -= 1
            if depth == 0:
                return found.end()
    return None


_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}(?:\{|(-?\d[\w.]{0,40}|(?<=\s)[\w.]{1,40}))")


def last_box(text: str) -> tuple[int, int, str] | None:
    r"""(start, end, content) of the last complete, outermost \boxed{} that is not empty, or None.

    A box that is never closed is passed over, as is one of more than MAX_ANSWER characters.
    """
    best = None
    stop = len(text)
    for _ in range(8):  # unclosed and empty boxes, and boxes around boxes
        start = max(text.rfind("\\boxed", 0, stop), text.rfind("\\fbox", 0, stop))
        if start < 0:
            break
        stop = start
        found = _read_box(text, start)
        if found is None:
            continue
        if best is not None and found[1] < best[1]:
            break  # a box of its own, earlier
        if best is None or found[2].strip(" ${}") != text[best[0] : best[1]]:
            best = found  # the first, or one around it that holds more than it
    return best


def _read_box(text: str, start: int) -> tuple[int, int, str] | None:
    opening = _BOX.match(text, start)
    if opening is None:
        return None
    if opening[1] is not None:
        return start, opening.end(), opening[1]
    inside = text[opening.end() : opening.end() + MAX_ANSWER]
    end = brace_end(inside, 0)
    if end is None or not inside[: end - 1].strip():
        return None
    return start, opening.end() + end, inside[: end - 1]


def boxes_opened(text: str) -> int:
    r"""How many \boxed{..} a text opens, empty ones (a prompt's words) not counted."""
    empty = text.count("\\boxed{}") + text.count("\\fbox{}")
    return text.count("\\boxed") + text.count("\\fbox") - empty
