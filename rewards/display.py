"""Untrusted text as a terminal or a page may show it, and the console that shows it."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100  # columns where the output is no terminal
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn")  # controls, marks without a shape, halves of a pair


def visible(text: str) -> str:
    r"""A text with what cannot be seen written out; line feeds stay.

    Escape sequences cannot reach the terminal, nor marks that turn the direction of writing.

    >>> visible("a\x1b[31mb\u202e")
    'a\\x1b[31mb\\u202e'
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        char
        if char == "\n" or unicodedata.category(char) not in _HIDDEN
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def one_line(text: str, longest: int = 60) -> str:
    r"""A text in one line, cut in the middle where it is too long.

    >>> one_line("a\nb"), one_line("1234567890", 7)
    ('a b', '123…890')
    """
    text = " ".join(visible(text[: 4 * longest] if len(text) > 8 * longest else text).split())
    if len(text) <= longest:
        return text
    head = longest // 2
    return f"{text[:head]}…{text[len(text) - (longest - head - 1) :]}"


def quoted(text: str, longest: int = 200) -> str:
    r"""A text in one line between quotes; backslashes stay as they are.

    >>> print(quoted(r"\frac{1}{2}"))
    '\frac{1}{2}'
    """
    return f"'{one_line(text, longest)}'"


def number(value: float | None) -> str:
    """A score with as many decimals as it needs, up to two; None as a dash."""
    return "-" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def share(part: float, whole: float) -> str:
    """A share in percent; a dash of nothing.

    >>> share(1, 3), share(0, 0)
    ('33.3%', '-')
    """
    return f"{part / whole:.1%}" if whole else "-"


def open_console() -> Console:
    """A console on stdout: as wide as the terminal, plain and 100 columns where it is piped."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def print_lines(*parts: object) -> None:
    """Print on stdout; where it is piped, without the spaces that fill lines up."""
    console = open_console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    for line in captured.get().splitlines():
        print(line.rstrip())
