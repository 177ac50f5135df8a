"""The report of a run: what it must say, what it must never do, and what it can do without."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_cases import (
    DEMO_RATES,
    STAGES,
    make_demo_run,
    make_run,
    write_json,
)

from cascade import report
from cascade.report_data import Picture, Rate, ReportData
from internvl.errors import UserError
from internvl.thumbnails import Thumbnail

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"  # what rich writes where a column is too narrow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(run: Path) -> ReportData:
    return report.collect(run)


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return report.render(data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report.collect(make_demo_run(tmp_path_factory.mktemp("demo")))


class Tags(HTMLParser):
    """Collects start tags, and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# -- what is read ------------------------------------------------------------------------------


def test_a_stage_knows_its_kind_and_where_it_began(data: ReportData) -> None:
    kinds = {name: (info.kind, info.origin) for name, info in data.stages.items()}
    assert kinds == {
        "sft": ("sft", None), "sft_more": ("sft", "sft"), "pairs": ("pairs", "sft"),
        "mpo": ("mpo", "sft"), "select": ("select", "mpo"), "rl_alone": ("rl", "sft"),
        "rl": ("rl", "mpo"),
    }  # fmt: skip
    trained = [data.stages[name].tone for name in STAGES]
    assert len(set(trained)) == len(trained)  # a colour each
    assert [result.name for result in data.line] == list(STAGES)


def test_the_first_format_says_the_same_by_its_commands(demo: ReportData) -> None:
    kinds = {name: (info.kind, info.origin, info.aside) for name, info in demo.stages.items()}
    assert kinds == {
        "sft-careful": ("sft", None, True), "sft": ("sft", "sft-careful", False),
        "mpo": ("mpo", "sft", False), "control": ("mpo", "sft", True), "rl": ("rl", "mpo", False),
        "pairs": ("pairs", None, True),
    }  # fmt: skip
    assert [result.name for result in demo.results] == [
        "sft-careful",
        "sft",
        "mpo",
        "control",
        "rl",
    ]
    assert [result.label for result in demo.line] == ["SFT", "MPO", "GSPO"]
    # no intervals in its metrics: 1.96 standard errors
    mpo = demo.line[1].whole.sampled
    assert mpo.value == DEMO_RATES["mpo"][1] == 0.78
    assert mpo.high - mpo.value == pytest.approx(1.96 * 0.8 * (0.78 * 0.22 / 2000) ** 0.5, rel=1e-3)
    assert demo.gates == [] and demo.waiting == [] and demo.demo_world


def test_results_are_those_of_the_metrics(run: Path, data: ReportData) -> None:
    metrics = json.loads((run / "eval" / "mpo" / "metrics.json").read_text())
    mpo = next(result for result in data.results if result.name == "mpo")
    whole = mpo.whole
    assert (whole.n, whole.k) == (30, 4)
    assert whole.sampled == Rate(metrics["sampled"], *metrics["sampled_ci"])
    assert whole.greedy == Rate(metrics["greedy"], *metrics["greedy_ci"])
    assert sorted(whole.passes) == [1, 2, 4]
    assert whole.passes[4] == Rate(metrics["pass@4"], *metrics["pass@4_ci"])
    assert whole.majorities[4].value == metrics["majority@4"]
    assert whole.shares == {"format": 1.0, "careless": metrics["careless"]}
    assert list(mpo.datasets) == ["charts", "tables"]
    assert mpo.datasets["tables"].n == 15
    assert mpo.datasets["tables"].sampled.value == metrics["datasets"]["tables"]["sampled"]
    assert mpo.seconds == 31.8


