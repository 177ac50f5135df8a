"""`cascade evaluate` from files to metrics, with a fake sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import (
    Dying,
    FakeSampler,
    evaluate,
    files_of,
    metrics,
    predictions,
    questions,
    refused,
)

from internvl.data import write_jsonl
from internvl.sampler import Completion

# ---- what is written ----


def test_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "out"
    sampler = evaluate(monkeypatch, questions(tmp_path), out, "--samples=4", "--count=seen=I see")
    assert sampler.closed
    assert sorted(path.name for path in out.iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
        "settings.json",
        "summary.md",
    ]
    records, found = predictions(out), metrics(out)
    assert [record["id"] for record in records] == [f"q{i}" for i in range(12)]
    for record in records:
        assert (record["dataset"], record["prompt"], len(record["sampled"])) == (
            "heldout",
            "as_is",
            4,
        )
        for one in [record["greedy"], *record["sampled"]]:
            assert one["extracted"] == one["completion"].split(": ")[1]
            assert (one["outcome"] == "correct") == (one["extracted"] == record["answer"])
            assert one["truncated"] == (one["tokens"] == 11)
            assert one["format_ok"] != one["truncated"]
        votes = [one["vote"] for one in record["sampled"]]
        same = [one["extracted"] for one in record["sampled"]]
        assert [same[votes.index(vote)] for vote in votes] == same  # one number, one answer
    right = [sum(one["outcome"] == "correct" for one in r["sampled"]) for r in records]
    assert found["sampled"] == pytest.approx(sum(right) / 48)
    assert found["greedy"] == sum(r["greedy"]["outcome"] == "correct" for r in records) / 12
    assert found["pass@4"] == sum(map(bool, right)) / 12
    assert found["seen"] == 1.0
    keys = {
        *("name", "model", "n", "k", "greedy", "greedy_se", "sampled", "sampled_se", "format"),
        *("mean_tokens", "greedy_ci", "sampled_ci", "pass@1", "pass@2", "pass@4", "pass@4_ci"),
        *("majority@2", "majority@4", "majority@4_ci", "truncated", "datasets", "prompt"),
    }
    assert keys <= set(found)
    assert (found["name"], found["n"], found["k"]) == ("out", 12, 4)
    assert set(found["datasets"]) == {"heldout"}
    said = capsys.readouterr().out
    assert f"{100 * found['greedy']:.1f}" in said
    summary = (out / "summary.md").read_text()
    assert "| data set | n | greedy | mean@4 | pass@4 | majority@4 |" in summary


def test_several_files_and_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids may repeat between data sets; a field names one, else the file does."""
    one, two = questions(tmp_path, 3, name="a"), questions(tmp_path, 4, name="b", dataset="charts")
    out = tmp_path / "out"
    evaluate(monkeypatch, [one, two], out)
    found = metrics(out)
    assert {name: own["n"] for name, own in found["datasets"].items()} == {"a": 3, "charts": 4}
    assert [(r["dataset"], r["id"]) for r in predictions(out)][2:4] == [
        ("a", "q2"),
        ("charts", "q0"),
    ]
    # a question's completions depend on nothing but itself
    evaluate(monkeypatch, two, tmp_path / "alone", "--first=2")
    assert predictions(tmp_path / "alone") == predictions(out)[3:5]
    evaluate(monkeypatch, [one, two], tmp_path / "charts", "--dataset=charts")
    assert predictions(tmp_path / "charts") == predictions(out)[3:]


