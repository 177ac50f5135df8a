"""What the data tools share: the options of input, output and endpoint, and their end report."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl.data import Quarantine, write_json
from internvl.errors import UserError
from internvl.terminal import print_table
from rewards.endpoint import Endpoint, Read, ReplyCacheError
from sft.data_tools.working import Counts, beside

MAX_CHARACTERS = 100_000  # of a conversation that is sent


def add_files(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Input, output, and what is borne of rows that cannot be used."""
    add = parser.add_argument
    add("input", type=Path, help="conversations: JSONL, parquet, a saved data set, or a meta.json")
    add("--output", type=Path, required=True, metavar="FILE",
        help=f"{output} (*.jsonl; of a meta.json a new meta.json)")  # fmt: skip
    add("--image-root", type=Path, metavar="DIR", help="where image paths start")
    add("--max-bad", type=float, default=0.05, metavar="X",
        help="share (<1) or number (>=1) of bad rows that is borne (default: %(default)s); they "
        "are in OUTPUT.quarantine.jsonl")  # fmt: skip
    add("--max-undecided", type=float, default=0.05, metavar="X",
        help="the same for undecided rows (OUTPUT.undecided.jsonl): more of them are an error once "
        "all is written (default: %(default)s)")  # fmt: skip


def add_endpoint(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The OpenAI-compatible endpoint, and how it is asked."""
    group = parser.add_argument_group("the endpoint (needs the extra api)")
    add = group.add_argument
    add("--base-url", metavar="URL",
        help="an OpenAI-compatible endpoint, as http://localhost:8000/v1")  # fmt: skip
    add("--model", metavar="NAME", help="the model's name there")
    add("--api-key-env", default="OPENAI_API_KEY", metavar="NAME",
        help="the environment variable with its key; local servers take any text "
        "(default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=16, metavar="N",
        help="requests at a time (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=120.0, metavar="S",
        help="seconds of one request (default: %(default)g)")  # fmt: skip
    add("--max-retries", type=int, default=6, metavar="N",
        help="times that a request is sent again, whatever went wrong; in between it waits 0.5 to "
        "8 seconds, or as long as Retry-After says (default: %(default)s)")  # fmt: skip
    add("--patience", type=float, default=600.0, metavar="S",
        help="seconds in all that a request is sent again while the server says that there are too "
        "many (HTTP 429); these do not count as retries (default: %(default)g)")  # fmt: skip
    add("--max-tokens", type=int, default=max_tokens, metavar="N",
        help="of a reply; a model that thinks needs more (default: %(default)s)")  # fmt: skip
    add("--max-characters", type=int, default=MAX_CHARACTERS, metavar="N",
        help="of a request; rows with more are undecided (default: %(default)s)")  # fmt: skip
    add("--cache", type=Path, metavar="FILE",
        help="where replies are kept (SQLite); several runs may share it "
        "(default: OUTPUT.replies.sqlite)")  # fmt: skip


def open_endpoint(args: argparse.Namespace) -> Endpoint:
    """The endpoint that the options name; nothing is sent.

    Raises UserError for what cannot be honoured.
    """
    if args.model is None:
        raise UserError("--base-url is given, but --model, the model's name there, is not")
    try:
        return Endpoint(
            args.base_url,
            args.model,
            api_key_env=args.api_key_env,
            timeout=args.timeout,
            max_retries=args.max_retries,
            patience=args.patience,
            max_concurrency=args.workers,
            max_tokens=args.max_tokens,
            max_characters=args.max_characters,
            cache=args.cache or beside(args.output, "replies.sqlite"),
            option=option_name,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def check_endpoint(endpoint: Endpoint, request: dict[str, Any], read: Read[Any]) -> None:
    """Ask something plain; raises UserError where nothing usable comes.

    What the endpoint said of it before is kept, as everything is: with all replies known a run
    needs no endpoint.
    """
    answer = endpoint.ask_one(request, read)
    if answer.value is None:
        said = "" if answer.detail is None else f" ({answer.detail})"
        raise UserError(
            f"--base-url {endpoint.base_url}, --model {endpoint.model}: {answer.reason}{said}"
        )


def endpoint_facts(endpoint: Endpoint) -> dict[str, Any]:
    """What a summary tells of the endpoint."""
    return {
        "base_url": endpoint.base_url,
        "model": endpoint.model,
        "requests": endpoint.traffic.requests,
        "rate_limited": endpoint.traffic.rate_limited,
    }


def option_name(name: str) -> str:
    """How the user writes an option of the endpoint."""
    name = "workers" if name == "max_concurrency" else name
    return "--" + name.replace("_", "-")


@contextmanager
def cache_faults_told() -> Iterator[None]:
    """A file of replies that cannot be used (any more) as a `UserError`."""
    try:
        yield
    except ReplyCacheError as error:
        raise UserError(str(error)) from None


def check_limits(args: argparse.Namespace) -> None:
    """Raise UserError for shares that are none, and a number of workers that is none."""
    for name in ("max_bad", "max_undecided"):
        if not vars(args)[name] >= 0:
            raise UserError(f"{option_name(name)} is {vars(args)[name]}; give 0 or more")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")


def open_quarantine(output: Path) -> Quarantine:
    """Begun anew each time: every run finds the same bad rows again."""
    path = beside(output, "quarantine.jsonl")
    path.unlink(missing_ok=True)
    return Quarantine(path)


def tell_counts(args: argparse.Namespace, counts: Counts, reasons: dict[str, str]) -> None:
    """Print what became of all rows; raises UserError where too many are undecided.

    reasons: further rows of the table, indented under what they belong to.
    """
    rows = [("read", f"{counts.read:,}", "")]
    for name, file in (
        ("kept", args.output.name),
        ("rejected", beside(args.output, "rejected.jsonl").name),
        ("undecided", beside(args.output, "undecided.jsonl").name),
        ("quarantined", beside(args.output, "quarantine.jsonl").name),
    ):
        number = getattr(counts, name)
        if number or name == "kept":
            rows.append((name, f"{number:,}", file))
        rows += [(f"  {told}", f"{counts.reasons[reason]:,}", "")
                 for reason, told in reasons.items()
                 if reason.startswith(f"{name}:") and counts.reasons.get(reason)]  # fmt: skip
    print_table(f"{args.input} -> {args.output}", rows, right={1})
    limit = args.max_undecided * (counts.read if args.max_undecided < 1 else 1)
    if counts.undecided:
        told = f"{counts.undecided:,} of {counts.read:,} rows are undecided: their reasons are in "
        told += f"{beside(args.output, 'undecided.jsonl')}; start the same command again to ask "
        told += "for these alone"
        if counts.undecided > limit:
            raise UserError(f"{told} (more than --max-undecided {args.max_undecided:g} allows)")
        print(told)


def write_summary(output: Path, facts: dict[str, object]) -> None:
    """The numbers of a run, and what they depend on."""
    write_json(beside(output, "summary.json"), facts)