def test_steps_are_paired_question_by_question(run: Path, data: ReportData) -> None:
    assert [(s.before.name, s.after.name) for s in data.steps] == [
        ("sft", "sft_more"), ("sft", "mpo"), ("sft", "rl_alone"), ("mpo", "rl")
    ]  # fmt: skip
    assert {(s.before.name, s.after.name) for s in data.others} == {
        ("sft_more", "mpo"), ("sft_more", "rl_alone"), ("sft_more", "rl"), ("mpo", "rl_alone"),
        ("rl_alone", "rl"),
    }  # fmt: skip
    step = next(step for step in data.steps if step.after.name == "mpo")
    before, after = (
        [json.loads(line) for line in (run / "eval" / name / "predictions.jsonl").open()]
        for name in ("sft", "mpo")
    )
    right = [(a["greedy"]["outcome"] == "correct", b["greedy"]["outcome"] == "correct")
             for a, b in zip(before, after, strict=True)]  # fmt: skip
    assert step.paired and step.n == 30
    assert step.only_after == right.count((False, True))
    assert step.only_before == right.count((True, False))
    gains = [
        sum(one["outcome"] == "correct" for one in b["sampled"]) / 4
        - sum(one["outcome"] == "correct" for one in a["sampled"]) / 4
        for a, b in zip(before, after, strict=True)
    ]
    assert step.sampled.value == pytest.approx(sum(gains) / 30)
    assert step.sampled.low < step.sampled.value < step.sampled.high
    assert step.verdict == "up" and step.sampled_p is not None and step.sampled_p < 0.001


def test_without_predictions_a_step_is_of_two_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=12, steps=2, stages=("sft", "mpo"))
    for path in run.glob("eval/*/predictions.jsonl"):
        path.unlink()
    data = report.collect(run)
    (step,) = data.steps
    a, b = (result.whole.sampled for result in data.results)
    assert not step.paired and step.sampled_p is None and step.greedy_p is None
    assert step.sampled.value == b.value - a.value
    wide = ((b.value - b.low) ** 2 + (a.high - a.value) ** 2) ** 0.5
    assert step.sampled.low == pytest.approx(step.sampled.value - wide)
    assert data.examples == [] and data.changes == []


def test_rollouts_and_the_same_questions_before_and_after(run: Path, data: ReportData) -> None:
    pairs, select = data.rollouts
    assert (pairs.model, select.model, pairs.kept, select.kept) == ("sft", "mpo", None, 15)
    rows = [json.loads(line) for line in (run / "stages/pairs/verdicts.jsonl").open()]
    outcomes = [row["outcome"] for row in rows]
    assert pairs.outcomes == {
        name: outcomes.count(name) for name in ("correct", "wrong", "no_answer")
        if name in outcomes
    }  # fmt: skip
    assert pairs.size == 8 and sum(pairs.right) == 30
    assert sum(k * n for k, n in enumerate(pairs.right)) == pairs.outcomes["correct"]
    changes = {change.info.name: change for change in data.changes}
    # SFT's and MPO's model were asked the same questions for pairs and for the selection
    assert changes["mpo"].source == "rollouts of pairs and select"
    assert (changes["mpo"].before, changes["mpo"].after) == (pairs.right, select.right)
    right = [
        Counter(row["dataset"] + row["id"] for row in map(json.loads, path.open())
                if row["outcome"] == "correct")
        for path in (run / "stages/pairs/verdicts.jsonl", run / "stages/select/verdicts.jsonl")
    ]  # fmt: skip
    keys = {row["dataset"] + row["id"] for row in rows}
    gains = [right[1][key] - right[0][key] for key in keys]
    assert changes["mpo"].up == sum(gain > 0 for gain in gains)
    assert changes["mpo"].down == sum(gain < 0 for gain in gains)
    assert 0 in gains
    assert changes["rl"].source == "samples of the evaluation"
    assert len(changes["rl"].before) == 5 and changes["rl"].n == 30
    assert changes["rl"].up + changes["rl"].down <= 30


