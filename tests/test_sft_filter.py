"""`sft filter`: rules, scores by a model, every row in one file; killed, resumed, reviewed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_tool_cases import FAULTS, accounted, beside, command, endpoint, read, row, summary
from judge_server import Server, fails, replies, says, stumbles
from PIL import Image

from internvl.data import Quarantine, read_rows, write_jsonl
from sft.data_tools.scores import DOMAINS, quality_prompt, read_score

# ---------------------------------------------------------------- the command, rules alone

LOOP = "the bar is red and so is the other bar " * 12
ROWS = [
    row(0, "How many?", "Three.", source="web", weight=0.5),
    row(1, "Write zeros.", "0" * 60),
    row(2, "<image>\nDescribe it.", LOOP, image="a.png"),
    row(3, "<image>\nHow many?", "3", image="a.png"),
    row(4, "Both?", "0" * 60 + " " + LOOP),
]
WITH_MODEL = ["--base-url", "http://127.0.0.1:9/v1", "--model", "m"]
IDS = [f"s{number}" for number in range(6)]


def test_rules_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out" / "kept.jsonl"
    write_jsonl(data, [*ROWS, {"id": "s5", "conversations": []}])
    assert command("filter", data, "--output", out, "--max-bad", 1) == 0
    found = accounted(out, IDS)
    assert found == {
        "kept": ["s0", "s3"], "rejected": ["s1", "s2", "s4"],
        "undecided": [], "quarantine": ["s5"],
    }  # fmt: skip
    assert read(out) == [ROWS[0], ROWS[3]]  # all fields
    first, _, last = beside(out, "rejected.jsonl")
    assert first["reasons"] == [
        {
            "rule": "zero_run", "told": "60 zeros in a row", "value": 60, "threshold": 50,
            "turn": 1, "spans": [[0, 60]],
        }
    ]  # fmt: skip
    assert (first["file"], first["line"], first["row"]) == (str(data), 2, ROWS[1])
    found = [one["rule"] for one in last["reasons"]]
    assert found == ["zero_run", "repeated_ngrams", "repeated_characters"]
    facts = summary(out)
    assert facts["reasons"] == {
        f"rejected:{name}": 2 for name in ("repeated_characters", "repeated_ngrams", "zero_run")
    }
    assert facts["rules"]["zero_run"] == 50
    told = capsys.readouterr().out
    assert "zero_run" in told and "quarantined" in told

    before = out.read_bytes()
    assert command("filter", data, "--output", out, "--max-bad", 1, "--max-zero-run", 60,
                   "--skip", "repeated_ngrams", "repeated_characters") == 0  # fmt: skip
    assert accounted(out, IDS)["rejected"] == []
    assert before != out.read_bytes()


def test_a_review_takes_rows_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "kept.jsonl"
    write_jsonl(data, ROWS)
    words = ("filter", data, "--output", out)
    assert command(*words) == 0
    _, second, _ = beside(out, "rejected.jsonl")
    accepted = tmp_path / "accepted.jsonl"
    write_jsonl(accepted, [{"key": second["key"]}, {"key": "not there"}])
    assert command(*words, "--accept", accepted) == 0
    assert "1 row(s)" in capsys.readouterr().out
    assert accounted(out, IDS[:5])["kept"] == ["s0", "s2", "s3"]  # at its place
    assert summary(out)["reasons"]["kept:accepted"] == 1
    write_jsonl(accepted, [second])  # a line of the rejected rows says the same
    assert command(*words, "--accept", accepted) == 0
    assert accounted(out, IDS[:5])["kept"] == ["s0", "s2", "s3"]
    assert summary(out)["reasons"]["kept:accepted"] == 1
    second["row"]["conversations"][0]["value"] = "one\u2028two\x85three"
    write_jsonl(accepted, [second])
    assert command(*words, "--accept", accepted) == 0  # it is no line's end
    accepted.write_text('{"id": "s2"}\n')
    assert command(*words, "--accept", accepted) == 2
    assert "accepted.jsonl:1: no JSON object with a 'key'" in capsys.readouterr().err


def test_meta_in_and_out(tmp_path: Path) -> None:
    """Each data set has its file; what the old entries say stays; repeated rows come once."""
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "raw" / "b.jsonl", ROWS[1:3])
    meta = {
        "web/a": {"root": "raw", "annotation": "raw/a.jsonl", "repeat_time": 2, "length": 5,
                  "data_augment": False, "max_dynamic_patch": 6},
        "b": {"root": "raw", "annotation": "raw/b.jsonl", "length": 2},
        "fine": {"root": "raw", "annotation": "raw/b.jsonl", "length": 2},
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    out = tmp_path / "new" / "kept.json"
    words = ("filter", tmp_path / "meta.json", "--output", out, "--exempt", "fine")
    assert command(*words) == 0
    assert json.loads(out.read_text()) == {
        "web/a": {**meta["web/a"], "root": "../raw", "annotation": "kept_data/web_a.jsonl",
                  "length": 2},
        "fine": {**meta["fine"], "root": "../raw", "annotation": "kept_data/fine.jsonl",
                 "length": 1},
    }  # fmt: skip
    rows = read_rows(out, kind="conversation", quarantine=Quarantine(None))
    assert [one.data["id"] for one in rows] == ["s0", "s3"] * 2 + ["s2"]
    assert rows[0].image_root.resolve() == (tmp_path / "raw").resolve() and rows[0].max_tiles == 6
    facts = summary(out)
    assert (facts["read"], facts["kept"], facts["rejected"]) == (9, 3, 6)
    names = [one["dataset"] for one in beside(out, "rejected.jsonl")]
    assert names == ["web/a"] * 3 + ["b"] * 2 + ["fine"]
    assert command("filter", tmp_path / "meta.json", "--output", tmp_path / "x.jsonl") == 2


def test_images_that_are_bytes_become_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    image = (tmp_path / "red.png").read_bytes()
    records = [
        row(0, "<image>\nWhat?", "A square.", image={"bytes": image, "path": None}),
        row(1, "<image>\nWhat?", "0" * 99, image={"bytes": image, "path": None}),
        row(2, "<image>\nWhat?", "Nothing.", image={"bytes": b"no image", "path": None}),
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    out = tmp_path / "out" / "kept.jsonl"
    assert command("filter", tmp_path / "in.parquet", "--output", out, "--max-bad", 1) == 0
    found = accounted(out, ["s0", "s1", "s2"])
    assert (found["rejected"], found["quarantine"]) == (["s1"], ["s2"])
    (kept,), (rejected,) = read(out), beside(out, "rejected.jsonl")
    assert (out.parent / kept["image"]).read_bytes() == image
    assert Path(rejected["image_root"], rejected["row"]["image"]).read_bytes() == image


# ---------------------------------------------------------------- scores


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with endpoint(monkeypatch) as running:
        yield running


def judge(messages: list[dict[str, str]]) -> str:
    """Reads its scores out of the response: "quality 8, repetition 2"."""
    prompt, data = messages[0]["content"], json.loads(messages[1]["content"])
    response = data["conversation"][0]["response"]
    if "sort training data by domain" in prompt:
        return json.dumps({"domain": "programming" if "code" in response else "general"})
    name = "repetition" if "repetitive patterns" in prompt else "quality"
    found = re.search(rf"{name} (\S+?)(?=,|$)", response)
    return json.dumps({"score": float(found[1]) if found else 10, "reason": f"{name} it is"})


def asked(server: Server, start: int = 0) -> list[tuple[str, str]]:
    """(what, of which response) of each request."""
    found = []
    for _, _, body in server.requests[start:]:
        prompt, data = (message["content"] for message in body["messages"][:2])
        what = "domain" if "by domain" in prompt else "repetition"
        named = [domain for domain in DOMAINS if prompt == quality_prompt(domain)] or [what]
        found.append((named[0], json.loads(data)["conversation"][0]["response"]))
    return sorted(found)


def words_for(server: Server, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("filter", data, "--output", out, "--base-url", server.url, "--model", "m", *more)


def test_scores_and_thresholds(server: Server, tmp_path: Path) -> None:
    server.answers = [replies(judge)]
    texts = ["quality 7", "quality 6.9", "quality 9, repetition 2.5", "repetition 3", "a code"]
    rows = [row(number, "Q?", text) for number, text in enumerate(texts)]
    rows += [
        row(5, "<image>\nQ?", "quality 0, seen", image="a.png"),
        row(6, "Q?", "quality 1, of mine", domain="Mathematics"),
        row(7, "Q?", "quality 8, listed", dataset="physics"),
        row(8, "Q?", "0" * 60),
        row(9, "Q?", "repetition 0", dataset="gold"),
    ]
    data, out = tmp_path / "in.jsonl", tmp_path / "kept.jsonl"
    write_jsonl(data, rows)
    (tmp_path / "domains.yaml").write_text("physics: disciplines\n")
    words = words_for(server, data, out, "--domains", tmp_path / "domains.yaml", "--exempt", "gold")
    assert command(*words) == 0
    found = accounted(out, [one["id"] for one in rows])
    assert found["rejected"] == ["s1", "s2", "s6", "s8"]
    second = beside(out, "rejected.jsonl")[1]
    assert second["reasons"] == [
        {"rule": "repetition", "told": "repetition it is", "value": 2.5, "threshold": 3.0}
    ]
    assert (second["scores"], second["domain"]) == ({"quality": 9, "repetition": 2.5}, "general")
    what = asked(server)
    assert ("mathematics", "quality 1, of mine") in what and ("programming", "a code") in what
    assert ("disciplines", "quality 8, listed") in what
    responses = [response for _, response in what]
    assert responses.count("0" * 60) == 0  # a rule has hit it
    assert ("repetition", "quality 0, seen") in what and responses.count("quality 0, seen") == 1
    assert ("repetition", "repetition 0") not in what and ("repetition", "quality 6.9") not in what

    number = len(server.requests)
    assert command(*words, "--quality-threshold", 6.5) == 0  # another threshold, the same replies
    assert accounted(out, [one["id"] for one in rows])["rejected"] == ["s2", "s6", "s8"]
    assert asked(server, number) == [("repetition", "quality 6.9")]
    assert command(*words, "--ask", "quality", "--quality-of-images", "--domain", "general") == 0
    assert "s5" in accounted(out, [one["id"] for one in rows])["rejected"]
    facts = summary(out)
    assert facts["scores"] == {"quality": 7.0} and facts["model"] == "m"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 10, "reason": "x"}', 10),
        ('<think>{"score": 1}</think> {"score": 7.5}', 7.5),
        ('It is {\\frac{1}{2}} so\n```json\n{"reason": "{}", "score": 0}\n```', 0),
        ('{"score": 3} or {"score": 4}', None),
        ('{"score": "8"}', None),
        ('{"score": true}', None),
        ('{"score": -1}', None),
        ('{"score": NaN}', None),
        ('{"score": 8', None),
        ("8", None),
    ],
)
def test_reading_a_score(reply: str, score: float | None) -> None:
    found, fault = read_score(reply)
    assert (None if found is None else found.score) == score
    assert (fault is None) == (score is not None)


MANY = [row(n, f"Question {n}?", f"quality {n % 10}, no. {n}") for n in range(40)]
GOOD = [f"s{number}" for number in range(40) if number % 10 >= 7]


def test_an_endpoint_that_fails(server: Server, tmp_path: Path) -> None:
    """Slow, 500, 429, dropped, broken: asked again, and every row is where it belongs."""
    data, out = tmp_path / "in.jsonl", tmp_path / "kept.jsonl"
    write_jsonl(data, MANY)
    server.answers = [says('{"score": 10}'), stumbles(replies(judge), FAULTS)]
    words = words_for(server, data, out, "--domain", "general", "--timeout", 0.5, "--workers", 8)
    assert command(*words) == 0
    found = accounted(out, [one["id"] for one in MANY])
    assert found["kept"] == GOOD and not found["undecided"]
    assert summary(out)["rate_limited"] > 0
    repaired = [body for _, _, body in server.requests if len(body["messages"]) == 4]
    assert repaired and all("That cannot be used" in b["messages"][3]["content"] for b in repaired)


def test_rows_without_an_answer_are_undecided(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are told with their reason; started again, they alone are asked, and stand in order."""
    data, out = tmp_path / "in.jsonl", tmp_path / "kept.jsonl"
    write_jsonl(data, MANY)

    def sick(messages: list[dict[str, str]]) -> str:
        response = json.loads(messages[1]["content"])["conversation"][0]["response"]
        return "I would rather not." if re.search(r"no. \d*[38]$", response) else judge(messages)

    server.answers = [replies(sick)]
    words = words_for(server, data, out, "--domain", "general", "--max-retries", 1)
    assert command(*words) == 2  # 8 of 40 are more than 5%
    assert "8 of 40 rows are undecided" in capsys.readouterr().err
    found = accounted(out, [one["id"] for one in MANY])
    lost = [f"s{number}" for number in range(40) if number % 5 == 3]
    assert found["undecided"] == lost
    (reason,) = {one["reason"] for one in beside(out, "undecided.jsonl")}
    assert reason == 'quality: its reply is not {"score": 0 to 10, "reason": ".."}'
    assert command(*words, "--max-undecided", 8) == 0

    server.answers = [replies(judge)]
    number = len(server.requests)
    assert command(*words) == 0
    assert accounted(out, [one["id"] for one in MANY])["kept"] == GOOD
    again = {response for _, response in asked(server, number)}
    assert again == {MANY[int(name[1:])]["conversations"][1]["value"] for name in lost}
    number = len(server.requests)
    assert command(*words) == 0 and len(server.requests) == number


