"""python -m rewards: how a verdict came about, and which verdicts are likely mistakes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rewards.extract import STYLES
from rewards.match import MATCHERS
from rewards.pool import DEFAULT_LIMIT, VerifierPool, shared_pool

EXAMPLE = """\
example:
  python -m rewards explain --completion 'It is 3 + 12. Final answer: 15' --answer 5
  python -m rewards explain --completion @answer.txt --answer 1/2 --answer 0.5 --matcher number
  python -m rewards explain rollouts.jsonl:17
  python -m rewards audit rollouts.jsonl --html audit.html

A text may be @FILE, read from a file, or -, read from standard input (@@ begins a text with one @).
`python -m rewards COMMAND --help` tells the rest. An error is one line, with exit code 2."""


class UsageError(ValueError):
    """Something the user can mend, told in one line."""


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other error."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of both commands; `args.run` does what they say."""
    parser = Parser(
        prog="python -m rewards",
        description=__doc__.partition(": ")[2].capitalize(),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    told = "print how a verdict came about, step by step"
    _add_explain(commands.add_parser("explain", help=told, description=told, allow_abbrev=False))
    told = "list likely wrong verdicts and the rates of outcomes"
    _add_audit(commands.add_parser("audit", help=told, description=told, allow_abbrev=False))
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--style", choices=STYLES, default="auto", help="how the prompt asked (default: auto)")
    add("--datasets", type=Path, metavar="FILE", help="a table like datasets.yaml, looked at first")
    add(
        "--limit",
        type=float,
        default=DEFAULT_LIMIT,
        metavar="S",
        help="seconds of one comparison, then its outcome is timeout (default: %(default)s)",
    )


def _add_explain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("place", nargs="?", metavar="ROLLOUTS.jsonl:LINE", help="a line of a file of rollouts")
    add("--question", metavar="TEXT", help="it may list options")
    add("--completion", metavar="TEXT", help="what the model wrote")
    add("--answer", action="append", metavar="TEXT", help="a gold answer; again for another")
    add("--matcher", action="append", choices=tuple(MATCHERS), help="again for another")
    add("--options", nargs="+", metavar="TEXT", help="the options of the question, in order")
    add("--dataset", metavar="NAME", help="the data set, by which the table chooses a matcher")
    _add_common(parser)
    add("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run_explain)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("rollouts", nargs="+", type=Path, metavar="ROLLOUTS.jsonl", help="or verdict records")
    add("--html", type=Path, metavar="FILE", help="write a page, too")
    add("--matcher", choices=tuple(MATCHERS), help="judge every row by this one")
    _add_common(parser)
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes for mathematics, which alone can hang (default: %(default)s, by the cores)",
    )
    add("--max-rows", type=int, default=200, metavar="N", help="rollouts shown on the page (200)")
    add(
        "--image-root", type=Path, metavar="DIR", help="where image paths start (the file's folder)"
    )
    add(
        "--max-bad",
        type=float,
        default=0.05,
        metavar="X",
        help="share (<1) or number (>=1) of bad lines that is borne (default: %(default)s)",
    )
    parser.set_defaults(run=run_audit)


def run_explain(args: argparse.Namespace) -> None:
    """`python -m rewards explain`."""
    from rewards.audit.rollouts import task_for
    from rewards.explain.explain import explain

    record, completion = _rollout_of(args) if args.place else _record_of(args)
    table = _table(args.datasets)
    try:
        task_for({**record, "completion": completion}, args.style, table)
    except ValueError as error:
        raise UsageError(str(error)) from None
    pool = shared_pool() if args.limit == DEFAULT_LIMIT else VerifierPool(limit=args.limit)
    told = explain(record, completion, style=args.style, table=table, pool=pool)
    if args.json:
        import json

        print(json.dumps(told.as_dict()))
        return
    from rewards.explain.text import print_explanation

    print_explanation(told)


def _record_of(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The question and the completion of the options."""
    if missing := [name for name in ("completion", "answer") if vars(args)[name] is None]:
        raise UsageError(f"give --{' and --'.join(missing)}, or ROLLOUTS.jsonl:LINE")
    texts = [args.question, args.completion, *args.answer, *(args.options or [])]
    if texts.count("-") > 1:
        raise UsageError("standard input can be read once, but '-' is given twice")
    record: dict[str, Any] = {
        "question": None if args.question is None else _text(args.question),
        "answer": [_text(answer) for answer in args.answer],
        "options": None if args.options is None else [_text(option) for option in args.options],
        "matcher": args.matcher,
        "dataset": args.dataset,
    }
    if len(args.answer) == 1:
        record["answer"] = record["answer"][0]
    return record, _text(args.completion)


def _rollout_of(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The question and the completion of a line; options given beside it replace its own."""
    from rewards.audit.rollouts import rollout_at

    file, colon, number = args.place.rpartition(":")
    if not colon or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise UsageError(f"{args.place!r} names no line; write ROLLOUTS.jsonl:LINE, from 1 on")
    if args.completion is not None or args.answer is not None or args.question is not None:
        raise UsageError("--question, --completion and --answer have no meaning with a line")
    try:
        record = rollout_at(Path(file), int(number)).record
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name in ("matcher", "options", "dataset"):
        if vars(args)[name] is not None:
            record[name] = vars(args)[name]
    return record, record["completion"]


def _text(value: str) -> str:
    """A text as it was meant: @FILE, - for standard input, @@.. for a text that begins with @."""
    if value == "-":
        return sys.stdin.read()
    if value.startswith("@@"):
        return value[1:]
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{value[1:]}: not UTF-8 at byte {error.start}") from None


def run_audit(args: argparse.Namespace) -> None:
    """`python -m rewards audit`."""
    from rewards.audit.audit import audit
    from rewards.audit.text import print_audit

    for name, least in (("workers", 1), ("max_rows", 0), ("max_bad", 0)):
        if not vars(args)[name] >= least:
            raise UsageError(f"--{name.replace('_', '-')} is {vars(args)[name]}; at least {least}")
    size = sum(path.stat().st_size for path in args.rollouts)
    if args.html is not None and args.html.resolve() in [path.resolve() for path in args.rollouts]:
        raise UsageError(f"--html {args.html} is the input itself")
    table = _table(args.datasets)
    from tqdm import tqdm

    with tqdm(
        total=size, desc="judging", unit="B", unit_scale=True, delay=1, disable=None
    ) as progress:
        report = audit(
            args.rollouts,
            table=table,
            matcher=args.matcher,
            style=args.style,
            workers=args.workers,
            limit=args.limit,
            on_bytes=progress.update,
        )
    _check_bad(report, args.max_bad)
    if args.html is not None:
        from rewards.audit.page import write_page

        given = {"matcher": args.matcher, "style": args.style, "datasets": args.datasets}
        options = [
            f"--{name}={value}" for name, value in given.items() if value not in (None, "auto")
        ]
        write_page(
            report,
            args.html,
            max_rows=args.max_rows,
            image_root=args.image_root,
            options=options,
        )
    print_audit(report)
    if args.html is not None:
        print(f"{args.html}: the page")


def _check_bad(report: Any, max_bad: float) -> None:
    """Refuse a file of which more lines are bad than are borne."""
    total = report.rows + report.bad_lines
    if not total:
        raise UsageError(f"{', '.join(report.files)}: no rollouts")
    borne = max_bad * total if max_bad < 1 else max_bad
    if report.bad_lines > borne:
        raise UsageError(
            f"{report.bad_lines} of {total} lines are bad, more than --max-bad {max_bad:g} allows; "
            f"the first: {report.bad[0]}"
        )


def _table(path: Path | None) -> Any:
    """The table of a user's file before ours, None for ours alone."""
    from rewards.datasets import load_table

    try:
        return None if path is None else load_table(path)
    except ValueError as error:
        raise UsageError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with 2 and one line for an error that the user can mend."""
    args = build_parser().parse_args(argv)
    if not args.limit > 0:
        build_parser().error(f"--limit is {args.limit}; give seconds, above 0")
    try:
        args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