def test_a_meta_json_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions(tmp_path, 3, name="a")
    meta = {
        "charts": {"root": ".", "annotation": "a.jsonl", "repeat_time": 3, "max_dynamic_patch": 6}
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    evaluate(monkeypatch, tmp_path / "meta.json", tmp_path / "out")
    assert [(r["dataset"], r["id"]) for r in predictions(tmp_path / "out")] == [
        ("charts", f"q{i}") for i in range(3)
    ]


def test_a_benchmark_dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file's name chooses the matcher, its options are options, its image is a file."""
    from test_benchmark_tables import RED, write

    path = write(
        tmp_path / "ChartQA_TEST.tsv",
        {"question": "What is 100?", "answer": "100"},
        {"question": "What is B?", "A": "cat", "B": "dog", "answer": "B"},
    )

    class Says(FakeSampler):
        def answer(self, request: Any, config: Any, n: int) -> Completion:
            text = "Final answer: 104" if "100" in request.question else "Final answer: dog"
            return Completion(text, (1,), (), "stop")

    evaluate(monkeypatch, path, tmp_path / "out", sampler=Says())
    first, second = predictions(tmp_path / "out")
    assert [one["greedy"]["outcome"] for one in (first, second)] == ["correct", "wrong"]  # relaxed
    assert (first["id"], first["dataset"]) == ("ChartQA_TEST-0", "ChartQA_TEST")
    import base64

    assert Path(first["image"][0]).read_bytes() == base64.b64decode(RED)
    assert first["image"] == second["image"]
    path.rename(tmp_path / "MMStar.tsv")
    evaluate(monkeypatch, tmp_path / "MMStar.tsv", tmp_path / "choices", sampler=Says())
    outcomes = [one["greedy"]["outcome"] for one in predictions(tmp_path / "choices")]
    assert outcomes[1] == "correct"


def test_bad_questions_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = [
        {"id": "a", "question": "What is 20?", "answer": "20"},
        {"id": "b", "question": "What is 21?", "answer": ""},
        {"id": "c", "question": "too long: What is 22?", "answer": "22"},
        {"id": "d", "image": "none.png", "question": "What is 23?", "answer": "23"},
        {"id": "e", "question": "What is 24?", "answer": "24"},
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)
    out = tmp_path / "out"
    evaluate(monkeypatch, tmp_path / "q.jsonl", out, "--max-bad=3")
    assert [record["id"] for record in predictions(out)] == ["a", "e"]
    told = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"].split(":")[0]) for one in told] == [
        (2, "field 'answer' is empty"),
        (4, str(tmp_path / "none.png")),
        (3, "the prompt has 9 tokens, and max_model_len is 8"),
    ]
    assert metrics(out)["n"] == 2
    assert "3 bad row(s) put aside" in capsys.readouterr().out
    before = files_of(out)
    evaluate(monkeypatch, tmp_path / "q.jsonl", out, "--max-bad=3")  # finished: as it was
    assert files_of(out) == before
    words = ("--max-bad=2",)
    said = refused(
        capsys, lambda: evaluate(monkeypatch, tmp_path / "q.jsonl", tmp_path / "o", *words)
    )
    assert "3 of 5 rows are bad, more than max_bad=2 allows" in said


# ---- prompt sets ----


