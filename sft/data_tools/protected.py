r"""The parts of a text that a translation must not touch, and whether it did.

    <image>\nWhat is <ref>the dog</ref><box>[[1, 2, 3, 4]]</box>?   Final Answer: 7
    ^^^^^^^          ^^^^^       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^    ^^^^^^^^^^^^^^^

Protected are placeholders, special tokens, boxes and the tags around them, code, formulas, and the
marker "Final Answer:" with its value where that is no word: verifiers find the answer by it, in a
Chinese response too. What stands between <ref> and </ref> is translated.
"""

from __future__ import annotations

import re

_FENCE = r"```.*?```"
_INLINE_CODE = r"`[^`\n]+`"
_TAGS = (  # a box stays with the name in front of it
    r"</ref>\s*<box>.*?</box>|<box>.*?</box>|<quad>.*?</quad>|<point>.*?</point>|</?ref>|</?think>|</?answer>"
    r"|<image>|<video>|<\|[^|<>\n]{1,60}\|>|<IMG_CONTEXT>|</?img>"
)
_FORMULA = (
    r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{(?P<env>[a-z*]+)\}.+?\\end\{(?P=env)\}"
    # one dollar sign opens a formula only before no white space, and closes one before no digit
    r"|(?<![\\$\w])\$(?![\s$])[^$\n]{0,300}?(?<![\s\\])\$(?!\d)"
)
# in braces: what has no word of two letters, or is a LaTeX command
_VALUE = r"(?:\\[a-z]+|[^\s\w]|\d|_|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))"
_STOP = r"[.,;。，；]?(?:\s|\Z)"  # which is not part of a value
_BOXED = rf"\\boxed\{{(?:{_VALUE}|[ ])+\}}"
_MARKER = rf"\*{{0,2}}[Ff]inal [Aa]nswer:?\*{{0,2}}:?(?:[ \t]*{_VALUE}+?(?={_STOP}))?"
_PROTECTED = re.compile(
    "|".join((_FENCE, _INLINE_CODE, _TAGS, _BOXED, _FORMULA, _MARKER)), re.DOTALL
)
_EDGE = re.compile(r"(?:\s|<image>|<video>)+")
_EDGE_BACKWARDS = re.compile(r"(?:\s|>egami<|>oediv<)+")  # a search for \Z begins at every place
_WORD = re.compile(r"[^\W\d_]{2,}")


def protected_parts(text: str) -> list[str]:
    r"""The protected parts of a text, in order.

    >>> protected_parts("<image> Is $x^2$ = `f(x)`? It costs $5 or $6. Final Answer: B")
    ['<image>', '$x^2$', '`f(x)`', 'Final Answer: B']
    >>> protected_parts("Final Answer: red"), protected_parts("\\boxed{12}")
    (['Final Answer:'], ['\\boxed{12}'])
    """
    return [match.group().rstrip() for match in _PROTECTED.finditer(text)]


def cut_edges(text: str) -> tuple[str, str, str]:
    r"""White space and placeholders in front, the text itself, and those behind it.

    >>> cut_edges("<image>\nHow many?")
    ('<image>\n', 'How many?', '')
    """
    front = match.end() if (match := _EDGE.match(text)) else 0
    rest = text[front:]
    end = len(rest) - (match.end() if (match := _EDGE_BACKWARDS.match(rest[::-1])) else 0)
    return text[:front], rest[:end], rest[end:]


def has_words(text: str) -> bool:
    """Whether anything is left to translate beside what is protected: a word of two letters.

    >>> has_words("B"), has_words("<image> 3.5 = `len(x)`"), has_words("3 cats")
    (False, False, True)
    """
    return _WORD.search(without_parts(text)) is not None


def without_parts(text: str) -> str:
    """A text with its protected parts blanked out."""
    return _PROTECTED.sub(" ", text)


def changed_parts(source: str, translation: str) -> str | None:
    """What of the protected parts is missing in a translation or new there, in words, or None.

    >>> changed_parts("Is `x` here?", "`y` est ici?")
    "'`x`' is missing"
    """
    for part in dict.fromkeys(protected_parts(source)):
        wanted, found = source.count(part), translation.count(part)
        if found != wanted:
            told = "is missing" if not found else f"stands there {found} times, not {wanted}"
            return f"{part!r} {told}"
    for part in protected_parts(translation):
        if part not in source:
            return f"{part!r} is new"
    return None
