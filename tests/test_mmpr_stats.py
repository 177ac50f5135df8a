"""mmpr stats, and what mmpr view counts, draws and marks: exact values."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import noise_image
from record_cases import read, write

from internvl.chat import load_processor
from internvl.data import Quarantine
from internvl.encoding import Encoder
from mmpr.cli import main
from mmpr.columns import read_columns
from mmpr.listing import open_listing
from mmpr.select import BUCKETS
from mmpr.view_charts import HEIGHT, categories, histogram
from mmpr.view_draw import draw_evenly, even_shares
from mmpr.view_marks import mark_difference

PAIR = {"question": "What is 1 + 1?", "chosen": "It is 2", "rejected": "It is 3 or 4"}
VERDICT = {
    "question": "Why?", "answer": "a", "completion": "a", "extracted": "a", "matcher": "text",
    "format_ok": True,
}  # fmt: skip


def stats(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    main(["stats", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def make_meta(folder: Path) -> Path:
    """Data set a: 3 pairs, one twice; b: a pair, and a bad row."""
    write(
        folder / "a.jsonl", [PAIR | {"kind": "format"}, PAIR, PAIR | {"chosen": "It is 2, I see"}]
    )
    write(folder / "b.jsonl", [{**PAIR, "dataset": "own"}, {"question": "?"}])
    entries = {"a": {"annotation": "a.jsonl", "repeat_time": 2.5}, "b": {"annotation": "b.jsonl"}}
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def test_pairs_are_counted_by_data_set_and_in_all(tmp_path: Path, capsys: Any) -> None:
    found = stats(capsys, make_meta(tmp_path), "--max-bad", 1)
    assert found["kind"] == "pair" and found["repeat_time"] == {"a": 2.5}
    reason = "field 'chosen' is NoneType, expected a string"
    assert found["bad_rows"] == {
        "rows": 1, "first_reasons": [f"{tmp_path / 'b.jsonl'}:2: {reason}"]
    }  # fmt: skip
    everything = found["all"]
    assert (everything["rows"], everything["questions"]) == (4, 1)
    assert everything["kinds"] == {"not said": 3, "format": 1}
    assert everything["duplicates"] == {"rows": 2, "share": 0.5}
    assert everything["pictures"] == {"0": 4}
    assert everything["chosen_longer"] == 0.25
    assert everything["characters"]["chosen"] == {
        "mean": 8.75, "median": 7, "p5": 7, "p95": 7, "min": 7, "max": 14
    }  # fmt: skip
    a, own = found["data_sets"]["a"], found["data_sets"]["own"]
    assert (a["rows"], a["duplicates"]["rows"], a["kinds"]) == (3, 1, {"not said": 2, "format": 1})
    assert (own["rows"], own["kinds"]) == (1, {"not said": 1})


def test_tables_fit_a_hundred_columns_and_bad_rows_stop_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    meta = make_meta(tmp_path)
    long = tmp_path / "long.json"
    entries = json.loads(meta.read_text())
    long.write_text(json.dumps({f"{'name_' * 20}{name}": one for name, one in entries.items()}))
    with pytest.raises(SystemExit) as stopped:  # more than 5% of the rows
        main(["stats", str(long)])
    told = capsys.readouterr()
    assert stopped.value.code == 2 and "1 of 5 rows are bad" in told.err
    lines = told.out.splitlines()
    assert max(len(line) for line in lines if line and line[0] in "│┃┏┌") <= 100
    assert any("name_name_name_name_name_name…" in line and " 3 " in line for line in lines)
    assert any("duplicates" in line and "2 (50.0%)" in line for line in lines)
    assert f"bad row: {tmp_path / 'b.jsonl'}:2: field 'chosen'" in told.out


def test_verdicts_give_accuracies_and_outcomes(tmp_path: Path, capsys: Any) -> None:
    outcomes = {
        "x": ["correct"] * 3 + ["wrong"], "y": ["correct", "timeout"], "z": ["cannot_judge"],
        "w": ["wrong", "no_answer", "cannot_judge"],
    }  # fmt: skip
    rows = [
        VERDICT | {"id": name, "sample": sample, "outcome": outcome, "completion": f"{sample % 3}",
                   "token_ids": [1, 2], "dataset": "xy" if name in "xy" else "zw"}
        for name, group in outcomes.items()
        for sample, outcome in enumerate(group)
    ]  # fmt: skip
    found = stats(capsys, write(tmp_path / "v.jsonl", rows))
    everything = found["all"]
    assert everything["outcomes"] == {
        "correct": 4, "wrong": 2, "no_answer": 1, "cannot_judge": 2, "timeout": 1
    }  # fmt: skip
    histogram = dict.fromkeys(BUCKETS, 0) | {"0": 1, "0.7-0.8": 1, "1": 1}
    assert everything["accuracy"] == {
        "mean": pytest.approx(1.75 / 3), "histogram": histogram, "questions_not_judged": 1
    }  # fmt: skip
    assert found["data_sets"]["xy"]["accuracy"]["mean"] == 0.875
    assert found["data_sets"]["zw"]["accuracy"]["questions_not_judged"] == 1
    assert everything["duplicates"]["rows"] == 1  # of x, whose samples 0 and 3 say the same
    assert everything["matchers"] == {"text": 10}
    assert everything["tokens"]["completion"]["max"] == 2
    assert everything["rollouts_per_question"]["mean"] == 2.5


def test_tokens_and_tiles_are_those_of_training(
    tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    noise_image(112, 56, 1).save(tmp_path / "wide.png")
    rows = [
        {**PAIR, "image": "wide.png", "question": "<image>\nWhat?"},
        {**PAIR, "chosen": "Say <|im_end|> twice"},
        {**PAIR, "image": "nowhere.png", "question": "<image>\nWhat?"},
        PAIR,
    ]
    path = write(tmp_path / "p.jsonl", rows)
    found = stats(capsys, path, "--model", tiny_model, "--max-tiles", 2, "--max-bad", 2)
    assert found["bad_rows"]["rows"] == 2
    control, missing = found["bad_rows"]["first_reasons"]
    assert "chosen holds the control token" in control and "no such image" in missing
    processor = load_processor(str(tiny_model))
    encoder = Encoder(processor, max_tiles=2)
    examples = [encoder.pair(row) for row in (read(path, "pair")[0], read(path, "pair")[3])]
    tokens, tiles = found["all"]["tokens"], found["all"]["tiles"]
    assert tokens["prompt"]["max"] == max(len(one.prompt_ids) for one in examples)
    assert tokens["prompt"]["min"] == min(len(one.prompt_ids) for one in examples)
    assert tokens["chosen"]["max"] == len(examples[0].completions[0])
    assert tokens["rejected"]["max"] == len(examples[0].completions[1])
    assert (tiles["max"], tiles["min"]) == (len(examples[0].tiles), 0) == (3, 0)
    assert tokens["image"]["max"] == 3 * processor.image_seq_length


def test_an_option_without_a_meaning_is_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["stats", str(make_meta(tmp_path)), "--max-tiles", "3"])
    assert "--max-tiles has a meaning only with --model" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("w") as out:
        for number in range(1500):
            out.write(json.dumps(PAIR | {"id": str(number), "chosen": "long " * 4000}) + "\n")
    listing = open_listing(path)
    tracemalloc.start()
    columns = read_columns(listing, Quarantine(None, 0), quiet=True)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert columns.rows == 1500 and path.stat().st_size > 30e6
    assert held < 1e6 and peak < 3e6


# ---------------------------------------------------------------- what a page draws and marks


def test_shares_are_as_even_as_the_sizes_allow() -> None:
    assert even_shares([100, 4, 2], 10) == [4, 4, 2]
    assert even_shares([1, 1, 100], 30) == [1, 1, 28]
    assert even_shares([5, 5], 3) == [2, 1] or even_shares([5, 5], 3) == [1, 2]
    drawn = draw_evenly(np.array([0] * 90 + [1] * 10), 20, 3)
    assert len(set(drawn.tolist())) == 20 and (drawn >= 90).sum() == 10
    assert drawn.tolist() == sorted(drawn.tolist())
    assert draw_evenly(np.array([7, 7, 7]), 3, 0).tolist() == [0, 1, 2]


def differing(chosen: str, rejected: str) -> tuple[list[str], list[str]]:
    marked = mark_difference(chosen, rejected)
    first, second = (
        [run.text for run in runs if run.kind == "differs"]
        for runs in (marked.chosen, marked.rejected)
    )
    return first, second


def test_differences_are_marked_by_words() -> None:
    assert differing("7 + 2 = 9. So 9.", "7 + 3 = 10. So 10.") == (
        ["2", "9", "9"],
        ["3", "10", "10"],
    )
    assert differing("It is 3.14", "It is 3.15") == (["3.14"], ["3.15"])
    assert differing("答案是三。", "答案是五。") == (["三"], ["五"])
    assert differing("a b c", "a b c d") == ([], ["d"])
    # what follows the cut of a dropout pair is of other wording: the lone "the" in it is chance
    kept, other = "I see the red bar at the left.", "I see a dog and two cats in the park."
    assert differing(kept, other) == (["the red bar at the left"], [other[6:-1]])
    only_space = mark_difference("a  b", "a b")
    assert only_space.note == "they differ in white space alone" and only_space.words == 0
    strange = mark_difference("one two three", "四五六七八")
    assert strange.note == "hardly a word in common"
    assert {run.kind for run in strange.chosen + strange.rejected} == {"same"}


TEXTS = st.lists(st.sampled_from(["a", "b.", "12", "三", "\n", "é"]), max_size=12).map(" ".join)


@given(TEXTS, TEXTS)
def test_what_is_not_marked_is_the_same_on_both_sides(chosen: str, rejected: str) -> None:
    marked = mark_difference(chosen, rejected)
    assert "".join(run.text for run in marked.chosen) == chosen
    assert "".join(run.text for run in marked.rejected) == rejected
    if marked.note != "hardly a word in common":
        first, second = (
            "".join("".join(run.text for run in runs if run.kind == "same").split())
            for runs in (marked.chosen, marked.rejected)
        )
        assert first == second


def test_nothing_is_lost_between_the_marks() -> None:
    chosen = "Let us see:\n  the\tred  bar is 7.\n\nFinal Answer: 7 "
    marked = mark_difference(chosen, "Let us see:\n the red bar is 8. Final Answer: 8")
    assert "".join(run.text for run in marked.chosen) == chosen
    shared = "word " * 2000
    long = mark_difference(f"{shared}end", f"{shared}stop")
    assert [run.kind for run in long.chosen] == ["same", "left out", "same", "differs"]
    assert long.chosen[1].text == "9,000 characters that both have"
    huge = mark_difference("x " * 20_000, "y " * 20_000)
    assert "not marked" in huge.note and huge.chosen[-1].text == "28,000 more characters"


def test_histograms_hold_every_value() -> None:
    chart = histogram("t", {"a": np.array([0, 1, 1, 5000]), "b": np.array([2])})
    assert chart is not None and chart.highest == 2
    assert sum(int(re.findall(r": ([\d,]+)", bar.told)[0]) for bar in chart.bars) == 5
    assert max(bar.height for bar in chart.bars) == HEIGHT
    assert chart.bars[-1].told.endswith("(b)")
    assert histogram("t", {"a": np.array([], dtype=np.int64)}) is None
    below = histogram("t", {"": np.array([-30, 10])}, signed=True)
    assert below is not None and below.ticks[0][1].startswith("-")
    assert categories("t", {"a": 0}) is None
