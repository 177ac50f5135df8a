"""What command lines share: the options by which completions are judged, and what they ask for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.datasets import load_table
from rewards.extract import STYLES
from rewards.judging import ASK_WHEN, Verifier
from rewards.pool import DEFAULT_LIMIT, VerifierPool

if TYPE_CHECKING:
    from rewards.judge import Judge

_OF_A_JUDGE: dict[str, Any] = {
    "judge_model": None,
    "judge_api_key_env": "OPENAI_API_KEY",
    "judge_when": "named",
    "judge_timeout": 30.0,
    "judge_max_retries": 2,
    "judge_max_concurrency": 8,
    "judge_max_tokens": 1024,
    "judge_cache": None,
}


def add_judging(parser: argparse.ArgumentParser) -> None:
    """The options of rules, and of a judge for what no rule can check."""
    add = parser.add_argument
    add(
        "--style",
        choices=STYLES,
        default="auto",
        help="how the prompt asked for the final answer (default: auto, the row's prompt_style)",
    )
    add(
        "--datasets",
        type=Path,
        metavar="FILE",
        help="YAML: matchers by data set, looked at before the built-in table",
    )
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes for mathematics, which alone can hang (default: %(default)s, by the cores)",
    )
    add(
        "--limit",
        type=float,
        default=DEFAULT_LIMIT,
        metavar="S",
        help="seconds of one comparison, then its outcome is timeout (default: %(default)s)",
    )
    _add_judge(parser.add_argument_group('a judge, for questions with "matcher": "judge"'))


def _add_judge(group: argparse._ArgumentGroup) -> None:
    def add(name: str, kind: type, metavar: str, about: str) -> None:
        default = _OF_A_JUDGE[name.removeprefix("--").replace("-", "_")]
        told = "" if default is None else f" (default: {default})"
        group.add_argument(name, type=kind, metavar=metavar, default=default, help=about + told)

    group.add_argument(
        "--judge-base-url", metavar="URL", help="an OpenAI-compatible endpoint, up to and with /v1"
    )
    add("--judge-model", str, "NAME", "the model's name there")
    add("--judge-api-key-env", str, "NAME", "variable with its key; local servers take any text")
    group.add_argument(
        "--judge-when",
        choices=ASK_WHEN,
        default=_OF_A_JUDGE["judge_when"],
        help="cannot_judge: also where the rules say neither right nor wrong (default: named)",
    )
    add("--judge-timeout", float, "S", "seconds of one request")
    add("--judge-max-retries", int, "N", "times that a question is asked again")
    add("--judge-max-concurrency", int, "N", "requests at a time")
    add("--judge-max-tokens", int, "N", "of its reply")
    add("--judge-cache", Path, "FILE", "SQLite, to keep judgements in; processes may share it")


def make_verifier(args: argparse.Namespace) -> Verifier:
    """What the options ask for; its pool must be closed.

    Raises ValueError for options that cannot be honoured, and for a judge that does not answer.
    """
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1")
    if not 0 < args.limit <= 3600:
        raise ValueError(f"--limit is {args.limit}; give seconds, above 0 and at most 3600")
    for name, default in _OF_A_JUDGE.items():
        if args.judge_base_url is None and vars(args)[name] != default:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning without --judge-base-url")
    if args.judge_base_url is not None and args.judge_model is None:
        raise ValueError("--judge-base-url needs --judge-model, the model's name there")
    table = None if args.datasets is None else load_table(args.datasets)
    judge = _open_judge(args)
    pool = VerifierPool(args.workers, limit=args.limit)
    return Verifier(pool, judge, args.judge_when, args.style, table)


def _open_judge(args: argparse.Namespace) -> Judge | None:
    if args.judge_base_url is None:
        return None
    from rewards.judge import Judge

    judge = Judge(
        args.judge_base_url,
        args.judge_model,
        api_key_env=args.judge_api_key_env,
        timeout=args.judge_timeout,
        max_retries=args.judge_max_retries,
        max_concurrency=args.judge_max_concurrency,
        max_tokens=args.judge_max_tokens,
        cache=args.judge_cache,
    )
    judge.check()
    return judge
