"""`internvl convert | merge | info | chat`, called as a user calls them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from published import make_published

from internvl.checkpoint import checksum, load_model
from internvl.cli import main
from sft.__main__ import main as train_sft


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL3 in the published layout."""
    folder = tmp_path_factory.mktemp("published") / "InternVL3-0B"
    make_published(folder, "qwen2")
    return folder


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    path = tmp_path / "chart.png"
    Image.new("RGB", (112, 56), (10, 200, 30)).save(path)
    return path


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("error: ").rstrip("\n")


def test_there_and_back(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(published), str(tmp_path / "hf"), "--to", "hf"])
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "chat"), "--to", "chat"])
    assert (tmp_path / "chat" / "config.json").read_bytes() == (
        published / "config.json"
    ).read_bytes()
    load_model(tmp_path / "hf")
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"{tmp_path}/hf: written in the hf layout",
        f"{tmp_path}/chat: written in the chat layout",
    ]
    again = fails(capsys, "convert", published, tmp_path / "hf", "--to", "hf")
    assert again == f"{tmp_path}/hf: is not empty; give a new folder, or remove it first"


def test_in_trained_and_out_again(
    published: Path, chart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a published checkpoint came with survives training; only the weights are others."""
    main(["convert", str(published), str(tmp_path / "hf"), "--to", "hf"])
    turns = [{"from": "human", "value": "How high?"}, {"from": "gpt", "value": "7"}]
    row = {"id": "a", "image": chart.name, "conversations": turns}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = {"model_name_or_path": "hf", "train_file": "rows.jsonl", "output_dir": "trained"}
    words |= {"max_steps": "1", "learning_rate": "0.1", "use_cpu": "true", "report_to": "none"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft", *(w for k, v in words.items() for w in (f"--{k}", v))])
    train_sft()
    main(["convert", "trained", "chat", "--to", "chat"])
    for file in published.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            assert (tmp_path / "chat" / file.name).read_bytes() == file.read_bytes()
    main(["convert", "chat", "again", "--to", "hf"])
    trained, again, before = (load_model(tmp_path / name) for name in ("trained", "again", "hf"))
    assert checksum(again.named_parameters()) == checksum(trained.named_parameters())
    assert checksum(before.named_parameters()) != checksum(trained.named_parameters())


def test_info_of_both_layouts(
    published: Path, tiny_model: Path, chart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers wherever they are written: from the weights' headers and config.json."""
    main(["info", str(published), "--image", str(chart), "--max-tiles", "6"])
    text = capsys.readouterr().out
    assert "InternVLChatModel" in text
    assert "qwen2, 2 layers of 128" in text
    assert "at most 6 tiles" in text
    # 112 x 56: two tiles and the thumbnail of 4 tokens each, <img> and </img>
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    costs = [row[-2:] for row in rows if row and row[0] == "112 x 56"]
    assert costs == [["2 x 1 + thumbnail", "14"]]
    assert text.count("2 x 1 + thumbnail") >= 2  # and the file's own row

    main(["info", str(tiny_model)])
    text = capsys.readouterr().out
    assert "HF-native (InternVLForConditionalGeneration)" in text
    assert f"{load_model(tiny_model).num_parameters() / 1000:.2f} k (F32 on disk)" in text


def test_chat(tiny_model: Path, chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One reply on stdout, what it cost on stderr; the placeholder is put in front by itself."""
    words = ["What is the sum of the green and red bars?", "--max-tokens", "5"]
    main(["chat", str(tiny_model), str(chart), *words])
    plain = capsys.readouterr()
    assert plain.out.count("\n") == 1
    assert plain.err == "5 tokens, cut at 5\n"
    main(["chat", str(tiny_model), str(chart), "<image>\n" + words[0], *words[1:]])
    assert capsys.readouterr() == plain
    frames = chart.parent / "frames"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (56, 56), (80 * number, 0, 0)).save(frames / f"{number}.png")
    main(["chat", str(tiny_model), str(frames), *words, "--num-frames", "3"])
    assert capsys.readouterr().err == "5 tokens, cut at 5\n"


def test_what_cannot_be_asked(
    published: Path, tiny_model: Path, chart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = chart.parent / "none.png"
    assert fails(capsys, "chat", tiny_model, none, "?") == f"{none}: no such image"
    assert fails(capsys, "chat", published, chart, "?").startswith(
        f"{published}: the published custom-code layout (InternVLChatModel); convert it first: "
    )
    assert fails(capsys, "info", chart.parent).startswith(f"{chart.parent}: no config.json there")
    assert "download it first" in fails(capsys, "info", "OpenGVLab/InternVL3-1B")
    assert fails(capsys, "info", tiny_model, "--max-tiles", 0) == "--max-tiles is 0; give 1 or more"
    mixed = fails(capsys, "chat", tiny_model, chart, "?", "--more-images", chart.parent)
    assert mixed.startswith(f"{chart.parent} is a video; it is asked about alone")
    two = fails(capsys, "chat", tiny_model, chart, "a <image>", "--more-images", chart)
    assert two.startswith("2 image(s) but 1 <image> placeholder(s)")


def test_merge(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that adds nothing gives the base back, bit for bit."""
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model\.layers\..*_proj"
    adapted = get_peft_model(load_model(tiny_model), LoraConfig(r=2, target_modules=targets))
    adapted.save_pretrained(tmp_path / "lora")
    words = ["merge", str(tmp_path / "lora"), str(tmp_path / "whole"), "--base", str(tiny_model)]
    main(words)
    assert capsys.readouterr().out == f"{tmp_path}/whole: base and adapter in one\n"
    asked = fails(capsys, "info", tmp_path / "lora")
    assert "it holds a LoRA adapter: `internvl merge` makes it whole" in asked
    whole, base = (load_model(folder) for folder in (tmp_path / "whole", tiny_model))
    assert checksum(whole.named_parameters()) == checksum(base.named_parameters())
