"""`sft filter`: rows that are worth training on, and the others with their reasons."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.errors import DataError, UserError
from internvl.terminal import Command
from sft.data_tools.options import (
    add_endpoint,
    add_files,
    check_endpoint,
    check_limits,
    endpoint_facts,
    open_endpoint,
    option_name,
    tell_counts,
    write_summary,
)
from sft.data_tools.rules import RULES
from sft.data_tools.scores import (
    DOMAINS,
    QUALITY,
    REPETITION,
    REPETITION_PROMPT,
    messages,
    read_score,
)

if TYPE_CHECKING:
    from rewards.endpoint import Endpoint
    from sft.data_tools.filtering import FilterConfig

_ASKED = (QUALITY, REPETITION)
_OF_SCORE = {
    QUALITY: ("quality_threshold", "quality_of_images", "domain", "domains"),
    REPETITION: ("repetition_threshold",),
}
_ONLY_ASKED = ("model", "ask", "cache", *(name for names in _OF_SCORE.values() for name in names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sft filter`."""
    add_files(parser, output="the rows that are kept")
    add = parser.add_argument
    add("--accept", type=Path, metavar="FILE",
        help="rows to keep whatever rules and scores say: what `sft review` saved, or those lines "
        "of OUTPUT.rejected.jsonl (or its undecided rows) that are to be taken back")  # fmt: skip
    add("--exempt", nargs="+", default=[], metavar="NAME",
        help="data sets whose repetition is not looked at (their 'dataset', or their name in "
        "meta.json)")  # fmt: skip
    rules = parser.add_argument_group("the rules, on every response")
    for rule in RULES:
        rules.add_argument(
            f"--{rule.option}", type=float, default=rule.default, metavar="X",
            help=f"{rule.name}: {rule.about} (default: %(default)g)",
        )  # fmt: skip
    rules.add_argument("--skip", nargs="+", default=[], metavar="RULE", help="rules left out",
                       choices=[rule.name for rule in RULES])  # fmt: skip
    scores = parser.add_argument_group("scores from 0 to 10 by a model, where --base-url is given")
    add = scores.add_argument
    add("--ask", nargs="+", choices=_ASKED, metavar="SCORE",
        help=f"which ones (default: {' '.join(_ASKED)})")  # fmt: skip
    add("--quality-threshold", type=float, metavar="X",
        help="rows below it are rejected (default: 7, as published)")  # fmt: skip
    add("--repetition-threshold", type=float, metavar="X",
        help="rows below it are rejected (default: 3, as published)")  # fmt: skip
    add("--quality-of-images", action="store_true",
        help="also of rows with images, which the model cannot see (published: "
        "text alone)")  # fmt: skip
    add("--domain", choices=DOMAINS,
        help="of rows whose field 'domain' names none, and whose data set --domains does not name "
        "(default: the model classifies them)")  # fmt: skip
    add("--domains", type=Path, metavar="FILE", help="YAML: domains by data set")
    add_endpoint(parser, max_tokens=512)


def run(args: argparse.Namespace) -> None:
    """`sft filter`."""
    from sft.data_tools.filtering import RowFilter
    from sft.data_tools.inputs import check_output
    from sft.data_tools.running import run_tool

    check_output(args.input, args.output)
    check_limits(args)
    config = read_config(args)
    endpoint = None if args.base_url is None else open_endpoint(args)
    deciding = RowFilter(config, endpoint)
    what = ("filtering", "kept")
    counts = run_tool(args, deciding.decide, endpoint, _check_endpoint, what=what, rejects=True)
    facts = {**counts.facts(), "rules": _rules_told(config), **_scores_told(config, endpoint)}
    write_summary(args.output, {"command": "filter", "input": str(args.input), **facts})
    if unknown := set(config.accepted) - deciding.accepted:
        print(f"{len(unknown)} row(s) of {args.accept} are not among the rows of {args.input}")
    for option, names in (("--exempt", config.exempt), ("--domains", config.domains)):
        for name in sorted(set(names) - deciding.data_sets):
            print(f"{option} names {name!r}, but no row is of that data set")
    named = [rule.name for rule in RULES] + list(_ASKED)
    reasons = {"kept:accepted": "accepted in a review"}
    reasons |= {f"rejected:{name}": name for name in named}
    reasons |= {f"undecided:{name}": f"no {name}" for name in ("domain", *_ASKED)}
    tell_counts(args, counts, reasons)


