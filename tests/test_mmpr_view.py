"""mmpr view: the page's content, its draw, the marked differences; filters in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from plain import noise_image
from record_cases import encoded, write

from internvl.thumbnails import make_thumbnail
from mmpr.cli import main

HOSTILE = '</script><script>alert("x")</script></textarea></style>{{ 7 * 7 }}'
VOID = {"meta", "img", "br", "input"}


def pair(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": name, "question": f"<image>\nHow many bars of {name} are red?",
        "chosen": "The red bar is 2. Final Answer: 2",
        "rejected": "The red bar is 3. Final Answer: 3",
        "answer_gt": "2", "kind": "correctness", **fields,
    }  # fmt: skip


def verdict(name: str, sample: int, outcome: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": name, "image": "wide.png", "question": "<image>\nHow many?", "answer": ["3", "three"],
        "sample": sample, "completion": f"{outcome} {sample} {name}", "outcome": outcome,
        "extracted": None if outcome in ("no_answer", "timeout") else str(sample),
        "matcher": "number", "score": 1.0 if outcome == "correct" else 0.0,
        "format_ok": outcome == "correct", "model": "runs/sft", "finish_reason": "stop", **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of pairs in a meta.json: 30 charts, and one record of every other sort."""
    folder = tmp_path_factory.mktemp("view")
    noise_image(112, 56, 1).save(folder / "wide.png")
    noise_image(900, 1350, 2).save(folder / "photo.jpg")
    (folder / "broken.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:5000])
    (folder / "clip").mkdir()
    for number in range(3):
        noise_image(40, 30, number).save(folder / "clip" / f"{number}.png")
    charts = [pair(f"c{number}", image="wide.png") for number in range(30)]
    for number in range(20, 30):
        charts[number] |= {"kind": "format", "rejected": "The red bar is 2. I think it is"}
    write(folder / "charts.jsonl", [*charts, charts[0] | {"id": "again"}])
    odd = [
        pair("photo", image="photo.jpg"),
        pair("missing", image="nowhere.png"),
        pair("broken", image="broken.jpg"),
        pair("outside", image="../outside.png"),
        pair("text", question="What is 1 + 1?", answer_gt=""),
        pair("several", image=["wide.png", "photo.jpg"], question="<image><image>\nWhich?"),
        pair("video", video="clip", question="<video>\nWhat happens?", num_frames=3),
        pair("chinese", image="wide.png", chosen="一共有三个圆形", rejected="一共有五个圆形"),
        pair(HOSTILE, image="wide.png", chosen=HOSTILE, kind="<i>", dataset=HOSTILE),
        pair("override", image="wide.png", chosen="Yes \u202e2 :si ti\u202c", kind="dropout"),
        pair("same", image="wide.png", chosen="a", rejected="a"),
    ]  # fmt: skip
    write(folder / "odd.jsonl", odd)
    entry = {"data_augment": False, "repeat_time": 1, "length": 30}
    (folder / "meta.json").write_text(json.dumps({
        "charts": {"root": ".", "annotation": "charts.jsonl", **entry, "repeat_time": 3},
        "odd": {"root": ".", "annotation": "odd.jsonl", **entry, "max_dynamic_patch": 6},
    }))  # fmt: skip
    verdicts = [
        verdict(f"q{q}", s, "correct" if s < q else "wrong") for q in range(5) for s in range(4)
    ]
    verdicts += [verdict("q5", 0, "timeout", reason="2 s are over"),
                 verdict("q5", 1, "no_answer", finish_reason="length")]  # fmt: skip
    write(folder / "verdicts.jsonl", verdicts)
    return folder


class Page(HTMLParser):
    """A page's cards by name: attributes, text, and the text and attributes inside by tag."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cards: list[dict[str, Any]] = []
        self.said = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "article":
            self.cards.append({"attrs": given, "text": "", "tags": [], "inside": Counter()})
        if "article" in self.open:
            self.cards[-1]["tags"].append((tag, given))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.said += data
        if "article" in self.open:
            self.cards[-1]["text"] += data
            if self.open[-1] in ("ins", "del"):
                self.cards[-1].setdefault(self.open[-1], []).append(data)

    def card(self, name: str) -> dict[str, Any]:
        (found,) = [card for card in self.cards if card["text"].strip().startswith(name)]
        return found


def view(path: Path, output: Path, *options: object) -> Page:
    main(["view", str(path), "--output", str(output), *map(str, options)])
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return view(folder / "meta.json", folder / "page.html", "--tile-size", 56)


def test_a_pair_is_shown_with_its_picture_tiles_and_difference(page: Page) -> None:
    card = page.card("c3")
    assert card["attrs"]["data-set"] == "charts"
    assert json.loads(card["attrs"]["data-kinds"]) == ["correctness"]
    assert json.loads(card["attrs"]["data-only"]) == ["few"]
    assert card["ins"] == ["2", "2"] and card["del"] == ["3", "3"]
    for text in ("charts.jsonl:4", "How many bars of c3 are red?", "112 x 56 px, 2 x 1 tiles",
                 "The red bar is 2. Final Answer: 2", "characters 33 and 33 (equal)"):  # fmt: skip
        assert text in card["text"], text
    cuts = [attrs for tag, attrs in card["tags"] if tag == "i"]
    assert cuts == [{"class": "cut x", "style": "left: 50.00%"}]
    (image,) = [attrs for tag, attrs in card["tags"] if tag == "img"]
    assert str(image["src"]).startswith("data:image/png;base64,")
    assert json.loads(page.card("c25")["attrs"]["data-only"]) == ["longer"]


def test_pictures_of_every_sort(page: Page) -> None:
    # 6 tiles are the budget that meta.json names: 2 x 3 of 56 pixels fit 900 x 1350
    assert "900 x 1350 px, 2 x 3 tiles + thumbnail" in page.card("photo")["text"]
    # two pictures share it
    assert "900 x 1350 px, 1 x 2 tiles + thumbnail" in page.card("several")["text"]
    only = {name: json.loads(page.card(name)["attrs"]["data-only"])
            for name in ("missing", "broken", "outside", "text", "several", "video")}  # fmt: skip
    assert only == {
        "missing": ["few", "broken"], "broken": ["few", "broken"], "outside": ["few", "broken"],
        "text": ["few", "none"], "several": ["few", "several"], "video": ["few", "video"],
    }  # fmt: skip
    for name, reason in (
        ("missing", "nowhere.png: no such image"),
        ("broken", "broken.jpg: corrupt image"),
        ("outside", "outside its root"),
    ):
        card = page.card(name)
        assert "picture not shown" in card["text"] and reason in card["text"]
        assert "img" not in dict(card["tags"])
    assert page.card("video")["text"].count("40 x 30 px, 1 tile") == 3
    assert "pictured" not in str(page.card("text")["attrs"]["class"])


def test_chinese_differs_by_characters(page: Page) -> None:
    card = page.card("chinese")
    assert card["ins"] == ["三"] and card["del"] == ["五"]


def test_texts_are_shown_and_never_run(page: Page) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(scripts) == 1 and page.text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    (policy,) = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    card = page.card(HOSTILE)
    assert card["text"].count(HOSTILE) == 4  # name, data set, question, chosen
    assert card["attrs"]["data-set"] == HOSTILE
    assert json.loads(card["attrs"]["data-kinds"]) == ["<i>"]
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert not re.search(r"https?:|<link|@import|url\(", page.text)
    for _, attrs in page.tags:
        assert str(attrs.get("src", "data:image/")).startswith("data:image/")
    assert "\u202e" not in page.text  # it would turn the text around that follows
    assert "Yes U+202E2 :si tiU+202C" in page.card("override")["text"]


def test_the_numbers_at_the_top(page: Page) -> None:
    said = " ".join(page.said.split())
    assert "41 pairs in 3 data sets. 41 of 41 pairs shown." in said
    assert "1 bad row" in said
    assert "odd.jsonl:11: chosen and rejected are identical" in said
    for text in (
        "70.7% correctness", "24.4% format", "2.4% dropout", "2.4% <i>", "2.4% repeated",
        "repeat_time 3", "any kind", "at most 6 words differ",
    ):  # fmt: skip
        assert text in said, text
    titles = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert titles == ["Characters", "Characters, chosen less rejected", "Tiles a picture"]


def test_verdicts_are_grouped_by_question(folder: Path, tmp_path: Path) -> None:
    page = view(folder / "verdicts.jsonl", tmp_path / "v.html")
    assert len(page.cards) == 6
    card = page.card("q2")
    assert json.loads(card["attrs"]["data-kinds"]) == ["correct", "wrong"]
    assert json.loads(card["attrs"]["data-only"]) == ["mixed"]
    sides = [attrs["class"] for tag, attrs in card["tags"] if tag == "section"]
    assert sides == ["side good", "side good", "side bad", "side bad"]
    text = " ".join(card["text"].split())
    assert "right 2 of 4" in text and "model runs/sft" in text and "answer 3, three" in text
    assert "wrong extracted 3 matcher number format not followed" in text
    assert [json.loads(page.card(f"q{q}")["attrs"]["data-only"]) for q in (0, 4)] == [[], []]
    last = page.card("q5")
    assert json.loads(last["attrs"]["data-only"]) == ["reason", "cut-off"]
    assert "reason 2 s are over" in " ".join(last["text"].split())
    said = " ".join(page.said.split())
    # q0 .. q4 are right 0 .. 4 times of 4; q5's only judged completion has no answer
    assert "41.7% accuracy" in said and "45.5% correct" in said and "4.5% timeout" in said


def test_questions_and_rollouts_have_pages_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"id": "q", "question": "Which?", "answer": "B", "matcher": "choice"}
    rollout = {**question, "sample": 0, "completion": "", "finish_reason": "length"}
    page = view(write(tmp_path / "q.jsonl", [question]), tmp_path / "q.html")
    assert "Which?" in page.cards[0]["text"] and "any matcher" in page.said
    page = view(write(tmp_path / "r.jsonl", [rollout]), tmp_path / "r.html")
    assert "(empty)" in page.cards[0]["text"] and "any finish reason" in page.said
    assert "picture" not in capsys.readouterr().out
    view(write(tmp_path / "n.jsonl", [question | {"image": "nowhere.png"}]), tmp_path / "n.html")
    told = capsys.readouterr().out
    assert "nowhere.png: no such image); paths start at --image-root" in told
    table = [{**pair("p"), "image": {"bytes": encoded(5), "path": None}}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    assert "30 x 20 px" in view(tmp_path / "p.parquet", tmp_path / "p.html").cards[0]["text"]


def test_a_large_set_is_drawn_evenly_by_its_seed(folder: Path, tmp_path: Path) -> None:
    page = view(folder / "meta.json", tmp_path / "a.html", "--max-rows", 10)
    said = " ".join(page.said.split())
    assert "10 of 41 pairs shown, drawn evenly by data set and kind (seed 0)." in said
    sorts = Counter((card["attrs"]["data-set"], card["attrs"]["data-kinds"]) for card in page.cards)
    # of 21, 10, 8, 1 and 1
    assert sorted(sorts.values()) == [1, 1, 2, 3, 3]
    again = view(folder / "meta.json", tmp_path / "b.html", "--max-rows", 10)
    other = view(folder / "meta.json", tmp_path / "c.html", "--max-rows", 10, "--seed", 1)
    assert again.text == page.text
    assert [card["text"] for card in other.cards] != [card["text"] for card in page.cards]


def test_a_thumbnail_is_bounded(folder: Path) -> None:
    big = make_thumbnail(noise_image(3000, 2000, 1), max_tiles=12)
    assert (big.width, big.height, big.size, big.grid) == (512, 341, (3000, 2000), (3, 2))
    assert big.tiles == 7 and len(big.uri) < 100_000
    assert big.cuts == [("x", pytest.approx(100 / 3)), ("x", pytest.approx(200 / 3)), ("y", 50)]
    # every pixel of its own: shown coarser, then smaller, until it is small enough
    rich = Image.effect_noise((900, 450), 90).convert("RGB")
    small = make_thumbnail(rich, max_tiles=12, most_bytes=6000)
    assert len(small.uri) < 8100 and small.width in (128, 256) and small.size == (900, 450)
    assert small.grid == (2, 1)  # of the picture, whatever is shown of it
    frame = make_thumbnail(noise_image(40, 30, 1), max_tiles=None)
    assert (frame.tiles, frame.cuts, frame.tiling) == (1, [], "1 tile")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl", "--output", "p.html"], "nowhere.jsonl: no such file"),
        (["odd.jsonl", "--output", "odd.jsonl"], "is the input itself"),
        (["odd.jsonl", "--output", "p.html", "--max-rows", "0"], "max rows is 0"),
        (["talk.jsonl", "--output", "p.html"], "conversations; a page shows"),
        (["bad.jsonl", "--output", "p.html"], "none of its 1 records is a usable pair"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]
    write(folder / "talk.jsonl", [{"id": "t", "conversations": turns}])
    write(folder / "bad.jsonl", [{"chosen": 3}])
    with pytest.raises(SystemExit) as stopped:
        main(["view", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (folder / "p.html").exists()


# ---------------------------------------------------------------- in a browser


def dump_dom(page: Path, fragment: str, profile: Path) -> Page:
    """The page after its script has run, at the address page#fragment."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no Chromium on PATH (looked for {', '.join(names)})")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=3000",
            "--dump-dom", f"{page.as_uri()}#{fragment}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return Page(done.stdout)


def shown(page: Page) -> list[str]:
    """The names of the cards that are not hidden."""
    cards = [card for card in page.cards if "hidden" not in card["attrs"]]
    return [card["text"].split()[0] for card in cards]


def test_filters_from_the_address_work_in_chromium(
    page: Page, folder: Path, tmp_path: Path
) -> None:
    found = dump_dom(folder / "page.html", "set=charts&kind=format&search=C2", tmp_path)
    assert len(found.cards) == 41
    assert shown(found) == [f"c{number}" for number in range(20, 30)]
    assert "10 of 41" in found.said
    assert "js" in str(found.tags[0][1]["class"])  # which shows the form


DRIVE = """
const form = document.querySelector("form");
const said = [];
const seen = (what) => said.push([what, [...document.querySelectorAll("article:not([hidden])")].map(
  (card) => card.querySelector(".name").textContent).join(" "),
  document.querySelector("output").textContent, document.querySelector(".empty").hidden]);
const key = (name) =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const wait = (time) => new Promise((done) => setTimeout(done, time));
(async () => {
  for (const hash of HASHES) { location.hash = hash; await wait(50); seen(hash); }
  form.elements.kind.value = "dropout";
  form.elements.search.value = "override";
  form.dispatchEvent(new Event("input", {bubbles: true}));
  await wait(200);
  seen(location.hash);
  location.hash = "kind=format";
  await wait(50);
  for (const name of "jjjk") key(name);
  const dump = document.createElement("pre");
  dump.id = "said";
  dump.textContent = JSON.stringify(said);
  document.body.append(dump);
})();
"""


def test_search_links_and_keys_work_in_chromium(page: Page, tmp_path: Path) -> None:
    """A copy of the page whose policy lets a second script through, which plays the reader."""
    hashes = [
        "set=odd&search=WHICH%3F",
        "only=broken",
        "kind=format&search=c2 are",
        "kind=no",
        "c3",
    ]
    text = page.text.replace("script-src 'sha256-", "script-src 'unsafe-inline' 'none-")
    driven = tmp_path / "driven.html"
    script = DRIVE.replace("HASHES", json.dumps(hashes))
    driven.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    found = dump_dom(driven, "", tmp_path / "profile")
    said = json.loads(html.unescape(found.text.split('<pre id="said">')[1].split("</pre>")[0]))
    assert [line[:1] + line[2:] for line in said] == [
        [hashes[0], "1 of 41", True], [hashes[1], "3 of 41", True], [hashes[2], "0 of 41", False],
        [hashes[3], "0 of 41", False], [hashes[4], "41 of 41", True],
        ["#kind=dropout&search=override", "1 of 41", True],
    ]  # fmt: skip
    names = [line[1] for line in said]
    assert names[:2] == ["several", "missing broken outside"] and names[5] == "override"
    (current,) = [card for card in found.cards if "current" in str(card["attrs"]["class"])]
    assert current["text"].split()[0] == "c21"
