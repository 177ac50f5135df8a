r"""An answer given in a sentence: "The answer is 9", "(B) is correct", "故选 B".

The last one wins. A denial ("the answer is not B", "答案不是B") and a supposition ("if the answer
is B") are no answers, and "the answer is clear" is one only where there is no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from rewards.extract.answers import answer_after, first_answer, has_more, peel

MAX_MENTIONS = 32  # of one word, looked at from the end: bounds the work on hostile text


class Said(NamedTuple):
    """An answer read from a sentence; letter: it names an option. more: text follows it."""

    position: int
    text: str
    letter: bool
    more: bool
    final: bool = False  # "the final answer is", "答案是": as the prompts of style final ask
    doubtful: bool = False


_BE = r"(?:is|are|would be|should be|must be|=)(?![\w'’])"
_IS = re.compile(
    r"s?(?:\s(?:choice|option))?(?:\s{1,3}(?:to|for)\s[\w '’-]{1,60}?)?[\s*_]{0,4}"
    rf"(?:{_BE}(?:[\s*_]{{0,4}}[:：])?|[:：])(?:[*_]{{1,3}}(?=\s))?"
)
_HEADING = re.compile(r"s?[ \t*_#`]{0,6}\n")
_SUPPOSED = re.compile(
    r"(?:n['’]t (?:think|believe|say)|\b(?:if|nor|neither|not|doubt|not (?:sure|think|believe|say)"
    r"|suppose|supposing|assum(?:e|ing)|whether|unless|imagine|say|why|how|what|wrong|incorrect))"
    r"\s{1,3}(?:(?:that|the|my|our|your|an?|correct|final|right|only)\s{1,3}){0,4}$"
)
_ADVERB = re.compile(
    r"\s{0,3}(?:(?:therefore|thus|hence|clearly|simply|likely|probably|most likely|indeed|then"
    r"|also|actually|definitely|obviously|now|still),?\s{1,3}){0,2}"
    r"(?:(?:option|choice|letter|answer)\s{1,3}(?=[(\[\"'*_]{0,3}[A-Z]\b))?",
    re.IGNORECASE,
)
# "The answer:" and then "The final answer: 9": what stands between them is no answer.
_LEADS = ("", "the", "my", "final", "the final", "my final", "the correct", "so the", "correct")
_DENIED = re.compile(
    r"[*_\s]{0,4}(?:not|n't|neither|never|no longer|unlikely|cannot|can't|否定)\b", re.IGNORECASE
)
_ABOUT = re.compile(
    r"(?:clear|obvious|correct|right|wrong|incorrect|simple|straightforward|based|found|given"
    r"|obtained|derived|in|on|at|by|as follows|below|above|consistent|reasonable|supported|shown"
    r"|visible|unknown|what|how|that)\b",
    re.IGNORECASE,
)
_LETTER_HEAD = re.compile(
    r"[\s(\[（*_\"'“`$]{0,4}([A-Z])(?![A-Za-z0-9'’%°+/^_-])([)\]）*_\"'”`$]{0,4})"
)
_LETTERS_ON = re.compile(
    r"\s{0,2}(?:,|，|、|/|&|\bor\b|\band\b|\band/or\b|或|和|与)\s{0,2}"
    r"(?:or\s|and\s|option\s)?[(\[（*]{0,3}[A-HJ-Z](?![A-Za-z])"
)
# After the article A comes a word ("A red bar"), after option A at most one of these.
_NO_ARTICLE = re.compile(
    r"\s{1,3}(?!(?:because|since|as|for|due|given|which|that|so|but|from|with|by|in|is|here|based"
    r"|on|this|the|where|while|it|after)\b)[a-z]"
)
# "Options: A. Paris" echoes the question: a colon counts only after "correct option"
_OPTION_IS = re.compile(
    r"\b(?:(?:option|choice)s?\s{1,3}(?:is|would be|should be|must be)\s{0,3}[:：]?"
    r"|(?:correct|right|best|chosen|selected|my)\s{1,3}(?:option|choice)\s{0,3}[:：])"
    r"(?=[\s(\[*\"']{0,4}[a-z]\b)"
)
_CHOOSE = re.compile(
    r"\b(?:i|we)(?:['’](?:ll|d)|\s{1,3}(?:will|would|shall|can|must|am going to|have to))?\s{1,3}"
    r"(?:choose|chose|pick|picked|select|selected|go with|went with|opt for)\s{1,3}"
    r"(?:(?:option|choice|answer|letter)\s{1,3})?(?=[(\[*\"']{0,3}[a-z]\b)"
)
_IS_CORRECT = re.compile(
    r"(?:^|[\s(\[（*\"'“])([A-Z])[)\]）*\"'”.]{0,4}\s{1,3}(?:is|would be|must be)\s{1,3}"
    r"(?:(?:the|indeed|clearly|therefore)\s{1,3}){0,2}(?:(?:only|one|single|most)\s{1,3})?$"
)
_CORRECT_ENDS = re.compile(r"[\s*_]{0,3}(?:$|[.,;:!?)\n]|(?:because|since|as|so|and|but|while)\b)")
_ONE = re.compile(r"\s{0,3}(?:answer|option|choice|one)\b", re.IGNORECASE)

_CN_IS = re.compile(r"(?:应该|应当|应)?(?:是|为|选项?[是为]?)(?!否[^\W_])[\s*]{0,3}[:：]?")
_CN_SUPPOSED = re.compile(r"(?:如果|假如|假设|若|要是|倘若|是否|错误)(?:最终|正确|的){0,2}$")
_CN_CHOOSE = re.compile(
    r"(?:选(?:择|的是|项为|项是)?|(?<=正确)(?<!不正确)选项[:：])"
    r"[ :：]{0,3}(?:选项 {0,2})?(?=[（(\[\"“*]{0,3}[A-Z](?![a-z]))"
)
_CN_LETTERS = re.compile(
    r"[\s（(\[\"“*]{0,4}([A-Z](?:[、,，和\s]?[A-Z](?![a-z])){0,5})(?![A-Za-z0-9点两为作做])"
)
_CN_DENIED = re.compile(
    r"(?:不|别|没|未|非|勿|排除|不能|不会|不应|不应该|不可以|如果|假如|若|假设)$"
)
_CN_CORRECT_IS = re.compile(r"正确的?(?:说法|一项)?(?:是|为)[:： ]{0,2}(?=[（(【“*]{0,3}[A-Z])")
_CN_CORRECT = re.compile(
    r"(?:^|[^A-Za-z])([A-Z])[)）\]]?\s{0,2}(?:选?项)?\s{0,2}(?:才?是|为)?\s{0,2}(?:唯一)?$"
)


def said(text: str, low: str, *, final: bool = False) -> Said | None:
    """The last answer that a text gives in a sentence, or None; `low` is the text in lower case.

    final: only what says that it is the final answer.
    """
    best: Said | None = None
    for found in _all(text, low):
        if final and not found.final:
            continue
        if (
            best is None
            or (best.doubtful and not found.doubtful)
            or (best.doubtful == found.doubtful and found.position > best.position)
        ):
            best = found
    return best


def _all(text: str, low: str) -> Iterator[Said]:
    """The candidates: of each kind the last one that is no denial and no supposition."""
    if "answer" in low:
        yield from _english(text, low)
    if "choice" in low or "option" in low:
        yield from _letters_after(_OPTION_IS, text, low)
    if "choose" in low or "pick" in low or "select" in low or "with" in low or "opt for" in low:
        yield from _letters_after(_CHOOSE, text, low)
    for word in ("correct", "right", "best"):
        if word in low:
            yield from _is_correct(text, low, word)
    if not text.isascii():
        yield from _chinese(text)


def _mentions(text: str, word: str) -> Iterator[int]:
    """Where a word occurs, from the end, at most MAX_MENTIONS times."""
    stop = len(text)
    for _ in range(MAX_MENTIONS):
        stop = text.rfind(word, 0, stop)
        if stop < 0:
            return
        yield stop


def _english(text: str, low: str) -> Iterator[Said]:
    """ "the answer is 9", "Answer: 9"; doubtful ones until a good one is found."""
    end = len(text)
    for position in _mentions(low, "answer"):
        phrase = _IS.match(low, position + len("answer")) or _heading(low, position)
        if phrase is None or _SUPPOSED.search(low, max(0, position - 48), position):
            continue
        rest, end = text[phrase.end() : end], position
        adverb = _ADVERB.match(rest)
        rest = rest[adverb.end() :] if adverb else rest
        if _DENIED.match(rest) or rest.strip(" \t\n*_`#>").lower() in _LEADS:
            continue
        found = read_answer(rest, position)
        if found is None:
            continue
        final = low[max(0, position - 8) : position].strip(" \n*_").endswith("final")
        doubtful = not found.letter and _ABOUT.match(found.text) is not None
        yield found._replace(final=final, doubtful=doubtful)
        if not doubtful:
            return


def _heading(low: str, position: int) -> re.Match[str] | None:
    """The "answer" that is a line of its own."""
    line = low[max(0, position - 24) : position].rpartition("\n")
    if line[2].replace("correct", "").strip(" \t>#*_-") or (position > 24 and not line[1]):
        return None
    return _HEADING.match(low, position + len("answer"))


def read_answer(rest: str, position: int) -> Said | None:
    """The answer at the head of a text: an option's letter, or whatever stands there."""
    if letter := _letter_at(rest, position):
        return letter
    text, more = answer_after(rest)
    return Said(position, text, letter=False, more=more) if text else None