def read_config(args: argparse.Namespace) -> FilterConfig:
    """What the options ask for; raises UserError for those that cannot be honoured."""
    from sft.data_tools.filtering import FilterConfig

    asked = (args.ask or _ASKED) if args.base_url is not None else ()
    unread = [(name, "--base-url is not") for name in _ONLY_ASKED] if not asked else []
    for score in set(_ASKED).difference(asked):
        unread += [(name, f"--ask leaves {score} out") for name in _OF_SCORE[score]]
    for name, why in unread:
        if vars(args)[name] is not None and vars(args)[name] is not False:
            raise UserError(f"{option_name(name)} is given, but {why}")
    thresholds = {}
    for rule in RULES:
        value = vars(args)[rule.option.replace("-", "_")]
        if not 0 <= value < math.inf:
            raise UserError(f"--{rule.option} is {value}; give a number of 0 or more")
        if value > 1 and 0 < rule.default < 1:
            raise UserError(f"--{rule.option} is {value:g}; it is a share, from 0 to 1")
        thresholds[rule.name] = value
    scores = {}
    for name, default in ((QUALITY, 7.0), (REPETITION, 3.0)):
        value = vars(args)[f"{name}_threshold"]
        scores[name] = default if value is None else value
        if not 0 <= scores[name] <= 10:
            raise UserError(f"--{name}-threshold is {value}; scores are from 0 to 10")
    return FilterConfig(
        thresholds=thresholds,
        skip=args.skip,
        exempt=args.exempt,
        asked=asked,
        quality=scores[QUALITY],
        repetition=scores[REPETITION],
        domains={} if args.domains is None else _read_domains(args.domains),
        domain=args.domain,
        images_too=args.quality_of_images,
        accepted=frozenset() if args.accept is None else read_accepted(args.accept),
    )


def _read_domains(path: Path) -> dict[str, str]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or any(domain not in DOMAINS for domain in found.values()):
        raise DataError(f"{path}: expected lines 'data set: domain'; one of {', '.join(DOMAINS)}")
    return {str(name): domain for name, domain in found.items()}


def read_accepted(path: Path) -> frozenset[str]:
    """The keys of the rows that a review takes back: the field "key" of each line."""
    keys = set()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    # not splitlines: a text may hold what that takes for a line's end (U+2028)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            key: Any = json.loads(line)["key"]
        except (ValueError, LookupError, TypeError):
            key = None
        if not isinstance(key, str):
            raise DataError(f"{path}:{number}: no JSON object with a 'key', as rejected rows have")
        keys.add(key)
    if not keys:
        raise DataError(f"{path}: no line in it; there is nothing to accept")
    return frozenset(keys)


def _check_endpoint(endpoint: Endpoint) -> None:
    """Ask something plain, unless that is known from before: a wrong address is told at once."""
    turns = [{"value": "How many legs has a cat?"}, {"value": "Four."}]
    request = endpoint.request(messages(REPETITION_PROMPT, turns))
    check_endpoint(endpoint, request, read_score)


def _rules_told(config: FilterConfig) -> dict[str, Any]:
    return {name: value for name, value in config.thresholds.items() if name not in config.skip}


def _scores_told(config: FilterConfig, endpoint: Endpoint | None) -> dict[str, Any]:
    if endpoint is None:
        return {}
    thresholds = {QUALITY: config.quality, REPETITION: config.repetition}
    return {
        "scores": {name: thresholds[name] for name in config.asked},
        **endpoint_facts(endpoint),
    }


COMMAND = Command(
    "filter", "keep what is worth training on: rules, and a model's scores", add_arguments, run
)
