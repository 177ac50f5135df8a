"""What the documentation says exists: commands, their options, make's targets, files, headings."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")])
TOOLS = ("cascade", "mmpr", "sft", "internvl")
STAGES = ("sft", "mpo", "rl")
COMMAND = re.compile(
    rf"(?:^|&& |\$ |\bpython -m )({'|'.join(TOOLS)}|rewards) ([a-z]\w*)(?![\w/.:,-])(.*)"
)
STAGE = re.compile(rf"-m ({'|'.join(STAGES)})(?= |$)(.*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def code_of(page: Path) -> Iterator[tuple[int, str]]:
    """(line, code) of a page: indented lines, fences, and what stands in backticks."""
    fenced, start, held = False, 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    ") or held:
            held, start = held + line.strip(), start or number
            if held.endswith("\\"):
                held = held[:-1]
                continue
            # what follows three spaces, or a "#", is a remark
            yield start, re.split(r"\s{3,}|\s#\s", held)[0]
            held, start = "", 0
        else:
            yield from ((number, code) for code in re.findall(r"`([^`]+)`", line))


@cache
def options_of(tool: str) -> dict[str, set[str]]:
    """Of each command of a tool, its options."""
    module = "rewards.__main__" if tool == "rewards" else f"{tool}.cli"
    parser = importlib.import_module(module).build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: {option for action in sub._actions for option in action.option_strings}
        for name, sub in commands.choices.items()
    }


@cache
def options_of_stage(stage: str) -> set[str]:
    """The flags of `python -m STAGE`, which are its configuration's keys."""
    arguments = importlib.import_module("training.cli").ModelArguments
    config = vars(importlib.import_module(f"{stage}.config"))[f"{stage.upper()}Config"]
    names = {field.name for one in (config, arguments) for field in fields(one)}
    return {f"--{name}" for name in names} | {"--config", "--help"}


def faults_of(code: str) -> Iterator[str]:
    """What a line of code names that is not there."""
    for tool, name, rest in COMMAND.findall(code):
        if name not in options_of(tool):
            yield f"{tool} {name}"
            continue
        own = re.split(r" && | \| |; ", rest)[0]
        yield from (
            f"{tool} {name} {option}"
            for option in OPTION.findall(own)
            if option not in options_of(tool)[name] | {"--help"}
        )
    for stage, rest in STAGE.findall(code):
        yield from (
            f"-m {stage} {option}"
            for option in OPTION.findall(rest)
            if option not in options_of_stage(stage)
        )


def test_faults_are_found() -> None:
    """So the pages below are silent because nothing is wrong."""
    lines = {
        "cascade runn recipe.yaml": ["cascade runn"],
        "cd x && mmpr sample q.jsonl --nn 3 --n 2": ["mmpr sample --nn"],
        "accelerate launch --num_processes 2 -m mpo --config m.yaml --betta 1": ["-m mpo --betta"],
        "python -m rewards explan x": ["rewards explan"],
        "sft filter a --outputt b && internvl info ckpt": ["sft filter --outputt"],
        "cascade run recipe.yaml --dry-run": [],
        "mmpr/ and cascade/ are folders": [],
    }
    assert {line: [*faults_of(line)] for line in lines} == lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    told = [f"line {n}: {fault}" for n, code in code_of(page) for fault in faults_of(code)]
    assert told == []


def test_pages_name_commands() -> None:
    """Of each tool some: the pages are read, and not passed over."""
    found = [
        match[:2] for page in PAGES for _, code in code_of(page) for match in COMMAND.findall(code)
    ]
    assert len(found) > 150
    for tool in TOOLS:
        named = {name for own, name in found if own == tool}
        assert named >= {*options_of(tool)} - {"world", "parts"}, tool


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name
        for page in PAGES
        for _, code in code_of(page)
        for name in re.findall(r"(?:^|&& )make ([a-z.-]+)", code)
    }
    assert named >= {"demo", "test"}
    assert named <= targets


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link