def test_an_endpoint_that_is_down_is_given_up(server: Server, tmp_path: Path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "kept.jsonl"
    write_jsonl(data, MANY)
    server.answers = [says('{"score": 10}'), fails(503)]
    words = words_for(server, data, out, "--max-retries", 0, "--workers", 2, "--domain", "general")
    assert command(*words) == 2
    assert len(accounted(out, [one["id"] for one in MANY])["undecided"]) == 40
    assert len(server.requests) <= 1 + 6 + 2
    reasons = [one["reason"] for one in beside(out, "undecided.jsonl")]
    assert reasons[0] == "quality: HTTP 503 (Error code: 503 - no such model)"
    assert reasons[-1] == "quality: not asked, too many requests before it failed"
    server.answers = [replies(judge)]
    assert command(*words) == 0
    assert accounted(out, [one["id"] for one in MANY])["kept"] == GOOD


def test_a_run_that_is_stopped_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written has the output's name, and no answer is asked for twice."""
    data, out = tmp_path / "in.jsonl", tmp_path / "kept.jsonl"
    write_jsonl(data, MANY)
    server.answers = [replies(judge)]
    words = words_for(server, data, out, "--domain", "general", "--workers", 2)
    written = 0

    def interrupted(self: Any, *args: Any) -> bool:
        nonlocal written
        written += 1
        if written > 10:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr("sft.data_tools.working._Writer.write", interrupted)
        assert command(*words) == 130
    assert not out.exists()
    before = {json.dumps(body) for _, _, body in server.requests}
    number = len(server.requests)
    assert number > 10
    assert command(*words) == 0
    assert accounted(out, [one["id"] for one in MANY])["kept"] == GOOD
    # what was under way when it stopped may not have been kept
    again = [body for _, _, body in server.requests[number:] if json.dumps(body) in before]
    assert len(again) <= 2


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "m"], "--model is given, but --base-url is not"),
        (["--ask", "quality"], "--ask is given, but --base-url is not"),
        (["--quality-threshold", "0"], "--quality-threshold is given, but --base-url is not"),
        (
            [*WITH_MODEL, "--ask", "repetition", "--domain", "general"],
            "--domain is given, but --ask leaves quality out",
        ),
        (
            [*WITH_MODEL, "--ask", "quality", "--repetition-threshold", "0"],
            "--repetition-threshold is given, but --ask leaves repetition out",
        ),
        (["--max-repeated-lines", "30"], "--max-repeated-lines is 30; it is a share, from 0 to 1"),
        (["--base-url", "http://127.0.0.1:9/v1"], "--base-url is given, but --model"),
        (["--base-url", "127.0.0.1/v1", "--model", "m"], "--base-url is '127.0.0.1/v1'; it starts"),
        (["--max-zero-run", "-1"], "--max-zero-run is -1.0; give a number of 0 or more"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--max-undecided", "-1"], "--max-undecided is -1.0; give 0 or more"),
        (["--quality-threshold", "11", "--base-url", "http://x/v1", "--model", "m"],
         "--quality-threshold is 11.0; scores are from 0 to 10"),
        (["--skip", "long"], "argument --skip: invalid choice: 'long'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    words = ("filter", tmp_path / "in.jsonl", "--output", tmp_path / "kept.jsonl", *more)
    assert command(*words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_output_is_not_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    assert command("filter", tmp_path / "in.jsonl", "--output", tmp_path / "in.jsonl") == 2
    assert "is the input itself" in capsys.readouterr().err
    assert command("filter", tmp_path / "in.jsonl", "--output", tmp_path / "out.json") == 2
    assert "name it *.jsonl" in capsys.readouterr().err
    assert command("--config", "sft.yaml") == 2
    assert "the trainer is `python -m sft`" in capsys.readouterr().err
