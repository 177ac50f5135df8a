"""mmpr check: every broken row lands in the quarantine with the right reason, and none is lost."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_rows import (
    Broken,
    broken_images,
    broken_lines,
    broken_pairs,
    encode,
    firsts_of_duplicates,
    line,
    pair,
    write_pictures,
)
from PIL import Image
from sampling_cases import command

from internvl.data import Quarantine, read_rows, write_jsonl
from internvl.sampler import Completion
from mmpr.check import kind_of


def quarantined(path: Path) -> dict[int, str]:
    """Line -> reason; each line once."""
    entries = [json.loads(text) for text in path.read_text().splitlines()]
    found = {entry["line"]: entry["reason"] for entry in entries}
    assert len(found) == len(entries)
    return found


def mixed(broken: list[Broken], good: list[bytes], seed: int = 0) -> tuple[bytes, dict[int, str]]:
    """A file of both in any order; line -> kind of the broken ones. `good` keep their order."""
    kinds = ["good"] * len(good) + [str(number) for number in range(len(broken))]
    random.Random(seed).shuffle(kinds)
    waiting = iter(good)
    rows = [next(waiting) if k == "good" else broken[int(k)][0] for k in kinds]
    bad = {n: broken[int(k)][1] for n, k in enumerate(kinds, 1) if k != "good"}
    return b"\n".join(rows) + b"\n", bad


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures, some outside of it."""
    write_pictures(tmp_path / "data")
    return tmp_path / "data"


# ---------------------------------------------------------------- two hundred broken rows