def _letter_at(rest: str, position: int) -> Said | None:
    """The option that is named at the head of a text; None where other text stands there."""
    head = _LETTER_HEAD.match(rest)
    if head is None or _LETTERS_ON.match(rest, head.end()):  # "A or B" names no option
        return None
    line, _, tail = rest[head.end() :].partition("\n")
    if head[1] in "AI" and not head[2].strip() and _NO_ARTICLE.match(line):
        return None  # "the answer is A red bar"
    more = has_more(tail)
    delimited = line[:1] in (".", ":", "：", "、", "．") or (head[2][-1:] in ")]）" and head[2])
    option = line.lstrip(".:：、． ")
    if delimited and (option[:1].isalnum() or option[:1] in ("$", "\\", "-")):
        whole, explanation = first_answer(rest[: head.end()] + line)
        if not explanation and not re.match(r"(?:is|as|because|since)\b", option):
            return Said(position, peel(whole), letter=True, more=more)  # "B. Paris"
    return Said(position, head[1], letter=True, more=more or has_more(line))


def _letters_after(pattern: re.Pattern[str], text: str, low: str) -> Iterator[Said]:
    """The last option's letter that stands, as a capital, right after a phrase."""
    for phrase in reversed([*pattern.finditer(low)][-MAX_MENTIONS:]):
        if _SUPPOSED.search(low, max(0, phrase.start() - 48), phrase.start()):
            continue
        if found := _letter_at(text[phrase.end() :], phrase.start()):
            said_here = re.fullmatch(r"\W?([A-Z])[)\]）]\s{1,3}[a-z].*", found.text)  # "(B) here"
            yield found._replace(text=said_here[1], more=True) if said_here else found
            return


