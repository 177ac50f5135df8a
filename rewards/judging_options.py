"""The options by which completions are judged, said once for all commands; what they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from rewards.datasets import load_table
from rewards.extract import STYLES
from rewards.judge import Judge
from rewards.judging import ASK_WHEN, Verifier
from rewards.pool import DEFAULT_LIMIT, VerifierPool


@dataclass
class JudgeOptions:
    """The judge's options; RLConfig has them as fields, `add_judging` makes flags of them."""

    judge_base_url: str | None = field(
        default=None,
        metadata={
            "help": "An OpenAI-compatible endpoint (http://localhost:8000/v1) whose model judges "
            'the answers of questions with "matcher": "judge". Needs the extra api.'
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "The model's name there."})
    judge_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "The environment variable with its key; local servers take any text."},
    )
    judge_when: str = field(
        default="named",
        metadata={
            "help": "'named': only questions that name it; 'cannot_judge': also where the rules "
            "say neither right nor wrong."
        },
    )
    judge_timeout: float = field(default=30.0, metadata={"help": "Seconds of one request."})
    judge_max_retries: int = field(
        default=2,
        metadata={"help": "Times that a question is asked again; then it cannot be judged."},
    )
    judge_max_concurrency: int = field(
        default=8, metadata={"help": "Requests at a time, of one process."}
    )
    judge_max_tokens: int = field(
        default=1024, metadata={"help": "Tokens of its reply; a model that thinks needs more."}
    )
    judge_cache: str | None = field(
        default=None,
        metadata={"help": "A file (SQLite) to keep judgements in; several processes may share it."},
    )

    def check_judge_options(self) -> None:
        """Raise ValueError for options that contradict each other."""
        if self.judge_when not in ASK_WHEN:
            raise ValueError(f"judge_when is {self.judge_when!r}; one of: {', '.join(ASK_WHEN)}")
        if self.judge_base_url is None:
            for option in fields(JudgeOptions):
                if vars(self)[option.name] != option.default:
                    raise ValueError(f"{option.name} is given, but judge_base_url is not")
        elif self.judge_model is None:
            raise ValueError("judge_base_url is given, but judge_model, the name there, is not")

    def open_judge(self) -> Judge | None:
        """The judge, or None where none is asked for; raises ValueError as `Judge` does."""
        if self.judge_base_url is None or self.judge_model is None:
            return None
        return Judge(
            self.judge_base_url,
            self.judge_model,
            api_key_env=self.judge_api_key_env,
            timeout=self.judge_timeout,
            max_retries=self.judge_max_retries,
            max_concurrency=self.judge_max_concurrency,
            max_tokens=self.judge_max_tokens,
            cache=None if self.judge_cache is None else Path(self.judge_cache),
        )


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
    group = parser.add_argument_group('a judge, for questions with "matcher": "judge"')
    for option in fields(JudgeOptions):
        about = option.metadata["help"].rstrip(".")
        default = option.default
        group.add_argument(
            "--" + option.name.replace("_", "-"),
            type=_type_of(option.name, default),
            metavar={int: "N", float: "S"}.get(type(default), "TEXT"),
            default=default,
            help=about if default is None else f"{about} (default: {default})",
        )


def _type_of(name: str, default: object) -> Callable[[str], object]:
    if name == "judge_cache":
        return Path  # of a recipe: it starts from the recipe's folder
    return str if default is None else type(default)


def make_verifier(args: argparse.Namespace) -> Verifier:
    """What the options of `add_judging` ask for; to be used in a `with` statement.

    Raises ValueError for options that cannot be honoured, and for a judge that does not answer.
    """
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1")
    if not 0 < args.limit <= 3600:
        raise ValueError(f"--limit is {args.limit}; give seconds, above 0 and at most 3600")
    given = {o.name: vars(args)[o.name] for o in fields(JudgeOptions)}
    if given["judge_cache"] is not None:
        given["judge_cache"] = str(given["judge_cache"])
    options = JudgeOptions(**given)
    options.check_judge_options()
    table = None if args.datasets is None else load_table(args.datasets)
    judge = options.open_judge()
    if judge is not None:
        judge.check()
    pool = VerifierPool(args.workers, limit=args.limit)
    return Verifier(pool, judge, args.judge_when, args.style, table)
