"""The page over several seeds: its arms, what failed, and the links to the seeds' own pages."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from report_cases import make_seeds

from cascade import report
from cascade.report_seeds import SeedsData, collect_seeds, over_seeds, render_seeds, seeds_headline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeds(tmp_path_factory.mktemp("seeds"), questions=4, steps=2)


@pytest.fixture(scope="module")
def data(folder: Path) -> SeedsData:
    return collect_seeds(folder)


def test_arms_hold_every_seed_and_what_failed(folder: Path, data: SeedsData) -> None:
    assert [(arm.name, arm.stage) for arm in data.arms] == [
        ("sft", "sft"), ("sft_more", "sft_more"), ("mpo", "mpo"), ("gspo", "rl_alone"),
        ("cascade", "rl"),
    ]  # fmt: skip
    entries = json.loads((folder / "ablation.json").read_text())["runs"]
    gspo = data.arms[3]
    values = [entry["accuracy"] for entry in entries if entry["arm"] == "gspo"]
    assert [point.accuracy for point in gspo.points] == values
    assert gspo.mean == over_seeds(values) and gspo.mean_of("compute") == 150.0
    cascade = data.arms[4]
    assert [point.error for point in cascade.points] == ["", "", "stage rl failed"]
    assert len(cascade.good) == 2 and cascade.mean is not None
    assert len({arm.tone for arm in data.arms}) == 5


def test_an_interval_over_seeds_is_students() -> None:
    rate = over_seeds([0.5, 0.6, 0.7])
    assert rate is not None
    # t(2, 0.975) = 4.3027, standard deviation 0.1
    assert rate.high - 0.6 == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    assert over_seeds([0.5]) is not None and over_seeds([]) is None


def test_differences_are_paired_by_seed(data: SeedsData) -> None:
    found = {(one.before, one.after): one for one in data.contrasts}
    assert len(found) == 10
    contrast = found["gspo", "cascade"]  # on the two seeds that both have
    a, b = data.arms[3], data.arms[4]
    gains = [
        y.accuracy - x.accuracy
        for x, y in zip(a.points, b.points, strict=True)
        if x.accuracy is not None and y.accuracy is not None
    ]
    assert contrast.seeds == len(gains) == 2
    assert contrast.gain.value == pytest.approx(sum(gains) / 2)
    assert seeds_headline(data).startswith("Highest over 2 seeds: cascade, ")


def test_the_page_links_the_seeds_and_nothing_else(folder: Path, data: SeedsData) -> None:
    path = report.write_report(folder)
    page = path.read_text(encoding="utf-8")
    assert path == folder / "report.html" and page == render_seeds(data)
    links = re.findall(r'href="([^#][^"]*)"', page)
    assert links == [f"seed-{seed}/report.html" for seed in (10, 11, 12)]
    assert all((folder / link).exists() for link in links)
    assert not re.search(r"https?:|<script|<link|@import|src=", page)
    assert "cascade, seed 12: stage rl failed" in page


def test_without_arms_every_evaluated_stage_is_one(tmp_path: Path) -> None:
    folder = make_seeds(tmp_path, (1, 2), questions=2, steps=2, stages=("sft", "mpo"))
    (folder / "ablation.json").unlink()
    (folder / "seed-2" / "eval" / "mpo" / "metrics.json").unlink()
    (folder / "seed-2" / "report.html").unlink()
    (folder / "seed-3").mkdir()
    data = collect_seeds(folder)
    assert [arm.name for arm in data.arms] == ["sft", "mpo"]
    assert [point.error for point in data.arms[1].points] == [
        "",
        "stage mpo has not been evaluated",
    ]
    assert [(run.seed, run.page) for run in data.runs] == [(1, True), (2, False), (3, False)]
    assert data.runs[2].state == "not begun"
    assert data.runs[0].state == "not begun: sft_more, rl_alone and rl"
    assert "not begun" in render_seeds(data)