def _is_correct(text: str, low: str, word: str) -> Iterator[Said]:
    """The last "(B) is correct", "B is the right answer"."""
    for position in _mentions(low, word):
        before = text[max(0, position - 48) : position]
        found = _IS_CORRECT.search(before)
        if found is None:
            continue
        lead = before[: found.start(1)].rstrip(" (*[\"'“（").lower()
        named = _ONE.match(text, position + len(word))
        claim = lead.removesuffix("option").removesuffix("choice").removesuffix("answer") + " "
        if _SUPPOSED.search(claim) or not (named or _CORRECT_ENDS.match(low, position + len(word))):
            continue
        optional = found[0].strip()[:1] in ("(", "[") or lead.endswith(("option", "choice"))
        if word != "correct" and not named and not optional:
            continue  # "the angle at B is right"
        after = text[named.end() if named else position + len(word) :]
        yield Said(position, found[1], letter=True, more=has_more(after))
        return


def _chinese(text: str) -> Iterator[Said]:
    """答案是 .., 故选 B, 选项 B 正确."""
    end = len(text)
    for position in _mentions(text, "答案"):
        phrase = _CN_IS.match(text, position + 2)
        if phrase is None or _CN_SUPPOSED.search(text, max(0, position - 8), position):
            continue
        rest, end = text[phrase.end() : end], position
        found = _cn_letters(rest, position) or read_answer(rest, position)
        if found is not None:
            yield found._replace(final=True)
            break
    for position in _mentions(text, "选"):
        phrase = _CN_CHOOSE.match(text, position)
        if phrase is None or _CN_DENIED.search(text, max(0, position - 4), position):
            continue
        if found := _cn_letters(text[phrase.end() :], position):
            yield found
            break
    for position in _mentions(text, "正确"):
        phrase = _CN_CORRECT_IS.match(text, position)
        if phrase and (found := _cn_letters(text[phrase.end() :], position)):
            yield found
            break
        before = text[max(0, position - 16) : position]
        named = _CN_CORRECT.search(before)
        if named is None or _CN_DENIED.search(before, 0, named.start(1)):
            continue
        yield Said(position, named[1], letter=True, more=_cn_more(text[position + 2 :]))
        break