def test_curves_hold_everything_that_was_logged(data: ReportData) -> None:
    trainings = {one.info.name: one for one in data.trainings}
    assert list(trainings) == list(STAGES)
    panels = {panel.title: panel for panel in trainings["rl"].panels}
    assert [line.label for line in panels["Outcomes"].lines] == ["correct", "wrong"]  # no time-out
    assert [line.label for line in panels["Parts of the reward"].lines] == ["format", "accuracy"]
    assert panels["Entropy"].bounds == (("collapse_min_entropy", 0.2),)
    entropy = panels["Entropy"].lines[0].values
    assert panels["Entropy"].passed == sum(value < 0.2 for value in entropy) > 0
    assert panels["Log-prob gap, largest"].bounds == (("max_logprob_gap", 1e-4),)
    assert panels["Log-prob gap, largest"].passed == 0
    assert [panel.title for panel in trainings["rl"].others] == ["my/own_number"]
    assert [p.title for p in trainings["rl"].panels if p.is_time] == ["Seconds of a step, by phase"]
    loss = panels["Loss"]
    assert [(line.key, line.label) for line in loss.lines] == [
        ("loss", "training"), ("eval_loss", "held out")
    ]  # fmt: skip
    packing = {panel.title: panel for panel in trainings["sft"].panels}["Packs filled"]
    assert packing.unit == "share" and packing.keys == "packing/*"
    for training in data.trainings:
        steps = {len(line.steps) for panel in training.panels for line in panel.lines}
        assert steps <= {3, 24}


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=2, steps=4, stages=("sft",))
    log = [{"step": n, "loss": value, "grad_norm": float("nan")}
           for n, value in enumerate([1.0, float("inf"), 0.5])]  # fmt: skip
    write_json(run / "stages" / "sft" / "trainer_state.json", {"log_history": log})
    (training,) = report.collect(run).trainings
    (panel,) = training.panels  # of a number that is never finite there is nothing to draw
    assert (panel.lines[0].values, panel.lines[0].dropped) == ((1.0, 0.5), 1)
    data = replace(report.collect(run), results=[], examples=[], pairs=[])
    assert "1 of loss not finite" in report.render(data)


def test_time_cpu_and_tokens_by_process(run: Path, data: ReportData) -> None:
    found = {one.name: (one.seconds, one.cpu_seconds, one.tokens) for one in data.processes}
    assert found["mpo"] == (31.8, pytest.approx(47.7), None)
    assert found["evaluate.mpo"] == (9.5, 14.25, 30 * 5 * 20)
    assert found["pairs.sample"] == (12.0, 18.0, 30 * 8 * 3)
    assert found["pairs.verify"][2] is None
    log = json.loads((run / "stages/sft/trainer_state.json").read_text())["log_history"]
    assert found["sft"][2] == round(max(one["num_tokens"] for one in log if "num_tokens" in one))


def test_a_run_without_any_result_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=1, steps=2, stages=())
    (run / "recipe.yaml").unlink()
    data = report.collect(run)
    assert data.results == [] and data.title == "recipe"
    path = report.write_report(run)
    assert path == run / "report.html"
    assert "nothing can be said of its accuracy" in path.read_text(encoding="utf-8")


