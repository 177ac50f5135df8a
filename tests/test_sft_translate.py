r"""`sft translate`: what is asked, what a translation must keep, every row in one file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from data_tool_cases import FAULTS, accounted, beside, command, endpoint, read, row, summary
from hypothesis import given
from hypothesis import strategies as st
from judge_server import Server, replies, says, stumbles

from internvl.data import Quarantine, read_rows, write_jsonl
from sft.data_tools.protected import changed_parts, cut_edges, has_words, protected_parts
from sft.data_tools.translation import PROMPT, needs_translation, reader, translation_fault

# ---------------------------------------------------------------- what is protected

PROTECTED = [
    ("Frame1: <image>\nFrame2: <image>", ["<image>", "<image>"]),
    ("<video> and <|im_end|> stay", ["<video>", "<|im_end|>"]),
    ("<ref>the dog</ref><box>[[1, 2, 3, 4]]</box>", ["<ref>", "</ref><box>[[1, 2, 3, 4]]</box>"]),
    ("Use `len(x)` or\n```python\nprint('hi')\n```", ["`len(x)`", "```python\nprint('hi')\n```"]),
    ("$x^2$, \\(y\\), \\[z\\] and $$a = b$$", ["$x^2$", "\\(y\\)", "\\[z\\]", "$$a = b$$"]),
    ("\\begin{align}a &= b\\end{align}", ["\\begin{align}a &= b\\end{align}"]),
    ("It costs $5, not $6.", []),
    ("So \\boxed{12} or \\boxed{\\frac{1}{2}}", ["\\boxed{12}", "\\boxed{\\frac{1}{2}}"]),
    ("Final Answer: 7", ["Final Answer: 7"]),
    ("Final answer: B.", ["Final answer: B"]),
    ("**Final Answer:** $x$", ["**Final Answer:** $x$"]),
    ("Final Answer: New York", ["Final Answer:"]),
    ("<think>Three.</think>", ["<think>", "</think>"]),
    ("2 < 3 and a > b", []),
]


@pytest.mark.parametrize(("text", "parts"), PROTECTED)
def test_protected_parts(text: str, parts: list[str]) -> None:
    assert protected_parts(text) == parts


CHANGED = [
    ("Is <image> like <image>?", "<image>像<image>吗？", None),
    ("Is <image> like <image>?", "<image>像吗？", "'<image>' stands there 1 times, not 2"),
    ("Is <image> red?", "<image><image>是红的吗？", "'<image>' stands there 2 times, not 1"),
    ("Is it red?", "<image>是红的吗？", "'<image>' is new"),
    ("Run `ls -l`.", "运行 `ls -l`。", None),
    ("Run `ls -l`.", "运行 `ls`。", "'`ls -l`' is missing"),
    ("If $a<b$ then.", "如果 $a < b$。", "'$a<b$' is missing"),
    ("Final Answer: 7", "最终答案：7", "'Final Answer: 7' is missing"),
    ("It is so. Final Answer: B", "是这样。Final Answer: B。", None),
    ("Final Answer: red", "Final Answer: 红色", None),
    ("Final Answer: B", "Final Answer: B。所以选它", None),
    ("<ref>a cat</ref><box>[[1, 2]]</box>", "<ref>一只猫</ref><box>[[1, 2]]</box>", None),
    ("<ref>cat</ref><box>[[1, 2]]</box>", "<ref>猫</ref><box>[[1, 3]]</box>",
     "'</ref><box>[[1, 2]]</box>' is missing"),
    ("<ref>a</ref><box>[[1]]</box> <ref>b</ref><box>[[2]]</box>",
     "<ref>甲</ref> <box>[[1]]</box><ref>乙</ref><box>[[2]]</box>",
     "'</ref><box>[[1]]</box>' is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "translation", "fault"), CHANGED)
def test_what_a_translation_keeps(source: str, translation: str, fault: str | None) -> None:
    assert changed_parts(source, translation) == fault


def test_long_edges_are_gone_through_once() -> None:
    edge = "\n <image>" * 100_000
    assert cut_edges(edge + "a" + edge) == (edge, "a", edge)


@given(st.lists(st.sampled_from(["<image>", "\n", " ", "a", "<video>", "b c", "`x`"]), max_size=9))
def test_edges_are_put_back(pieces: list[str]) -> None:
    text = "".join(pieces)
    front, middle, behind = cut_edges(text)
    assert front + middle + behind == text
    assert middle == middle.strip()
    for edge in (front, behind):
        assert not has_words(edge)
    assert not middle.startswith(("<image>", "<video>"))
    assert not middle.endswith(("<image>", "<video>"))


@pytest.mark.parametrize(
    ("text", "language", "needed"),
    [
        ("3", "Chinese", False),
        ("B", "Chinese", False),
        ("$x + y$", "Chinese", False),
        ("Final Answer: 7", "Chinese", False),
        ("Yes", "Chinese", True),
        ("这是 iPhone。图里有一只红色的猫", "Chinese", False),
        ("这是 iPhone。图里有一只红色的猫", "French", True),
    ],
)
def test_what_needs_a_translation(text: str, language: str, needed: bool) -> None:
    assert needs_translation(text, language) == needed


LONG = "The red bar is the tallest of all the bars in this chart, by far, as one can see at once."
FAULTY = [
    ("How many red bars?", "有几根红柱？", "Chinese", None),
    ("How many red bars?", "", "Chinese", "it is empty"),
    ("How many red bars?", "How many red bars?", "Simplified Chinese",
     "it is not written in Simplified Chinese"),
    ("How many red bars?", "How many red bars?", "French", "it is not written in French"),
    ("It is red.", "Certainly! Here is the text you wish: 它是红的。", "Chinese",
     "it holds 5 English words that are no names, the text has 2"),
    ("Use the GPU kernel cache.", "使用 GPU kernel cache。", "Chinese", None),  # the second rule
    ("New York", "New York", "Chinese", None),  # names stay English: the first rule
    ("Coca-Cola by Nike", "Coca-Cola by Nike", "French", None),
    ("Yes", "是。" * 300, "Chinese", "it has 600 characters, the text has 3"),
    (LONG, "红柱最高", "Chinese", f"it has only 4 characters, the text has {len(LONG)}"),
    ("One.\n\nTwo.\n\nThree.\n\nFour.", "一。二。三。四。", "Chinese", "its paragraphs are gone"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "translation", "language", "fault"), FAULTY)
def test_faults(text: str, translation: str, language: str, fault: str | None) -> None:
    assert translation_fault(text, translation, language) == fault


def test_reading_a_reply() -> None:
    read = reader("How many red bars?", "Chinese")
    assert read("<think>Hm: How many?</think>\n有几根红柱？\n") == ("有几根红柱？", None)
    assert read("Text for translation: 有几根红柱？") == ("有几根红柱？", None)


# ---------------------------------------------------------------- the command


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with endpoint(monkeypatch) as running:
        running.answers = [replies(translate)]
        yield running


def translate(messages: list[dict[str, str]]) -> str:
    """Every English word is 字, but for what is protected."""
    asked = [m["content"] for m in messages if m["role"] == "user"]
    text = next(t for t in reversed(asked) if t.startswith("Text for translation: "))
    text = text.removeprefix("Text for translation: ")
    parts = protected_parts(text)
    kept = [f"<|{number}|>" for number in range(len(parts))]
    for part, mark in zip(parts, kept, strict=True):
        text = text.replace(part, mark, 1)
    text = re.sub(r"[A-Za-z]{2,}", "字", text)
    for part, mark in zip(parts, kept, strict=True):
        text = text.replace(mark, part)
    return text


def words_for(server: Server, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("translate", data, "--language", "Chinese", "--output", out,
            "--base-url", server.url, "--model", "m", *more)  # fmt: skip


def texts(record: dict) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def test_what_is_asked_and_what_comes_back(server: Server, tmp_path: Path) -> None:
    rows = [
        row(0, "<image>\nHow many red bars?", "There are two. Final Answer: 2", "Is `x` there?",
            "Yes.", image="a.png", system="You help people.", weight=2, dataset="charts"),
        row(1, "<image>", "3", image="a.png"),
    ]  # fmt: skip
    data, out = tmp_path / "in.jsonl", tmp_path / "zh.jsonl"
    write_jsonl(data, [*rows, {"id": "s2"}])
    assert command(*words_for(server, data, out, "--max-bad", 1)) == 0
    assert accounted(out, ["s0", "s1", "s2"])["quarantine"] == ["s2"]
    first, second = read(out)
    assert texts(first) == [
        "<image>\n字 字 字 字?",
        "字 字 字. Final Answer: 2",
        "字 `x` 字?",
        "字.",
    ]
    assert first["system"] == "字 字 字."
    assert {name: first[name] for name in ("id", "image", "weight", "dataset", "language")} == {
        "id": "s0", "image": "a.png", "weight": 2, "dataset": "charts", "language": "Chinese",
    }  # fmt: skip
    assert second == {**rows[1], "language": "Chinese"}
    assert summary(out)["reasons"] == {"kept:unchanged": 1}

    asked = [body["messages"] for _, _, body in server.requests]
    assert len(asked) == 1 + 5  # the check at the start, and what has words
    assert asked[1][0] == {"role": "system", "content": PROMPT.format(language="Chinese")}
    for rule in ("1. Keep proper nouns", "2. Retain technical terms", "3. Use Chinese idiomatic",
                 "4. Ensure quotes", "5. For acronyms"):  # fmt: skip
        assert rule in asked[1][0]["content"]
    # the image's placeholder is not sent; the two texts before it are, with their translations
    assert [message["content"] for message in asked[4][1:]] == [
        "Text for translation: How many red bars?", "字 字 字 字?",
        "Text for translation: There are two. Final Answer: 2", "字 字 字. Final Answer: 2",
        "Text for translation: Is `x` there?",
    ]  # fmt: skip
    number = len(server.requests)
    assert command(*words_for(server, data, out, "--max-bad", 1)) == 0
    assert len(server.requests) == number
    assert command(*words_for(server, data, out, "--max-bad", 1, "--context", 0)) == 0
    assert all(len(body["messages"]) == 2 for _, _, body in server.requests[number:])


def test_a_reply_that_breaks_the_checks(server: Server, tmp_path: Path) -> None:
    """The model is told what is wrong; at last the row is undecided, and asked again next time."""
    data, out = tmp_path / "in.jsonl", tmp_path / "zh.jsonl"
    write_jsonl(data, [row(0, "Is <image> like <image>, my friend?", "Yes.", image=["a", "b"]),
                       row(1, "What does the `ls` command do?", "It lists files.")])  # fmt: skip

    def careless(messages: list[dict[str, str]]) -> str:
        said = translate(messages)
        if any("like <image>" in message["content"] for message in messages[1:]):
            return said.replace("<image>", "图")
        if messages[-1]["content"].startswith("That cannot be used: the part '`ls`' is missing."):
            return said
        return said.replace("`ls`", "ls")

    server.answers = [replies(careless)]
    assert command(*words_for(server, data, out, "--max-retries", 2)) == 2
    assert accounted(out, ["s0", "s1"])["undecided"] == ["s0"]
    (lost,) = beside(out, "undecided.jsonl")
    assert lost["reason"] == "turn 0: the part '<image>' is missing"
    assert lost["row"]["conversations"][0]["value"].startswith("Is <image>")
    (done,) = read(out)
    assert "`ls`" in texts(done)[0]
    server.answers = [replies(translate)]
    assert command(*words_for(server, data, out)) == 0
    assert accounted(out, ["s0", "s1"])["kept"] == ["s0", "s1"]


def test_a_reply_that_is_cut_off(server: Server, tmp_path: Path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "zh.jsonl"
    write_jsonl(data, [row(0, "What is this thing?", "A cat.")])
    body = {"choices": [{"message": {"content": "字"}, "finish_reason": "length"}]}
    cut = json.dumps(body).encode()
    server.answers = [replies(translate), lambda handler: handler.send(200, cut)]
    assert command(*words_for(server, data, out)) == 2
    (lost,) = beside(out, "undecided.jsonl")
    assert lost["reason"] == "turn 0: its reply was cut off; more max_tokens may help"
    assert len(server.requests) == 2  # it would be cut again


MANY = [row(n, f"<image>\nWhat is number {n}?", f"It is the {n}th thing.", image="a.png")
        for n in range(30)]  # fmt: skip
IDS = [one["id"] for one in MANY]


def test_an_endpoint_that_fails(server: Server, tmp_path: Path) -> None:
    data, out, other = (tmp_path / name for name in ("in.jsonl", "zh.jsonl", "well.jsonl"))
    write_jsonl(data, MANY)
    assert command(*words_for(server, data, other)) == 0
    server.answers = [says("猫有几条腿？"), stumbles(replies(translate), FAULTS)]
    words = words_for(server, data, out, "--timeout", 0.5, "--workers", 8)
    assert command(*words) == 0
    assert accounted(out, IDS)["kept"] == IDS
    assert out.read_bytes() == other.read_bytes()


def test_meta_in_and_out(server: Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", MANY[:2])
    entry = {"root": "", "annotation": "a.jsonl", "repeat_time": 2, "length": 2}
    (tmp_path / "meta.json").write_text(json.dumps({"things": entry}))
    out = tmp_path / "zh.json"
    assert command(*words_for(server, tmp_path / "meta.json", out)) == 0
    (name,) = json.loads(out.read_text())
    assert name == "things_chinese"
    rows = read_rows(out, kind="conversation", quarantine=Quarantine(None))
    assert len(rows) == 4 and "字" in texts(rows[0].data)[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--language", "English"], "the texts are English: name another one"),
        (["--language", "Chinese"], "--base-url is missing"),
        (["--language", "Chinese", "--base-url", "http://x/v1", "--model", "m", "--context", "-1"],
         "--context is -1; give 0 or more"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    write_jsonl(tmp_path / "in.jsonl", MANY)
    if "English" in more:
        more = [*more, "--base-url", "http://x/v1", "--model", "m"]
    words = ("translate", tmp_path / "in.jsonl", "--output", tmp_path / "zh.jsonl", *more)
    assert command(*words) == 2
    assert message in capsys.readouterr().err