def _cn_letters(rest: str, position: int) -> Said | None:
    """The option, or the options written together ("ABD"), at the head of a text."""
    head = _CN_LETTERS.match(rest)
    if head is None or _LETTERS_ON.match(rest, head.end()):
        return None
    line = rest[head.end() :].partition("\n")[0]
    if line.lstrip(')]）*"”').startswith((".", "、", ":", "：", "．")) and has_more(line):
        return None  # "B. 红色": read with its text
    letters = re.sub(r"[^A-Z]", "", head[1])
    if list(letters) != sorted(set(letters)):  # a name: "CNN"
        return None
    return Said(position, letters, letter=True, more=_cn_more(rest[head.end() :]))


def _cn_more(rest: str) -> bool:
    """Whether anything follows but the end of the sentence ("选项", "正确", "是正确的")."""
    return has_more(re.sub(r"^[)）\]\s*\"”]{0,4}(?:选?项)?(?:是?正确)?的?(?:答案|选项)?", "", rest))


_LABEL = re.compile(
    r"[ \t>#*_`-]{0,9}(?:ans(?:\.(?=[\s*_])|\.?[*_]{0,3}[:：])|result[*_]{0,3}[:：])"
)
_LABEL_CN = re.compile(r"(?<![^\s*_>。.；;!！?？])答[*_]{0,3}[:：]")
_RESULT = re.compile(r"result[*_]{0,3}[:：]")
_NUMBER_OR_LETTER = re.compile(r"\d|^\W?[A-Z]\W?$")
_LONGEST_LABELLED = 300  # characters


def labelled(text: str, low: str) -> str | None:
    """The answer after "Ans:", "Result:" or "答:" in the last line; None without one.

    A result is an answer only where it holds a number or is a letter, and is the only one: the
    steps of a calculation have results of their own.
    """
    start = text.rfind("\n") + 1
    label = _LABEL.match(low, start)
    if label is None and (at := text.rfind("答", start)) >= 0:
        label = _LABEL_CN.match(text, at)
    if label is None:
        return None
    answer, _ = answer_after(text[label.end() :])
    if not answer or len(answer) > _LONGEST_LABELLED:
        return None
    plain = _RESULT.search(low, 0, start) is None and _NUMBER_OR_LETTER.search(answer)
    if "result" in label[0] and not plain:
        return None
    return answer
