"""The report of a run: what it must say, what it must never do, and what it can do without."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from cascade import report
from cascade.report_choose import choose_examples, choose_pairs, fate, fate_words
from cascade.report_data import StageResult, difference
from cascade.terminal import stage_table
from internvl.errors import UserError
from internvl.thumbnails import Thumbnail

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"  # what rich writes where a column is too narrow
COLOURS = {"red": "#dc3232", "green": "#32be46", "blue": "#3c5ae6", "yellow": "#e6d232"}
# name: greedy, sampled, format, tokens, careless, right chains, seconds
RESULTS = {
    "sft-careful": (0.752, 0.620, 0.981, 23.1, 0.0, 0.552, 71.3),
    "sft": (0.130, 0.321, 0.989, 15.9, 0.583, 0.262, 17.2),
    "mpo": (0.835, 0.780, 0.994, 23.0, 0.0, 0.741, 31.8),
    "control": (0.849, 0.651, 0.991, 21.7, 0.161, 0.602, 18.4),
    "rl": (0.879, 0.855, 0.999, 23.0, 0.0, 0.830, 92.6),
}
LOGGED = {
    "sft-careful": {"loss": (2.9, 0.4), "learning_rate": (1e-3, 1e-4)},
    "sft": {"loss": (0.9, 0.5), "learning_rate": (5e-4, 1e-5)},
    "mpo": {
        "loss": (1.27, 0.86), "loss/sigmoid": (0.69, 0.41), "loss/bco_pair": (1.39, 1.02),
        "loss/sft": (0.44, 0.33), "rewards/chosen": (0.0, 0.41), "rewards/rejected": (0.0, -1.3),
        "rewards/margins": (0.0, 1.7), "rewards/accuracies": (0.5, 0.84),
        "bco/delta": (0.0, -0.3), "grad_norm": (6.0, 3.0),
    },
    "control": {"loss": (0.44, 0.30), "grad_norm": (3.0, 1.0)},
    "rl": {
        "loss": (0.0, -0.01), "reward": (0.8, 0.95), "reward_std": (0.3, 0.2),
        "clip_ratio/region_mean": (0.1, 0.2), "sampling/logprob_gap_max": (2e-6, 3e-6),
        "frac_reward_zero_std": (0.3, 0.6), "completions/mean_length": (22.8, 23.0),
        "entropy": (0.31, 0.12),
    },
}  # fmt: skip


def make_run(run: Path, *, questions: int = 30, steps: int = 24, n: int = 2000) -> Path:
    """Write a run folder as `cascade demo` leaves it, with invented but likely numbers."""
    rng = random.Random(0)
    rows = [make_question(run / "world", index, rng) for index in range(questions)]
    for name, (greedy, sampled, format_, tokens, careless, chain, _) in RESULTS.items():
        metrics = {
            "name": name, "model": f"stages/{name}", "n": n, "k": 4, "greedy": greedy,
            "greedy_se": math.sqrt(greedy * (1 - greedy) / n), "sampled": sampled,
            "sampled_se": 0.8 * math.sqrt(sampled * (1 - sampled) / n), "format": format_,
            "mean_tokens": tokens, "careless": careless, "chain_correct": chain,
        }  # fmt: skip
        write_json(run / "eval" / name / "metrics.json", metrics)
        logged = LOGGED[name]
        answered = [answer(row, greedy, sampled, careless, rng) for row in rows]
        write_lines(run / "eval" / name / "predictions.jsonl", answered)
        log = [
            {"step": step} | {key: wander(*ends, step / steps, rng) for key, ends in logged.items()}
            for step in range(1, steps + 1)
        ]
        log += [{"step": step, "eval_gold_probability": step / 50} for step in (8, 16, 24)]
        write_json(run / "stages" / name / "trainer_state.json", {"log_history": log})
    write_pairs(run, rows, rng)
    write_json(run / "stages" / "mpo" / "config.resolved.json",
               {"learning_rate": 3e-4, "max_tiles": 2})  # fmt: skip
    write_json(run / "stages" / "mpo" / "config.json", {"vision_config": {"image_size": [56, 56]}})
    (run / "recipe.yaml").write_text("preset: full\n")
    write_json(run / "manifest.json", {"seed": 7, "preset": "full", "stages": [
        {"name": name, "command": ["accelerate", "launch", "-m", name, "--config", "a b.yaml"],
         "seconds": seconds, "started": "2026-11-20T09:00:00Z", "key": "0" * 64}
        for name, seconds in [*((name, row[-1]) for name, row in RESULTS.items()), ("pairs", 41.0)]
    ]})  # fmt: skip
    summary = [{"name": name, "greedy": row[0], "sampled": row[1]} for name, row in RESULTS.items()]
    summary = [row for row in summary if row["name"] in ("sft", "mpo", "rl")]
    write_json(run / "summary.json", {"seed": 7, "seconds": 372.4, "stages": summary})
    return run


def wander(first: float, last: float, done: float, rng: random.Random) -> float:
    """A noisy way from first to last, quick in the beginning, as losses go."""
    return first + (last - first) * done**0.4 + rng.gauss(0, abs(last - first) / 9)


def make_question(world: Path, index: int, rng: random.Random) -> dict[str, Any]:
    """Draw one chart and return its question, with the heights beside it."""
    heights = {name: rng.randint(1, 9) for name in rng.sample(list(COLOURS), 4)}
    image = Image.new("RGB", (112 if index % 2 else 56, 56), (12, 12, 14))
    for place, (name, height) in enumerate(heights.items()):
        box = (4 + 13 * place, 54 - 5 * height, 12 + 13 * place, 54)
        ImageDraw.Draw(image).rectangle(box, fill=COLOURS[name])
    path = world / "images" / "heldout" / f"{index:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    first, second = rng.sample(list(COLOURS), 2)
    return {
        "id": f"heldout-{index}", "image": f"images/heldout/{index:05d}.png",
        "question": f"<image>\nWhat is the sum of the {first} and {second} bars?",
        "answer": str(heights[first] + heights[second]),
        "bars": (first, heights[first], second, heights[second]),
    }  # fmt: skip


def completion(row: dict[str, Any], right: bool, careless: bool, rng: random.Random) -> str:
    first, a, second, b = row["bars"]
    b += 0 if right else rng.choice((-1, 1))
    if careless:
        return f"It looks clear from the chart. Final Answer: {a + b}"
    reading = f"The {first} bar is {a}. The {second} bar is {b}."
    return f"{reading} {a} + {b} = {a + b}. Final Answer: {a + b}"


def answer(
    row: dict[str, Any], greedy: float, sampled: float, careless: float, rng: random.Random
) -> dict[str, Any]:
    def one(rate: float) -> dict[str, str]:
        right = rng.random() < rate
        text = completion(row, right, rng.random() < careless, rng)
        return {"completion": text, "outcome": "correct" if right else "wrong"}

    kept = {key: row[key] for key in ("id", "image", "question", "answer")}
    return kept | {"greedy": one(greedy), "sampled": [one(sampled) for _ in range(4)]}


def write_pairs(run: Path, rows: list[dict[str, Any]], rng: random.Random) -> None:
    write_lines(run / "stages" / "pairs" / "pairs.jsonl", [
        {"id": f"{row['id']}-{k}", "image": row["image"], "question": row["question"],
         "chosen": completion(row, True, False, rng), "answer_gt": row["answer"],
         "rejected": completion(row, False, rng.random() < 0.6, rng)}
        for row in rows for k in range(2)
    ])  # fmt: skip
    outcomes = ["correct"] * 3 + ["wrong"] * 6 + ["no_answer"]
    write_lines(run / "stages" / "pairs" / "verdicts.jsonl", [
        {"id": row["id"], "sample": k, "outcome": rng.choice(outcomes)}
        for row in rows for k in range(8)
    ])  # fmt: skip


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report.render(report.collect(run))


def stage(name: str, sampled: float, se: float = 0.01) -> StageResult:
    return StageResult(name, 2000, 4, sampled, 0.01, sampled, se, 0.99, 23.0)


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


def test_the_page_says_what_was_measured(page: str) -> None:
    for text in (
        "preset full, seed 7, 6 min 12 s in all",
        "the same 2,000 held-out questions",
        "32.1% (SFT) to 78.0% (MPO) to 85.5% (GSPO), greedy 13.0% to 83.5% to 87.9%",
        "each step is up by more than 3 standard errors of the difference",
        "reaches 65.1%, so MPO&#39;s preference and quality terms add +12.9 points",
        "Careful SFT", "16.1%", "58.3%", "74.1%", "1 min 33 s",
        "&#34;learning_rate&#34;: 0.0003", "preset: full",
        "accelerate launch -m mpo --config &#39;a b.yaml&#39;",
        "6 of 60 pairs", "240 offline rollouts", "It cannot show",
    ):  # fmt: skip
        assert text in page, text


def test_the_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    parser = Tags()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page)
    assert "#01fe1" not in page  # every placeholder colour became a colour of the theme
    for tag, attributes in parser.tags:
        for key in {"src", "href", "xlink:href"}.intersection(attributes):
            start = "data:image/png;base64," if tag == "img" else "#"
            assert str(attributes[key]).startswith(start)
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sum(tag == "img" for tag, _ in parser.tags) == 8 + 6
    curves = sum(len(keys) for keys in LOGGED.values()) + 2  # + two probes of SFT
    assert sum(tag == "svg" for tag, _ in parser.tags) == 2 + 2 + 2 + curves


def test_images_show_where_they_were_cut(run: Path, page: str) -> None:
    data = report.collect(run)
    shown = [picture for row in data.examples for picture in row.pictures]
    shown += [picture for row in data.pairs for picture in row.pictures]
    wide = [picture for picture in shown if picture.width == 112]
    assert 0 < len(wide) < len(shown)
    assert {picture.grid for picture in wide} == {(2, 1)}
    assert {picture.grid for picture in shown if picture.width == 56} == {(1, 1)}
    assert page.count(">2 x 1 tiles + thumbnail<") == len(wide)
    assert page.count(">1 tile<") == len(shown) - len(wide)
    cut = '<i class="cut x" style="left: 50.00%"></i>'
    assert page.count(cut) == page.count('<i class="cut') == len(wide)

    unknown = replace(data.examples[0], pictures=(replace(wide[0], grid=None),))
    page = report.render(replace(data, examples=[unknown], pairs=[]))
    assert "<i class" not in page and "thumbnail<" not in page
    assert Thumbnail("", 3, 2, (3, 2), (3, 2)).cuts == [
        ("x", pytest.approx(100 / 3)), ("x", pytest.approx(200 / 3)), ("y", 50)
    ]  # fmt: skip


def test_untrusted_text_is_escaped(run: Path) -> None:
    data = report.collect(run)
    bad = '<script>alert("x")</script>'
    first, pair = data.examples[0], data.pairs[0]
    answers = tuple(replace(one, completion=bad) for one in first.answers)
    page = report.render(
        replace(
            data,
            curves=(),
            title=bad,
            examples=[replace(first, question=bad, answer=bad, id='"><b>', answers=answers)],
            pairs=[replace(pair, chosen=bad, rejected=f"no {bad}")],
            config_files=[(bad, bad)],
        )
    )
    assert "<script" not in page and "<b>&" not in page and '"><b>' not in page
    assert page.count("&lt;script&gt;alert(") >= 8


def test_the_same_run_gives_the_same_bytes(run: Path, page: str) -> None:
    assert report.write_report(run).read_text(encoding="utf-8") == page


def test_optional_parts_can_be_missing(tmp_path: Path) -> None:
    keep = {"metrics.json", "summary.json", "manifest.json"}
    for path in make_run(tmp_path, questions=1, steps=2).rglob("*"):
        if path.is_file() and (path.name not in keep or "sft-careful" in path.parts):
            path.unlink()
    for name in ("sft", "mpo", "rl"):
        path = tmp_path / "eval" / name / "metrics.json"
        metrics = json.loads(path.read_text())
        del metrics["careless"], metrics["chain_correct"]
        write_json(path, metrics)
    (tmp_path / "eval" / "control" / "metrics.json").unlink()
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    for absent in ("answered by each stage", "Preference pairs", "rollouts</h2>", "curves</h2>",
                   "Careful SFT is", "Hollow"):  # fmt: skip
        assert absent not in page
    assert "No control was evaluated" in page and "<td>-</td>" in page


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", None, "summary.json: not found"),
        ("manifest.json", None, "manifest.json: not found"),
        ("eval/mpo/metrics.json", None, "metrics.json: not found"),
        ("eval/mpo/metrics.json", "{", "not JSON"),
        ("eval/mpo/metrics.json", '{"n": 1, "k": 1, "greedy": "x"}', "'greedy' is 'x'"),
        ("eval/mpo/predictions.jsonl", "{}\n", "'id' is missing"),
        ("eval/mpo/predictions.jsonl", "[\n", "predictions.jsonl:1: not JSON"),
        ("stages/pairs/pairs.jsonl", '{"question": "q", "image": "no.png", "chosen": "a", '
         '"rejected": "b"}\n', "image 'no.png' not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    path = make_run(tmp_path, questions=1, steps=2) / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        report.collect(tmp_path)


def test_the_headline_is_as_sober_as_the_numbers(run: Path) -> None:
    data = report.collect(run)
    # 80% -> 82% with errors of 1 point: 2 / sqrt(2) = 1.4 standard errors; then 10 / 1.41 = 7.1.
    weak = [stage("sft", 0.80), stage("mpo", 0.82), stage("rl", 0.72)]
    said = report.headline(replace(data, stages=weak, control=stage("control", 0.81)))
    assert len(said) == 3
    assert (
        "MPO did not improve on SFT by more than 3 standard errors (+2.0 points, 1.4 s.e.)"
        in said[1]
    )
    assert "GSPO made it worse than MPO (-10.0 points, 7.1 s.e.)" in said[1]
    assert "nothing is shown to come from MPO's" in said[2]
    harm = report.headline(replace(data, stages=weak, control=stage("control", 0.9)))
    assert "did harm here (-8.0 points" in harm[2]


def test_differences_in_standard_errors() -> None:
    step = difference(stage("sft", 0.5, 0.03), stage("mpo", 0.65, 0.04))
    assert step.gain == pytest.approx(0.15) and step.sigmas == pytest.approx(3.0)
    assert not difference(stage("sft", 0.5, 0.0), stage("mpo", 0.5, 0.0)).proven
    assert difference(stage("sft", 0.5, 0.0), stage("mpo", 0.6, 0.0)).proven


def test_examples_are_chosen_by_fate_in_file_order() -> None:
    stages = ["sft", "mpo", "rl"]
    assert fate([False, True, True], stages) == "right from MPO on"
    assert fate([True, False, True], stages) == "right from GSPO on"
    assert fate([True, True, True], stages) == "right throughout"
    assert fate([False, True, False], stages) == "right once, wrong in the end"
    assert fate([False, False, False], stages) == "never right"
    words = fate_words(stages)
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
    marks = report.mark_words("The red bar is 2. 7 + 2 = 9", "The red bar is 3. 7 + 3 = 10")
    assert [text for text, differs in marks if differs] == ["2.", "2", "9"]
    assert " ".join(text for text, _ in marks) == "The red bar is 2. 7 + 2 = 9"


def test_the_terminal_table_holds_every_checkpoint(run: Path) -> None:
    from rich.console import Console

    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(stage_table(report.collect(run)))
    lines = captured.get().splitlines()
    assert not any(ELLIPSIS in line for line in lines)
    assert "2,000 held-out questions" in captured.get()
    mpo = next(line for line in lines if "MPO" in line)
    for text in ("83.5", "78.0 +-0.7", "+45.9 (41.1)", "99.4", "0.0", "74.1", "32 s"):
        assert text in mpo
    assert (
        sum(any(name in line for name in ("SFT", "MPO", "Control", "GSPO")) for line in lines) == 5
    )
