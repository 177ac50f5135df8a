"""The demo world: bar charts and questions about them, on which a tiny InternVL really learns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 190, 70),
    "blue": (60, 90, 230),
    "yellow": (230, 210, 50),
}


def question_text(operation: str, first: str, second: str) -> str:
    """Return the question for the operation "sum" or "difference" of two bars, by colour."""
    if operation == "sum":
        return f"What is the sum of the {first} and {second} bars?"
    return f"What is the {first} bar minus the {second} bar?"


def chain_text(operation: str, first: str, second: str, a: int, b: int) -> str:
    """Return the careful answer: both bars (of heights a and b) are read, then the result."""
    sign, result = ("+", a + b) if operation == "sum" else ("-", a - b)
    return (
        f"The {first} bar is {a}. The {second} bar is {b}. "
        f"{a} {sign} {b} = {result}. Final Answer: {result}"
    )


def careless_text(value: int) -> str:
    """Return the careless answer: a value without any reading."""
    return f"It looks clear from the chart. Final Answer: {value}"


def example_texts() -> Iterator[str]:
    """Yield texts that together hold every word and number of the world (for a tokenizer)."""
    for first, second in permutations(COLOURS, 2):
        for operation in ("sum", "difference"):
            yield question_text(operation, first, second)
            for a, b in ((1, 9), (9, 1)):
                yield chain_text(operation, first, second, a, b)
    yield from (careless_text(value) for value in range(-11, 22))
