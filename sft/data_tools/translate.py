"""`sft translate`: conversations in another language, checked text by text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from internvl.errors import UserError
from internvl.terminal import Command
from sft.data_tools.asking import tell_fault
from sft.data_tools.options import (
    add_endpoint,
    add_files,
    check_endpoint,
    check_limits,
    endpoint_facts,
    open_endpoint,
    tell_counts,
    write_summary,
)
from sft.data_tools.protected import cut_edges
from sft.data_tools.translation import AGAIN, messages, needs_translation, reader

if TYPE_CHECKING:
    from internvl.data import Row
    from rewards.endpoint import Endpoint
    from sft.data_tools.inputs import Part
    from sft.data_tools.working import Decision

_CHECK = "How many legs does a cat have?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sft translate`."""
    add_files(parser, output="the translated rows")
    add = parser.add_argument
    add("--language", required=True, metavar="NAME",
        help="into which one, by its English name (Chinese, Japanese, French, ...)")  # fmt: skip
    add("--context", type=int, default=2, metavar="N",
        help="texts before each in the same row that the model sees with their translations "
        "(default: %(default)s: an answer is translated as one to its question)")  # fmt: skip
    add_endpoint(parser, max_tokens=4096)


def run(args: argparse.Namespace) -> None:
    """`sft translate`."""
    from sft.data_tools.inputs import check_output
    from sft.data_tools.running import run_tool

    check_output(args.input, args.output)
    check_options(args)
    endpoint = open_endpoint(args)

    def check(endpoint: Endpoint) -> None:
        request = endpoint.request(messages(_CHECK, args.language))
        check_endpoint(endpoint, request, reader(_CHECK, args.language))

    translator = RowTranslator(endpoint, args.language, args.context)
    suffix = "_" + re.sub(r"\W+", "_", args.language.lower())
    what = ("translating", "translated")
    counts = run_tool(args, translator.decide, endpoint, check, what=what, suffix=suffix)
    facts = {"language": args.language, **counts.facts(), **endpoint_facts(endpoint)}
    write_summary(args.output, {"command": "translate", "input": str(args.input), **facts})
    tell_counts(args, counts, {"kept:unchanged": "nothing to translate in it"})


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be honoured."""
    check_limits(args)
    if args.base_url is None:
        raise UserError("--base-url is missing: the endpoint that translates")
    if not args.language.strip() or args.language.strip().lower() == "english":
        raise UserError(f"--language is {args.language!r}; the texts are English: name another one")
    if args.context < 0:
        raise UserError(f"--context is {args.context}; give 0 or more")


class RowTranslator:
    """Translates rows, from any thread. context: see `sft translate --help`."""

    def __init__(self, endpoint: Endpoint, language: str, context: int):
        self.endpoint, self.language, self.context = endpoint, language, context
        self.failures = endpoint.failures()

    def decide(self, part: Part, row: Row) -> Decision:
        """The translated row, or undecided with the reason."""
        from sft.data_tools.working import Decision

        turns, system = row.data["conversations"], row.data.get("system")
        texts = [*([system] if system else []), *(turn["value"] for turn in turns)]
        translated, fault = self._translate(texts)
        if fault is not None:
            where = "system" if system and not len(translated) else f"turn {len(translated)}"
            if system and len(translated):
                where = f"turn {len(translated) - 1}"
            return Decision("undecided", {"reason": f"{where}: {fault}"})
        record: dict[str, Any] = {"language": self.language}
        if system:
            record["system"] = translated.pop(0)
        record["conversations"] = [
            {**turn, "value": text} for turn, text in zip(turns, translated, strict=True)
        ]
        same = texts[-len(turns) :] == translated
        return Decision("kept", record=record, reasons=["kept:unchanged"] if same else [])

    def _translate(self, texts: Sequence[str]) -> tuple[list[str], str | None]:
        """The texts translated one after the other; up to the first fault, and what it is."""
        done: list[str] = []
        before: list[tuple[str, str]] = []
        for text in texts:
            front, middle, behind = cut_edges(text)
            translation = middle
            if needs_translation(middle, self.language):
                context = before[-self.context :] if self.context else []
                answer = self.endpoint.ask_one(
                    self.endpoint.request(messages(middle, self.language, context)),
                    reader(middle, self.language),
                    again=tell_fault(AGAIN),
                    whole=True,
                    failures=self.failures,
                )
                if answer.value is None:
                    said = "" if answer.detail is None else f" ({answer.detail})"
                    return done, f"{answer.reason}{said}"
                translation = answer.value
            if middle:
                before.append((middle, translation))
            done.append(front + translation + behind)
        return done, None


COMMAND = Command(
    "translate", "conversations in another language, placeholders kept", add_arguments, run
)
