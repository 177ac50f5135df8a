r"""Markdown, HTML, LaTeX and Unicode around an answer that carry no meaning."""

from __future__ import annotations

import re
import unicodedata

_BOLD = re.compile(r"(?<!\w)\*\*([^*\n]{1,200})\*\*(?!\w)")  # not the power in 2**3
_OPENERS = frozenset("*`$\\\"“'_「『<")
_STOPS = ".。，,；;！"
_CLOSERS = frozenset("*`>" + _STOPS)
_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ('"', '"'),
    ("“", "”"),
    ("「", "」"),
    ("『", "』"),
    ("'", "'"),
    ("__", "__"),
    ("_", "_"),
)
_COMMAND = re.compile(
    r"\\(?:text(?:bf|rm|it|tt|sf|normal)?|math(?:rm|bf|it|sf)|mbox|boxed|fbox|boldsymbol|bm|emph"
    r"|underline)\s{0,2}\{",
    re.ASCII,
)
# Tags that only show a text otherwise: <sub>, <sup>, <s> and <box> mean something.
_TAGS = "b|strong|i|em|u|mark|span|p|code"
_OPEN_TAG = re.compile(rf"<({_TAGS})(?:\s[^<>]{{0,80}})?>", re.IGNORECASE)
_CLOSING_TAG = re.compile(rf"</(answer|{_TAGS})\s?>|<br\s?/?>", re.IGNORECASE)


def clean(text: str) -> str:
    r"""An answer without the wrapping that carries no meaning: `$`, `**`, <b>, \text{}, quotes,
    closing stops and commas, a closing tag that nothing opens.

    >>> clean(r" **$\text{B}$.** ")
    'B'
    """
    text = text.strip()
    if "**" in text:
        text = _BOLD.sub(r"\1", text)
    for _ in range(8):  # wrappings nest only a few deep; a bound keeps hostile input linear
        if not text or (text[0] not in _OPENERS and text[-1] not in _CLOSERS):
            break
        before = text
        text = _unwrap(_without_stray_tag(text.strip(" \t\r\n*`")))
        if not text.endswith("..."):
            text = text.rstrip(_STOPS).rstrip()
        if text == before:
            break
    return text


def _without_stray_tag(text: str) -> str:
    """A text without a tag at its end that closes nothing in it: "9</answer>"."""
    if text[-1:] != ">" or not (tag := _CLOSING_TAG.fullmatch(text, text.rfind("<"))):
        return text
    before = text[: tag.start()].rstrip()
    opened = tag[1] is not None and f"<{tag[1]}".lower() in before.lower()
    return text if opened or not before else before


def _unwrap(text: str) -> str:
    if not text or text[0] not in _OPENERS:
        return text
    if text[0] == "<":
        if not (tag := _OPEN_TAG.match(text)):
            return text
        inner, closing = text[tag.end() :], f"</{tag[1].lower()}>"
        # "<b>1</b> and <b>2</b>" is not one wrapped answer
        whole = inner.lower().find(closing) == len(inner) - len(closing) > 0
        return inner[: -len(closing)].strip() if whole else text
    for left, right in _WRAPPERS:
        if not (text.startswith(left) and text.endswith(right)):
            continue
        inner = text[len(left) : -len(right)]
        # "$1$ and $2$" is not one wrapped answer, "$\\$5$" is
        bare = inner.replace("\\$", "") if left == "$" else inner
        if inner and left not in bare and right not in bare:
            return inner.strip()
    if (command := _COMMAND.match(text)) and brace_end(text, command.end()) == len(text):
        return text[command.end() : -1].strip()
    return text


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


def brace_end(text: str, start: int) -> int | None:
    """The index after the `}` that closes the brace opened just before `start`, or None."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() in "{}":
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return brace.end()
    return None


# NFKC makes "102" of "10²" and "11/2" of "1½": these are written out before it sees them.
_SUPERSCRIPTS = re.compile(r"(?<=[\w)\]}])[⁺⁻]?[⁰¹²³⁴-⁹]{1,9}")
_SUPERSCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_VULGAR = re.compile(r"[¼-¾⅐-⅞↉]")
_SILENT = dict.fromkeys(  # zero-width characters and directions: they show nothing
    [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF, 0xAD]
)
_SILENT |= {0x2212: "-", 0x2010: "-", 0x2011: "-", 0x2012: "-", 0x2013: "-", 0x2044: "/"}
_SILENT |= {0x2018: "'", 0x2019: "'"}
_RUN = re.compile(r"\S{1,64}")


def fold(text: str) -> str:
    """Unicode's compatibility forms as plain characters: full-width letters, ½, ²; else as is.

    >>> fold("1½ m²")
    '1 1/2 m^2'
    """
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPT_DIGITS), text)
    text = _VULGAR.sub(_write_out, text)
    if len(text) <= 64:
        text = unicodedata.normalize("NFKC", text)
    else:  # Python's NFKC is quadratic in a run of combining marks
        text = _RUN.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return text.translate(_SILENT)


def _write_out(found: re.Match[str]) -> str:
    plain = unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/")
    before = found.string[max(0, found.start() - 1) : found.start()]
    return f" {plain}" if before.isdigit() else plain
