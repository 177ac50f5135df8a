"""TRL's preference rows become our pairs, whatever holds them; what cannot be read says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from record_cases import encoded, pixels, read, write

from internvl.chat import load_processor
from internvl.data import Quarantine, Row, read_rows
from internvl.data.records import find_fault, tidy_record
from internvl.encoding import Encoder

IMAGE: dict[str, Any] = {"type": "image"}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": [text("Be brief.")]}
REPLIES: dict[str, Any] = {"chosen": [said("3")], "rejected": [said([text("4")])]}
PAIR = {"question": "How many?", "chosen": "3", "rejected": "4"}

GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"prompt": "How many?", "chosen": "3", "rejected": "4"}, PAIR),
    "texts with a picture": (
        {"prompt": "How many?", "chosen": "3", "rejected": "4", "image": "a.png"},
        {**PAIR, "question": "<image>\nHow many?", "image": "a.png"},
    ),
    "messages": ({"prompt": [user("How many?")], **REPLIES}, PAIR),
    "parts": (
        {"prompt": [user([IMAGE, text("How many?")])], **REPLIES, "images": ["a.png"]},
        {**PAIR, "question": "<image>\nHow many?", "image": ["a.png"]},
    ),
    "arrow's nulls": (
        {
            "prompt": [user([{**IMAGE, "text": None}, text("How many?")])],
            **REPLIES,
            "images": [{"bytes": b"x", "path": None}],
        },
        {**PAIR, "question": "<image>\nHow many?", "image": [{"bytes": b"x", "path": None}]},
    ),
    "a picture within": (
        {
            "prompt": [user([text("Left "), IMAGE, text("or "), IMAGE, text("?")])],
            **REPLIES,
            "images": ["a.png", "b.png"],
        },
        {**PAIR, "question": "Left <image>\nor <image>\n?", "image": ["a.png", "b.png"]},
    ),
    "pictures in the parts": (
        {
            "prompt": [user([{**IMAGE, "image": "a.png"}, {**IMAGE, "path": "b.png"}, text("?")])],
            **REPLIES,
        },
        {**PAIR, "question": "<image>\n<image>\n?", "image": ["a.png", "b.png"]},
    ),
    "pictures that no part names": (
        {"prompt": [user("Which?")], **REPLIES, "images": ["a.png", "b.png"]},
        {**PAIR, "question": "<image>\n<image>\nWhich?", "image": ["a.png", "b.png"]},
    ),
    "places in a text": (
        {"prompt": [user("Left <image>, right <image>")], **REPLIES, "images": ["a", "b"]},
        {**PAIR, "question": "Left <image>, right <image>", "image": ["a", "b"]},
    ),
    "a system turn": (
        {"prompt": [SYSTEM, user("How many?")], **REPLIES},
        {**PAIR, "system": "Be brief."},
    ),
    "shared messages": (
        {
            "chosen": [SYSTEM, user("How many?"), said("3")],
            "rejected": [SYSTEM, user("How many?"), said("4")],
        },
        {**PAIR, "system": "Be brief."},
    ),
    "a prompt's text beside whole conversations": (
        {
            "prompt": "How many?",
            "chosen": [user("How many?"), said("3")],
            "rejected": [user("How many?"), said("4")],
            "score_chosen": 8.5,
        },
        {**PAIR, "score_chosen": 8.5},
    ),
    "a prompt's text and messages": ({"prompt": "How many?", **REPLIES}, PAIR),
    "several turns": (
        {
            "prompt": [user("Look."), said("At?"), user([text("This: "), IMAGE])],
            **REPLIES,
            "images": ["a.png"],
        },
        {
            **PAIR,
            "history": [{"from": "human", "value": "Look."}, {"from": "gpt", "value": "At?"}],
            "question": "This: <image>\n",
            "image": ["a.png"],
        },
    ),
    "several turns, the picture in none": (
        {"prompt": [user("Look."), said("At?"), user("This.")], **REPLIES, "images": ["a.png"]},
        {
            **PAIR,
            "history": [
                {"from": "human", "value": "<image>\nLook."},
                {"from": "gpt", "value": "At?"},
            ],
            "question": "This.",
            "image": ["a.png"],
        },
    ),
}

PROMPT = [user("How many?")]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": PROMPT, "chosen": [said("3")]}, "field 'rejected' is NoneType, expected a text or"),
    ({"prompt": PROMPT, **REPLIES, "rejected": []}, "field 'rejected' is empty, expected a text"),
    ({"prompt": 3, **REPLIES}, "field 'prompt' is int, expected a text or messages"),
    ({"prompt": [], **REPLIES}, "the prompt holds no user's message"),
    ({"prompt": [SYSTEM], **REPLIES}, "the prompt holds no user's message"),
    ({"prompt": [user("a"), user("b")], **REPLIES}, "of the prompt is from 'user', expected 'assi"),
    ({"prompt": [*PROMPT, said("It is")], **REPLIES}, "the prompt ends with the assistant's"),
    ({"prompt": [{"role": "tool", "content": "x"}], **REPLIES}, "is from 'tool', expected 'user'"),
    ({"prompt": ["How many?"], **REPLIES}, "message 0 is no object with a role and a content"),
    ({"prompt": [user(None)], **REPLIES}, "message 0 of the prompt is NoneType, expected a text"),
    ({"prompt": [user([{"type": "audio"}])], **REPLIES}, "holds a part of type 'audio'"),
    ({"prompt": [user([IMAGE])], **REPLIES}, "0 image(s) but 1 <image> placeholder(s)"),
    (
        {"prompt": [user([text("<image>\nHow many?")])], **REPLIES, "images": ["a.png"]},
        "a text part of message 0 of the prompt holds <image>",
    ),
    (
        {"prompt": [user([text("How many?")])], **REPLIES, "images": ["a.png", "b.png"]},
        "2 image(s) but 0 <image> placeholder(s)",
    ),
    (
        {"prompt": [user([{**IMAGE, "image": "a.png"}])], **REPLIES, "images": ["a.png"]},
        "pictures both in the messages and in a field of their own",
    ),
    ({"prompt": PROMPT, **REPLIES, "chosen": [said([IMAGE])]}, "chosen holds a part of type 'ima"),
    ({"prompt": PROMPT, **REPLIES, "chosen": [said("")]}, "field 'chosen' is empty"),
    ({"prompt": PROMPT, "chosen": "3", "rejected": [said("3")]}, "chosen and rejected are identic"),
    (
        {"prompt": PROMPT, **REPLIES, "chosen": [said("3"), user("Sure?"), said("Yes")]},
        "chosen answers the prompt with messages from assistant, user, assistant, expected one",
    ),
    (
        {"chosen": [*PROMPT, said("3")], "rejected": [*PROMPT, said("3")]},
        "chosen and rejected are identical",
    ),
    (
        {"chosen": [*PROMPT, said("3")], "rejected": [user("Or?"), said("4")]},
        "the prompt holds no user's message",
    ),
    ({"chosen": "How many? 3", "rejected": "How many? 4"}, "field 'question' is NoneType, expecte"),
    ({"chosen": "How many? 3", "rejected": [said("4")]}, "no 'prompt', and chosen and rejected"),
    ({"prompt": PROMPT, **REPLIES, "tools": [{"name": "f"}]}, "field 'tools' is given; a pair"),
    (
        {"prompt": [SYSTEM, *PROMPT], **REPLIES, "system": "x"},
        "a system message beside the field 'system'",
    ),
    (
        {"prompt": [user("a"), {"role": "assistant", "tool_calls": [{}]}, user("b")], **REPLIES},
        "message 1 of the prompt calls tools",
    ),
    ({**PAIR, "history": [{"from": "human", "value": "a"}]}, "field 'history' is not a list of hu"),
    ({**PAIR, "history": [{"from": "gpt"}] * 2}, "turn 0 of 'history' is not from 'human'"),
]


@pytest.mark.parametrize("name", GOOD)
def test_a_preference_row_is_a_pair(name: str) -> None:
    record, pair = GOOD[name]
    found = tidy_record(record, "pair")
    assert found == pair
    assert find_fault(found, "pair") is None
    assert tidy_record(found, "pair") == found


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_what_cannot_be_read_says_why(record: dict[str, Any], reason: str) -> None:
    fault = find_fault(tidy_record(record, "pair"), "pair")
    assert fault is not None and reason in fault


def trl_rows() -> list[dict[str, Any]]:
    """As TRL's own data sets hold them: no picture, one, several, a system turn, several turns."""
    pictures = [{"bytes": encoded(seed), "path": None} for seed in range(3)]
    prompts: list[tuple[list[Any], int]] = [
        ([user([text("2 + 1?")])], 0),
        ([user([IMAGE, text("How many?")])], 1),
        ([SYSTEM, user([text("Left "), IMAGE, IMAGE, text("Same?")])], 2),
        ([user([IMAGE, text("Red?")]), said([text("No.")]), user([IMAGE, text("And here?")])], 2),
    ]
    return [
        {
            "prompt": prompt,
            "chosen": [said([text("The answer is 3.")])],
            "rejected": [said([text("4")])],
            "images": pictures[:number],
        }
        for prompt, number in prompts
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows as JSONL with image files, as parquet and as a saved data set."""
    import datasets

    from mmpr.formats import trl_features

    folder = tmp_path_factory.mktemp("trl")
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(encoded(seed))
    lines = [{**r, "images": [f"{n}.png" for n in range(len(r["images"]))]} for r in trl_rows()]
    places = {
        "jsonl": write(folder / "rows.jsonl", lines),
        "parquet": folder / "rows.parquet",
        "saved data set": folder / "saved",
    }
    both = datasets.Dataset.from_list(trl_rows(), features=trl_features())
    both.to_parquet(places["parquet"])
    both.save_to_disk(places["saved data set"])
    return places


def content(row: Row) -> Any:
    fields = ("system", "history", "question", "chosen", "rejected")
    return [row.data.get(name) for name in fields], [pixels(one) for one in row.load_images()]


@pytest.mark.parametrize("container", ["parquet", "saved data set"])
def test_every_container_gives_the_same_pairs(container: str, saved: dict[str, Path]) -> None:
    plain = read(saved["jsonl"], kind="pair")
    found = read(saved[container], kind="pair")
    assert [content(row) for row in found] == [content(row) for row in plain]
    assert [len(row.images) for row in plain] == [0, 1, 2, 2]
    assert plain[2].data["question"] == "Left <image>\n<image>\nSame?"


def test_the_ids_are_those_of_trl(saved: dict[str, Path], tiny_model: Path) -> None:
    """Its collator on the same file: prompt and completions, token by token; the lengths, too."""
    from transformers import AutoProcessor
    from trl.data_utils import prepare_multimodal_messages

    processor = AutoProcessor.from_pretrained(tiny_model)
    encoder = Encoder(load_processor(str(tiny_model)))
    for row, record in zip(read(saved["jsonl"], kind="pair"), trl_rows(), strict=True):
        pictures = row.load_images()
        example = encoder.pair(row)
        for side, name in enumerate(("chosen", "rejected")):
            messages = prepare_multimodal_messages(record["prompt"] + record[name], pictures)
            (ids,) = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, processor_kwargs={"max_patches": 12}
            )["input_ids"]
            ours = example.prompt_ids + example.completions[side]
            assert ids[: len(ours)] == ours
            assert processor.tokenizer.decode(ids[len(ours) :]) == "\n"  # after the last turn
        assert encoder.length(row, "pair") == len(example.prompt_ids) + max(
            map(len, example.completions)
        )


def test_turns_that_cannot_stand_before_a_question(tmp_path: Path, tiny_model: Path) -> None:
    """What only the tokenizer sees is found with the lengths."""
    encoder = Encoder(load_processor(str(tiny_model)), max_length=60)
    history = [{"from": "human", "value": "Hi <|im_end|>"}, {"from": "gpt", "value": "Hello"}]
    (row,) = read(write(tmp_path / "a.jsonl", [{**PAIR, "history": history}]), kind="pair")
    assert "turn 0 of 'history' holds the control token" in str(encoder.length_fault(row, "pair"))
    history[0]["value"] = "red " * 60
    (row,) = read(write(tmp_path / "b.jsonl", [{**PAIR, "history": history}]), kind="pair")
    assert "over max_length 60" in str(encoder.length_fault(row, "pair"))


@pytest.mark.parametrize("embed", [False, True])
def test_what_export_writes_reads_back(embed: bool, saved: dict[str, Path], tmp_path: Path) -> None:
    """Byte for byte, and pixel for pixel, for all that a chat template can write."""
    from mmpr.formats import write_trl

    rows = read(saved["jsonl"], kind="pair")
    out = (tmp_path if embed else saved["jsonl"].parent) / "back.parquet"
    quarantine = Quarantine(None, 0)
    assert write_trl(out, rows, quarantine, embed=embed) == len(rows)
    assert [content(row) for row in read(out, kind="pair")] == [content(row) for row in rows]


def test_a_plain_file_of_ones_own(tmp_path: Path) -> None:
    """Chosen and rejected beside a question, in lines or in a table; nothing of mmpr is needed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.png").write_bytes(encoded(0))
    rows = [
        {"question": "How many?", "chosen": "3", "rejected": "4", "image": "a.png"},
        {"prompt": "How many?", "chosen": "3", "rejected": "4", "image": "a.png"},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "rows.parquet")
    found = [*read(write(tmp_path / "rows.jsonl", rows), kind="pair")]
    found += read(tmp_path / "rows.parquet", kind="pair")
    assert [row.data["question"] for row in found] == ["<image>\nHow many?"] * 3


def test_meta_json_as_it_is_published(tmp_path: Path) -> None:
    """MMPR-v1.2's layout and keys: paths from the folder above, fractions, counts, several sets."""
    folder = tmp_path / "MMPR-v1.2"
    for name in ("annotations", "images/charts", "images/text"):
        (folder / name).mkdir(parents=True)
    (folder / "images/charts/a.png").write_bytes(encoded(0))
    pair = {"question": "<image>\nHow many?", "chosen": "3", "rejected": "4", "answer_gt": "3"}
    sizes, repeats = {"charts": 5, "text": 4, "off": 2}, {"charts": 1, "text": 0.5, "off": 0}
    meta = {}
    for name, size in sizes.items():
        image = {"image": "a.png"} if name == "charts" else {}
        asked = pair["question"] if image else "How many?"
        write(
            folder / f"annotations/{name}.jsonl",
            [{**image, **pair, "question": asked, "chosen": f"{n} of 3"} for n in range(size)],
        )
        meta[name] = {
            "root": f"MMPR-v1.2/images/{name}" if name != "off" else "MMPR-v1.2/images/text",
            "annotation": f"MMPR-v1.2/annotations/{name}.jsonl",
            "data_augment": False,
            "repeat_time": repeats[name],
            "length": size,
        }
    (folder / "meta.json").write_text(json.dumps(meta))
    quarantine = Quarantine(None, 0)
    rows = read_rows(folder / "meta.json", kind="pair", quarantine=quarantine)
    assert [(row.data["dataset"], row.data["chosen"]) for row in rows] == [
        *(("charts", f"{n} of 3") for n in range(5)),
        *(("text", f"{n} of 3") for n in range(2)),
    ]
    assert pixels(rows[0].load_images()[0]) and rows[6].load_images() == []
