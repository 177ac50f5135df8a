"""What a report says in words, what it chooses to show, and its table on the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from report_cases import make_demo_run, make_run

from cascade import report
from cascade.report_choose import choose_examples, choose_pairs, fate, fate_words
from cascade.report_data import Measures, Rate, ReportData, StageInfo, StageResult, Step
from cascade.report_words import mark_words
from cascade.terminal import stage_table

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"  # what rich writes where a column is too narrow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report.collect(make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report.collect(make_demo_run(tmp_path_factory.mktemp("demo")))


def result(name: str, sampled: float, origin: str | None) -> StageResult:
    rate = Rate(sampled, sampled - 0.01, sampled + 0.01)
    info = StageInfo(name, name, "sft", origin=origin)
    return StageResult(info, Measures(2000, 4, rate, rate, 23.0))


def step(before: StageResult, after: StageResult, low: float, high: float) -> Step:
    gain = Rate((low + high) / 2, low, high)
    return Step(before.info, after.info, 2000, True, gain, 0.5, gain, 0.5)


def test_the_headline_is_as_sober_as_the_numbers(data: ReportData) -> None:
    a, b, c = result("a", 0.80, None), result("b", 0.82, "a"), result("c", 0.72, "b")
    line = replace(data, results=[a, b, c], others=[])
    said = report.headline(replace(line, steps=[step(a, b, -0.01, 0.05), step(b, c, -0.13, -0.07)]))
    assert said == (
        "On 2,000 held-out questions, sampled accuracy went from 80.0% (a) to 82.0% (b) to 72.0% "
        "(c): b shows no difference from a (+2.0 points, -1.0 to +5.0) and c made it worse than b "
        "(-10.0 points, -13.0 to -7.0)."
    )
    up = replace(line, results=[a, b], steps=[step(a, b, 0.01, 0.03)])
    assert report.headline(up).endswith("to 82.0% (b): a gain whose 95% interval leaves out 0.")


def test_the_headline_of_arms_tells_the_highest_and_the_next(data: ReportData) -> None:
    a, b, c = result("a", 0.5, None), result("b", 0.82, "a"), result("c", 0.81, "a")
    arms = replace(data, results=[a, b, c], steps=[step(a, b, 0.3, 0.34), step(a, c, 0.29, 0.33)])
    said = report.headline(replace(arms, others=[step(b, c, -0.03, 0.01)]))
    assert said == (
        "Highest on 2,000 held-out questions: b, 82.0% of the sampled answers right, by way of "
        "50.0% (a): a gain whose 95% interval leaves out 0; over 81.0% (c) it has +1.0 points, "
        "-1.0 to +3.0, which shows no difference."
    )


def test_the_demo_tells_what_its_control_says(demo: ReportData) -> None:
    page = report.render(replace(demo, trainings=()))
    assert "The control, SFT continued on the chosen completions alone" in page
    assert "It cannot show" in page


def test_examples_are_chosen_by_fate_in_file_order() -> None:
    labels = ["SFT", "MPO", "GSPO"]
    assert fate([False, True, True], labels) == "right from MPO on"
    assert fate([True, False, True], labels) == "right from GSPO on"
    assert fate([True, True, True], labels) == "right throughout"
    assert fate([False, True, False], labels) == "right once, wrong in the end"
    assert fate([False, False, False], labels) == "never right"
    words = fate_words(labels)
    fates = {f"q{index}": words[index % 3] for index in range(20)}
    assert choose_examples(fates, words, 8) == ["q0", "q3", "q6", "q1", "q4", "q7", "q2", "q5"]
    assert len(choose_examples({"a": words[0]}, words, 8)) == 1


def test_pairs_show_slips_and_other_answers() -> None:
    def row(name: str, rejected: str) -> dict[str, Any]:
        return {"id": name, "question": name, "chosen": "a b c d e", "rejected": rejected}

    slips = [row(f"s{index}", "a b c d x") for index in range(6)]
    others = [row(f"o{index}", "u v w x y") for index in range(4)]
    chosen = choose_pairs([*slips, slips[0], *others], 6)
    assert [one["id"] for one in chosen] == ["s0", "s1", "s2", "o0", "o1", "o2"]
    assert len(choose_pairs(slips[:5], 6)) == 5
    assert len(choose_pairs([*slips, others[0]], 6)) == 6


def test_words_that_differ_are_marked() -> None:
    marks = mark_words("The red bar is 2. 7 + 2 = 9", "The red bar is 3. 7 + 3 = 10")
    assert [text for text, differs in marks if differs] == ["2.", "2", "9"]
    assert " ".join(text for text, _ in marks) == "The red bar is 2. 7 + 2 = 9"


def test_the_terminal_table_holds_every_checkpoint(demo: ReportData) -> None:
    from rich.console import Console

    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(stage_table(demo))
    lines = captured.get().splitlines()
    assert not any(ELLIPSIS in line for line in lines)
    assert "2,000 held-out questions" in captured.get()
    mpo = next(line for line in lines if "MPO" in line)
    for text in ("83.5", "78.0 +-1.5", "99.0", "0.0", "73.0", "32 s"):
        assert text in mpo
    assert (
        sum(any(name in line for name in ("SFT", "MPO", "Control", "GSPO")) for line in lines) == 5
    )