def test_an_image_that_is_not_there_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=2, steps=2, stages=("sft",))
    (run / "world/images/heldout/00000.png").unlink()
    (run / "world/images/heldout/00001.png").write_bytes(b"no image")
    data = report.collect(run)
    shown = {row.id: row.pictures for row in data.examples}
    assert shown["heldout-0"] == (Picture(None, "images/heldout/00000.png", "not found"),)
    assert shown["heldout-1"] == (Picture(None, "images/heldout/00001.png", "cannot be read"),)
    page = report.render(replace(data, trainings=()))
    assert "images/heldout/00000.png: not found" in page


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("manifest.json", None, "manifest.json: not found"),
        ("eval/mpo/metrics.json", "{", "not JSON"),
        ("eval/mpo/metrics.json", '{"n": 1, "k": 1, "greedy": "x"}', "'greedy' is 'x'"),
        ("eval/mpo/predictions.jsonl", "{}\n", "'greedy' is missing"),
        ("eval/mpo/predictions.jsonl", "[\n", "predictions.jsonl:1: not JSON"),
        ("stages/pairs/pairs.jsonl", '{"chosen": "a", "rejected": "b"}\n', "'question' is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    path = make_demo_run(tmp_path, questions=1, steps=2) / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        report.collect(tmp_path)


# -- the page ----------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_needs_nothing_else(page: str, data: ReportData) -> None:
    parser = Tags()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page)
    assert not re.search("#01fe[12]", page)  # every placeholder became a colour of the theme
    for tag, attributes in parser.tags:
        for key in {"src", "href", "xlink:href"}.intersection(attributes):
            start = "data:image/" if tag == "img" else "#"
            assert str(attributes[key]).startswith(start)
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"])[1:] for tag, attributes in parser.tags if tag == "a"]
    assert len(links) == 8 and set(links) <= set(ids)
    assert sum(tag == "img" for tag, _ in parser.tags) == 8 + 6
    panels = sum(len(one.panels) + len(one.others) for one in data.trainings)
    # accuracy, steps, data sets, sizes: twice each, for wide and narrow
    assert sum(tag == "svg" for tag, _ in parser.tags) == 2 * 4 + 4 + 2 + panels


def test_the_page_is_small(page: str) -> None:
    assert len(page) < 1_500_000  # 60 charts and 14 pictures


def test_images_show_where_they_were_cut(data: ReportData, page: str) -> None:
    shown = [picture.shown for row in data.examples for picture in row.pictures]
    shown += [picture.shown for row in data.pairs[0].rows for picture in row.pictures]
    wide = [picture for picture in shown if picture and picture.width == 112]
    assert 0 < len(wide) < len(shown)
    assert {picture.grid for picture in wide} == {(2, 1)}
    assert {one.grid for one in shown if one and one.width == 56} == {(1, 1)}
    assert page.count(">2 x 1 tiles + thumbnail<") == len(wide)
    assert page.count(">1 tile<") == len(shown) - len(wide)
    cut = '<i class="cut x" style="left: 50.00%"></i>'
    assert page.count(cut) == page.count('<i class="cut') == len(wide)
    assert Thumbnail("", 3, 2, (3, 2), (3, 2)).cuts == [
        ("x", pytest.approx(100 / 3)), ("x", pytest.approx(200 / 3)), ("y", 50)
    ]  # fmt: skip


def test_untrusted_text_is_escaped(data: ReportData) -> None:
    bad = '<script>alert("x")</script>'
    first, pairs, process = data.examples[0], data.pairs[0], data.processes[0]
    info = replace(data.results[0].info, label=bad)
    answers = tuple(replace(one, completion=bad, outcome=bad, info=info) for one in first.answers)
    missing = Picture(None, bad, bad)
    pair = replace(pairs.rows[0], chosen=bad, rejected=f"no {bad}")
    example = replace(first, question=bad, answer=bad, id='"><b>', answers=answers, dataset=bad)
    hostile = replace(
        data,
        title=bad,
        recipe=bad,
        revision=bad,
        versions={bad: bad},
        waiting=[bad],
        trainings=(),
        results=[replace(data.results[0], info=info)],
        steps=[replace(data.steps[0], after=info)],
        examples=[replace(example, pictures=(missing,))],
        pairs=[replace(pairs, rows=(pair,))],
        processes=[replace(process, command=(bad,), inputs={bad: bad})],
        config_files=[(bad, bad)],
    )
    page = report.render(hostile)
    assert "<script" not in page and "<b>&" not in page and '"><b>' not in page
    assert page.count("&lt;script&gt;alert(") >= 20


def test_the_same_run_gives_the_same_bytes(run: Path, data: ReportData) -> None:
    light = [replace(one, trainings=one.trainings[:1]) for one in (data, report.collect(run))]
    assert report.render(light[0]) == report.render(light[1])