def test_every_broken_row_is_put_aside_with_its_reason(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = broken_pairs(folder)
    assert len(broken) == 200
    duplicates = [row for row in broken if row[1] == "duplicate"]
    good = [line(pair(id=f"g{n}")) for n in range(17)]
    text, bad = mixed([row for row in broken if row[1] != "duplicate"], good)
    ahead = firsts_of_duplicates()  # what is first is good
    text = b"\n".join(ahead) + b"\n" + text + b"\n".join(raw for raw, _ in duplicates) + b"\n"
    lines = 3 + len(good) + len(broken)
    bad = {number + 3: kind for number, kind in bad.items()}
    bad |= dict.fromkeys(range(lines - len(duplicates) + 1, lines + 1), "duplicate")
    (folder / "pairs.jsonl").write_bytes(text)
    out = tmp_path / "fixed"
    words = ("check", folder / "pairs.jsonl", "--model", tiny_model, "--max-length", 300)
    assert command(*words, "--max-bad", 1000, "--fix", out) == 0
    found = quarantined(out / "quarantine.jsonl")
    kinds = {number: kind_of(reason) for number, reason in found.items()}
    wrong = {n: (found.get(n), bad.get(n)) for n in {*kinds, *bad} if kinds.get(n) != bad.get(n)}
    assert not wrong
    # in = out + quarantined, and what is out can be trained on
    rows = read_rows(out / "meta.json", kind="pair", quarantine=Quarantine(None, 0))
    assert len(rows) + len(found) == lines == 220
    assert [row.data["id"] for row in rows] == ["d0", "d1", "d2", *(f"g{n}" for n in range(17))]
    assert all(row.load_images() for row in rows)
    assert "20 of 220 rows are good" in capsys.readouterr().out
    assert command("check", out / "meta.json", "--max-bad", 0) == 0
    assert (folder / "pairs.jsonl").read_bytes() == text, "the data themselves were changed"


def test_too_many_bad_rows_stop_the_check(folder: Path, capsys: Any) -> None:
    rows = [pair(id=str(n)) for n in range(20)] + [pair(image="none.png")] * 3
    write_jsonl(folder / "p.jsonl", rows[::-1])
    words = ("check", folder / "p.jsonl")
    assert command(*words) == 2
    told = capsys.readouterr()
    assert "2 of 23 rows are bad, more than max_bad=0.05" in told.err
    assert "0 of 2 rows are good" in told.out and "missing image or video" in told.out
    assert command(*words, "--max-bad", 3) == 0
    assert len(quarantined(folder / "p.jsonl.quarantine.jsonl")) == 3


# ---------------------------------------------------------------- the other commands


class Answering:
    """A sampler that looks at every request's images, as a real one does."""

    name = "transformers"

    def stream(self, requests: Any, config: Any, *, ahead: Any = None) -> Iterator[Any]:
        from internvl.errors import DataError

        for number, request in enumerate(requests):
            try:
                assert all(image.size for image in request.images)
            except DataError as error:
                yield number, error
                continue
            yield number, [Completion("Final Answer: 3", (1,), (0.0,), "stop")] * config.n

    def close(self) -> None:
        pass


ROLLOUT = {"sample": 0, "completion": "Final Answer: 3", "finish_reason": "stop"}


def question(**fields: Any) -> dict[str, Any]:
    asked = {"id": "g", "image": "good.png", "question": "<image>\nHow many?", "answer": "3"}
    return {**asked, **fields}


def broken_questions(folder: Path) -> Iterator[Broken]:
    yield from ((raw, "not a record") for raw in broken_lines())
    for number, (image, kind) in enumerate(broken_images(folder)):
        yield line(question(id=f"b{number}", image=image)), kind
    for answer in ([], {"a": 1}, [["3"]]):
        yield line(question(answer=answer)), "wrong field"
    yield from ((line(question(id=text)), "no text") for text in ("", " "))
    yield line(question(id="two", question="<image><image>?")), "placeholders differ from images"


def test_mmpr_sample_puts_them_aside(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl.sampler.open_sampler", lambda *args, **options: Answering())
    text, bad = mixed([*broken_questions(folder)], [line(question(id=f"g{n}")) for n in range(20)])
    (folder / "q.jsonl").write_bytes(text)
    out = folder / "rollouts.jsonl"
    words = ("sample", folder / "q.jsonl", "--model", tiny_model, "--output", out)
    assert command(*words, "--max-bad", 1000, "--n", 2) == 0
    found = quarantined(folder / "rollouts.jsonl.quarantine.jsonl")
    assert {number: kind_of(reason) for number, reason in found.items()} == bad
    sampled = Counter(json.loads(text)["id"] for text in out.read_text().splitlines())
    assert sampled == {f"g{n}": 2 for n in range(20)}
    assert len(sampled) + len(found) == text.count(b"\n")


def test_questions_that_nothing_can_judge_are_not_sampled(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("internvl.sampler.open_sampler", lambda *args, **options: Answering())
    rows = [{**question(id=f"g{n}"), "matcher": "levenshtein"} for n in range(3)]
    (folder / "q.jsonl").write_bytes(b"".join(line(row) + b"\n" for row in rows))
    out = folder / "rollouts.jsonl"
    words = ("sample", folder / "q.jsonl", "--model", tiny_model, "--output", out)
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "q.jsonl:1: matcher 'levenshtein' is unknown" in said
    assert "none of the first 3 questions could be judged" in said
    assert not out.exists()


def test_pairs_of_other_turns_are_not_the_same(folder: Path, capsys: Any) -> None:
    turns = [{"from": "human", "value": "Is it 4?"}, {"from": "gpt", "value": "It is 5."}]
    other = [{"from": "human", "value": "Is it 6?"}, {"from": "gpt", "value": "It is 7."}]
    rows = [pair(image=None, question="Right?") | {"history": found} for found in (turns, other)]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    (folder / "pairs.jsonl").write_bytes(b"".join(line(row) + b"\n" for row in rows))
    assert command("check", folder / "pairs.jsonl", "--max-bad", 0) == 0
    (folder / "pairs.jsonl").write_bytes(2 * (line(rows[0]) + b"\n"))
    assert command("check", folder / "pairs.jsonl", "--max-bad", 0) == 2


def test_mmpr_verify_and_pair_put_them_aside(folder: Path) -> None:
    good = [line(question(**ROLLOUT) | {"sample": n}) for n in range(20)]
    broken = [(raw, "not valid JSON|the line is") for raw in broken_lines()]
    wrong: Any
    for name, wrong, reason in [
        ("completion", None, "'completion' is NoneType"), ("completion", 5, "'completion' is int"),
        ("sample", None, "'sample' is not an integer"), ("answer", [], "'answer' is not a list"),
        ("sample", 3, "the id of line"), ("matcher", "fuzzy", "matcher 'fuzzy' is unknown"),
        ("id", None, "'id' is NoneType"), ("question", 5, "'question' is int"),
    ]:  # fmt: skip
        row = question(**ROLLOUT) | {"sample": 99 + len(broken)} | {name: wrong}
        broken.append((line(row), reason))
    text, bad = mixed(broken, good)
    (folder / "r.jsonl").write_bytes(text)
    verdicts = folder / "v.jsonl"
    words = ("verify", folder / "r.jsonl", "--output", verdicts, "--workers", 1)
    assert command(*words, "--max-bad", 1000) == 0
    found = quarantined(folder / "v.jsonl.quarantine.jsonl")
    judged = verdicts.read_text().splitlines()
    assert len(judged) + len(found) == text.count(b"\n")
    again = [n for n, reason in found.items() if reason.startswith("the id of line")]
    assert len(again) == 1  # of two rows with one id the second is put aside, whichever that is
    for number, reason in bad.items():
        if reason != "the id of line":
            assert any(part in found[number] for part in reason.split("|")), found[number]

    verdict = json.loads(judged[0])
    faults = [
        ({"outcome": "maybe"}, "outcome 'maybe' is unknown"), ({"outcome": 5}, "'outcome' is int"),
        ({"format_ok": "yes"}, "'format_ok' is not a boolean"),
        ({"extracted": None}, "field 'extracted' is not a string"),
        ({"completion": None}, "'completion' is NoneType"),
    ]  # fmt: skip
    broken = [(line(verdict | {"sample": 50 + n} | f), r) for n, (f, r) in enumerate(faults)]
    text, bad = mixed(broken, [raw.encode() for raw in judged])
    verdicts.write_bytes(text)
    assert command("pair", verdicts, "--output", folder / "p.jsonl", "--max-bad", 100) == 0
    found = quarantined(folder / "p.jsonl.quarantine.jsonl")
    assert found.keys() == bad.keys() and all(bad[n] in found[n] for n in bad)


# ---------------------------------------------------------------- what is only worth knowing


def test_notes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What our readers mend and InternVL's own trainer may not."""
    rows = [
        pair(id="a", question="How many?", chosen="1"),
        pair(id="a", question="How many?", chosen="2", image=["good.png"]),
        pair(id="b", question="How many?", image="", chosen="3"),
        pair(id="c", question="How many?", image=None, chosen="4"),
    ]
    write_jsonl(folder / "p.jsonl", rows)
    assert command("check", folder / "p.jsonl", "--fix", tmp_path / "out", "--max-bad", 0) == 0
    told = capsys.readouterr().out
    for note in (
        "<image> is put in front of the question",
        "no <image> for a list of one: InternVL's own trainer fails on it",
        '"image": "" is taken as no image',
        "image is null: InternVL's own trainer takes another row for it",
        "an id that came before",
    ):
        assert f"note of 1 row(s) of 'p': {note}" in told
    fixed = (tmp_path / "out/annotations/p.jsonl").read_text().splitlines()
    shown = [(r["question"], r.get("image", "none")) for r in map(json.loads, fixed)]
    assert shown == [
        ("<image>\nHow many?", "good.png"), ("<image>\nHow many?", ["good.png"]),
        ("How many?", "none"), ("How many?", "none"),
    ]  # fmt: skip


def test_parquet_with_bytes_becomes_mmprs_own_files(tmp_path: Path) -> None:
    from datasets import Dataset

    picture = encode("PNG")
    texts = {"question": ["<image>?"] * 3, "chosen": ["a", "b", "c"], "rejected": ["x", "y", "c"]}
    images = [{"bytes": picture, "path": None}] * 3
    Dataset.from_dict({"image": images, **texts}).to_parquet(tmp_path / "p.parquet")
    out = tmp_path / "out"
    assert command("check", tmp_path / "p.parquet", "--fix", out, "--max-bad", 1) == 0
    assert list(quarantined(out / "quarantine.jsonl").values()) == [
        "chosen and rejected are identical"
    ]
    assert len([*(out / "images").iterdir()]) == 1
    meta = json.loads((out / "meta.json").read_text())
    assert meta == {
        "p": {
            "root": ".", "annotation": "annotations/p.jsonl", "data_augment": False,
            "repeat_time": 1, "length": 2,
        }
    }  # fmt: skip
    row = read_rows(out / "meta.json", kind="pair", quarantine=Quarantine(None, 0))[1]
    assert row.data["chosen"] == "b" and len(row.load_images()) == 1


# ---------------------------------------------------------------- meta.json


def publish(root: Path, entries: Any) -> Path:
    """A folder laid out as MMPR is on the hub: paths start with the data set's own name."""
    for name in ("images/a", "annotations"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(root / "images/a/good.png")
    write_jsonl(root / "annotations/a.jsonl", [pair(id=str(n)) for n in range(4)])
    (root / "meta.json").write_text(json.dumps(entries) if isinstance(entries, dict) else entries)
    return root / "meta.json"


def entry(name: str = "MMPR-v1.2", **fields: Any) -> dict[str, Any]:
    facts = {"root": f"{name}/images/a", "annotation": f"{name}/annotations/a.jsonl"}
    return {**facts, "data_augment": False, "repeat_time": 1, "length": 4, **fields}


@pytest.mark.parametrize("folder_name", ["MMPR-v1.2", "as-downloaded"])
def test_mmprs_published_layout(folder_name: str, tmp_path: Path, capsys: Any) -> None:
    meta = publish(tmp_path / folder_name, {"a": entry(), "again": entry(repeat_time=0.5)})
    assert command("check", meta, "--max-bad", 0) == 0
    told = capsys.readouterr().out
    assert (
        "8 of 8 rows are good" in told and "4 row(s) of 'again': the same pair in another" in told
    )
    rows = read_rows(meta, kind="pair", quarantine=Quarantine(None, 0))
    assert len(rows) == 6 and rows[0].load_images()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"annotation": None}, "it has no 'annotation' path"),
        ({"annotation": "annotations/none.jsonl"}, "none.jsonl: no such file"),
        ({"data_augment": True}, "data_augment is True, which is not supported here"),
        ({"repeat_time": "2"}, "repeat_time is '2'; give a number of 0 or more"),
        ({"repeat_time": -1}, "repeat_time is -1"),
        ({"root": 5}, "root is 5, expected the folder"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0"),
    ],
)
def test_faults_of_meta_json(fields: Any, told: str, tmp_path: Path, capsys: Any) -> None:
    meta = publish(tmp_path / "d", {"bad": entry("d", **fields), "good": entry("d")})
    assert command("check", meta, "--max-bad", 0 if "root" not in fields else 4) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {meta}: data set 'bad': ") and told in error
    assert command("check", meta, "--fix", tmp_path / "out", "--max-bad", 4) == 0
    assert command("check", tmp_path / "out/meta.json", "--max-bad", 0) == 0, "it was not mended"


def test_notes_of_meta_json(tmp_path: Path, capsys: Any) -> None:
    less = {"annotation": "d/annotations/a.jsonl"}
    meta = publish(
        tmp_path / "d",
        {"short": entry("d", length=7), "less": less, "more": entry("d", repeat_time=2.5)},
    )
    assert command("check", meta, "--image-root", tmp_path / "d/images/a", "--max-bad", 0) == 0
    told = capsys.readouterr().out
    for name, note in (
        ("short", "length is 7, and the file has 4 rows"),
        *(("less", "it has no 'root'"), ("less", "it has no 'repeat_time'")),
        ("more", "repeat_time is 2.5: InternVL's own trainer takes it 2 time(s)"),
    ):
        assert f"note of data set {name!r}: {note}" in told
    for text in ("{", "[]", "5", "{}"):
        meta.write_text(text)
        assert command("check", meta) == 2
        assert str(meta) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-length", "9"], "--max-length needs --model"),
        (["--max-tiles", "9"], "--max-tiles needs --model"),
        (["--fix", "data"], "is not empty; give a new folder"),
        (["--quarantine", "data/p.jsonl"], "is one of the files that are checked"),
    ],
)
def test_options_that_cannot_be_honoured(
    words: list[str], message: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(folder.parent)
    write_jsonl(folder / "p.jsonl", [pair()])
    assert command("check", folder / "p.jsonl", *words) == 2
    assert message in capsys.readouterr().err and (folder / "p.jsonl").is_file()