def test_no_question_that_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many bad ones are borne, there is no mean of nothing."""
    rows = [{"id": "q", "question": "too long: what is 1?", "answer": "1"}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(SystemExit) as exit_:
        evaluate(monkeypatch, tmp_path / "q.jsonl", tmp_path / "out", "--max-bad=9")
    assert exit_.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: {tmp_path}/out: there is no question that could be asked; the reasons are in "
        f"{tmp_path}/out/quarantine.jsonl"
    )


def test_chain_of_thought_against_direct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file, out = questions(tmp_path, 40), tmp_path / "out"
    own = {"id": "own", "question": r"What is 99? Put it in \boxed{}.", "answer": "99"}
    with file.open("a") as more:
        more.write(json.dumps(own) + "\n")
    evaluate(monkeypatch, file, out, "--prompts", "cot", "direct", "--samples=2")
    found = metrics(out)
    cot, direct = found["prompts"]["cot"], found["prompts"]["direct"]
    assert metrics(out / "direct") == direct
    assert {key: found[key] for key in cot} == cot  # the folder's own numbers are the first set's
    assert (cot["prompt"], direct["prompt"], direct["name"]) == ("cot", "direct", "out/direct")
    assert cot["own_form"] == direct["own_form"] == 1
    asked = [predictions(folder)[0]["question"] for folder in (out, out / "direct")]
    assert asked[0].startswith("What is 20?\nReason step by step")
    assert asked[1] == "What is 20?\nAnswer the question using a single word or phrase."
    gap = found["gap"]["direct"]
    assert gap["n"] == 41
    assert gap["greedy"]["difference"] == pytest.approx(cot["greedy"] - direct["greedy"])
    assert gap["sampled"]["difference"] == pytest.approx(cot["sampled"] - direct["sampled"])
    assert gap["sampled"]["ci"][0] > 0.1  # the fake reasons better
    said = capsys.readouterr().out
    assert "cot - direct, points: greedy +" in said
    assert "1 question(s) ask for a form themselves and kept it" in said
    # what `mmpr sample` has added to a question is taken off first
    rows = [
        {"id": "q0", "question": "What is 20?\nFinal answer: ..", "question_orig": "What is 20?",
         "prompt_style": "final", "answer": "20"}
    ]  # fmt: skip
    write_jsonl(tmp_path / "p.jsonl", rows)
    evaluate(monkeypatch, tmp_path / "p.jsonl", tmp_path / "p", "--prompts", "direct")
    assert predictions(tmp_path / "p")[0]["question"] == asked[1]


def test_options_are_asked_for_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "question": "What is it?", "options": ["cat", "dog"], "answer": "B"},
        {"id": "b", "question": "What is it?\nA. cat\nB. dog", "answer": "B"},
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)

    class Letter(FakeSampler):
        def answer(self, request: Any, config: Any, n: int) -> Completion:
            return Completion("B", (1,), (), "stop")

    evaluate(
        monkeypatch, tmp_path / "q.jsonl", tmp_path / "o", "--prompts=direct", sampler=Letter()
    )
    for record in predictions(tmp_path / "o"):
        assert record["question"].endswith("option's letter from the given choices directly.")
        assert (record["greedy"]["outcome"], record["greedy"]["format_ok"]) == ("correct", True)


# ---- killed, and started again ----


@pytest.mark.parametrize("after", [0, 1, 5, 12, 17, 30, 41])
def test_it_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, after: int
) -> None:
    """Stopped in any pass of any prompt set; nothing is asked twice but what was in flight."""
    monkeypatch.setattr("cascade.completions.FLUSH_QUESTIONS", 2)
    file, words = questions(tmp_path), ("--prompts", "cot", "direct", "--samples=3")
    whole = evaluate(monkeypatch, file, tmp_path / "a" / "out", *words)
    out = tmp_path / "b" / "out"
    dying = Dying(after)
    said = refused(capsys, lambda: evaluate(monkeypatch, file, out, *words, sampler=dying))
    assert "no server answers" in said
    for path in out.rglob("completions-*.jsonl"):  # and a torn line
        with path.open("a") as torn:
            torn.write('{"dataset": "heldout", "id": "q')
    again = evaluate(monkeypatch, file, out, *words)
    assert len(dying.asked) + len(again.asked) <= len(whole.asked) + whole.backwards
    there, here = files_of(tmp_path / "a" / "out"), files_of(out)
    for name in there:  # the model lies elsewhere
        there[name] = there[name].replace(
            str(tmp_path / "a").encode(), str(tmp_path / "b").encode()
        )
    assert here == there


def test_what_is_finished_opens_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file, out = questions(tmp_path), tmp_path / "out"
    evaluate(monkeypatch, file, out)
    before, first = files_of(out), capsys.readouterr().out
    (out / "metrics.json").unlink()  # killed before it was written
    again = evaluate(monkeypatch, file, out)
    assert again.asked == []
    assert files_of(out) == before
    assert capsys.readouterr().out.splitlines()[:5] == first.splitlines()[:5]


def test_another_evaluation_s_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file, out = questions(tmp_path), tmp_path / "out"
    evaluate(monkeypatch, file, out)
    before = files_of(out)
    for words, told in (
        (["--temperature=0.5"], "temperature was 1.0, now 0.5"),
        (["--samples=3"], "samples was 2, now 3"),
        (["--prompts", "direct"], "prompt was 'as_is', now 'direct'"),
        (["--style=boxed"], "style was 'auto', now 'boxed'"),
    ):
        said = refused(capsys, lambda words=words: evaluate(monkeypatch, file, out, *words))
        assert told in said and "was made by another run" in said
    questions(tmp_path, 13)
    said = refused(capsys, lambda: evaluate(monkeypatch, file, out))
    assert "questions was " in said
    (tmp_path / "model" / "config.json").write_text('{"trained": "further"}')
    assert files_of(out) == before
    (out / "settings.json").unlink()
    said = refused(capsys, lambda: evaluate(monkeypatch, file, out))
    assert "exists without settings.json: it is not known what made it" in said
