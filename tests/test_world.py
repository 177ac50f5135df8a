"""The demo world and the tiny model: right answers, no shared images, the same per seed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cascade.world
from cascade.tiny import make_tiny_model, make_tokenizer
from cascade.world import (
    CARELESS_ERROR,
    CARELESS_SHARE,
    COLOURS,
    PLACE,
    SIDE,
    SPLITS,
    UNIT,
    WIDE_PLACES,
    WIDE_SHARE,
    Chart,
    WorldOptions,
    WorldSizes,
    careful_text,
    careless_text,
    example_texts,
    make_chart,
    make_world,
    question_text,
)
from internvl.chat import (
    encode_prompt,
    eos_token_id,
    forbidden_token_ids,
    load_processor,
    normalize_tiles,
)
from internvl.data import Quarantine, check_images, read_rows
from internvl.errors import UserError
from internvl.sampler import SampleRequest
from rewards import verify

SMALL = WorldSizes(sft=6, mixed=6, probe=3, preference=4, rl=5, heldout=4)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the marker (it holds a duration)."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "world.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_bars(image: Image.Image) -> dict[str, tuple[int, int, int]]:
    """(first column, last column, height in units) of each bar, from left to right."""
    pixels = np.asarray(image, dtype=float)
    palette = np.array(list(COLOURS.values()), dtype=float)
    distance = np.abs(pixels[:, :, None] - palette).sum(-1)
    nearest, near = distance.argmin(-1), distance.min(-1) < 100
    bars = {}
    for index, colour in enumerate(COLOURS):
        columns = ((nearest == index) & near).sum(0)
        (inside,) = np.nonzero(columns >= UNIT - 1)
        bars[colour] = int(inside[0]), int(inside[-1]), round(columns.max() / UNIT)
    return dict(sorted(bars.items(), key=lambda item: item[1]))


def test_charts_show_what_their_records_say() -> None:
    sizes = []
    for index in range(100):
        chart, image, record = make_chart(3, "heldout", index)
        bars = read_bars(image)
        assert [(colour, height) for colour, (_, _, height) in bars.items()] == list(
            chart.heights.items()
        )
        # each within its place, so no cut between two tiles goes through a bar
        for place, (left, right, _) in zip(chart.places, bars.values(), strict=True):
            assert place * PLACE <= left < right < (place + 1) * PLACE
        sizes.append(image.size)
        a, b = chart.operands
        assert chart.result == (a + b if chart.operation == "sum" else a - b)
        assert record["answer"] == str(chart.result)
        assert record["question"].startswith("<image>\nWhat is the ")
        verdict = verify(record["solution"], record["answer"], matcher=record["matcher"])
        assert verdict.outcome == "correct" and verdict.format_ok
    assert set(sizes) == {(SIDE, SIDE), (WIDE_PLACES * PLACE, SIDE)} == {(56, 56), (112, 56)}
    assert abs(sizes.count((112, 56)) - 100 * WIDE_SHARE) < 20  # 4 standard deviations


def test_either_tile_of_a_wide_chart_may_hold_any_number_of_bars() -> None:
    charts = [make_chart(0, "rl", index)[0] for index in range(600)]
    left = {sum(place < 4 for place in c.places) for c in charts if c.slots == WIDE_PLACES}
    assert left == {0, 1, 2, 3, 4}
    assert all(c.places == (0, 1, 2, 3) for c in charts if c.slots == len(COLOURS))


def test_texts() -> None:
    chart = Chart({"blue": 2, "red": 7, "yellow": 4, "green": 9}, "difference", "blue", "red")
    assert question_text("difference", "blue", "red") == "What is the blue bar minus the red bar?"
    assert question_text("sum", "green", "red") == "What is the sum of the green and red bars?"
    assert careful_text(chart) == ("I read blue 2 and red 7. 2 - 7 = -5. Final Answer: -5")
    assert careless_text(9) == "It looks clear from the chart. Final Answer: 9"


def test_sums_and_differences_are_equally_common_and_answers_are_spread() -> None:
    charts = [make_chart(0, "rl", index)[0] for index in range(600)]
    differences = sum(chart.operation == "difference" for chart in charts)
    assert 240 < differences < 360
    results = [chart.result for chart in charts]
    assert min(results) < -5 and max(results) > 15
    most_common = max(results.count(value) for value in set(results))
    assert most_common / len(results) < 0.15  # what a constant answer would score


def test_mixed_answers_are_careless_as_often_as_said() -> None:
    errors = []
    for index in range(500):
        chart, _, record = make_chart(0, "mixed", index)
        completion = record["conversations"][1]["value"]
        value = int(re.findall(r"-?\d+", completion)[-1])
        if completion == careless_text(value):
            errors.append(value - chart.result)
        else:
            assert completion == careful_text(chart)
    assert abs(len(errors) - 500 * CARELESS_SHARE) < 40  # 4 standard deviations
    assert set(errors) == set(range(-CARELESS_ERROR, CARELESS_ERROR + 1))


def test_a_question_may_go_on_to_more_bars() -> None:
    more = (("sum", "green"), ("difference", "yellow"))
    heights = {"blue": 2, "red": 7, "yellow": 4, "green": 9}
    chart = Chart(heights, "difference", "blue", "red", more=more)
    assert question_text("difference", "blue", "red", more) == (
        "What is the blue bar minus the red bar plus the green bar minus the yellow bar?"
    )
    assert careful_text(chart) == (
        "I read blue 2, red 7, green 9 and yellow 4. "
        "2 - 7 = -5. -5 + 9 = 4. 4 - 4 = 0. Final Answer: 0"
    )
    options = WorldOptions(operands=4, careless_error=5)
    tokenizer = make_tokenizer(example_texts(options))
    signs = []
    for index in range(200):
        chart, image, record = make_chart(0, "rl", index, options)
        bars = list(chart.heights.values())
        assert [height for _, _, height in read_bars(image).values()] == bars
        total = chart.heights[chart.first]
        for how, colour in chart.asked:
            total += chart.heights[colour] if how == "sum" else -chart.heights[colour]
            signs.append(how)
        assert record["answer"] == str(total) and len(chart.asked) == 3
        assert verify(record["solution"], record["answer"], matcher="number").outcome == "correct"
        question = record["question"].removeprefix("<image>\n")
        for text in (question, record["solution"], careless_text(total - 5)):
            words = re.sub(r"[,.:?]", r" \g<0>", text).split()
            assert len(tokenizer(text)["input_ids"]) == len(words)
    assert abs(signs.count("sum") - 300) < 50  # 4 standard deviations


def test_the_options_are_honoured() -> None:
    options = WorldOptions(difference_share=1.0, careless_share=1.0, careless_error=8)
    errors = set()
    for index in range(300):
        chart, _, record = make_chart(0, "mixed", index, options)
        assert chart.operation == "difference"
        completion = record["conversations"][1]["value"]
        value = int(completion.rpartition(" ")[2])
        assert completion == careless_text(value)
        errors.add(value - chart.result)
    assert errors == set(range(-8, 9))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"operands": 5}, "operands is 5; a question has 2 to 4"),
        ({"operands": 1}, "operands is 1; a question has 2 to 4"),
        ({"difference_share": 1.5}, "difference_share is 1.5; a share lies in [0, 1]"),
        ({"careless_share": -0.1}, "careless_share is -0.1; a share lies in [0, 1]"),
        ({"careless_error": -1}, "careless_error is -1; it must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        WorldOptions(**options)
    assert str(error.value) == said


def test_todays_world_is_the_same_to_the_byte() -> None:
    """Recipes and published numbers stand on it; new options must leave it as it is."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(20):
            _, image, record = make_chart(3, split, index)
            digest.update(image.tobytes() + json.dumps(record).encode())
    digest.update("".join(example_texts()).encode())
    assert digest.hexdigest() == "83c9b9a90493b317bca2e77c2e0d46870b83ff6f9485fa6d24afe6f8cb5a4159"


def test_splits_share_no_image(tiny_world: Path) -> None:
    seen: dict[bytes, Path] = {}
    for path in sorted((tiny_world / "images").rglob("*.png")):
        pixels = Image.open(path).tobytes()
        assert pixels not in seen, f"{path} shows the same as {seen[pixels]}"
        seen[pixels] = path
    assert len(seen) == sum(json.loads((tiny_world / "world.json").read_text())["sizes"].values())


def test_every_split_reads_back_clean(tiny_world: Path) -> None:
    quarantine = Quarantine(None)
    for split, kind in SPLITS.items():
        rows = read_rows(
            tiny_world / f"{split}.jsonl",
            quarantine=quarantine,
            kind="question" if kind == "question" else "conversation",
        )
        assert check_images(rows, quarantine=quarantine) == rows
        assert [row.data["id"] for row in rows] == [f"{split}-{i:05d}" for i in range(len(rows))]
        if kind == "careful":
            assert all("I read " in row.data["conversations"][1]["value"] for row in rows)
    assert quarantine.count == 0


def test_same_seed_same_bytes_in_one_process_or_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world(tmp_path / "one", seed=5, sizes=SMALL)
    monkeypatch.setattr(cascade.world, "CHUNK", 2)  # more than four chunks: a pool does them
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    make_world(tmp_path / "two", seed=5, sizes=SMALL)
    make_world(tmp_path / "other", seed=6, sizes=SMALL)
    one = contents(tmp_path / "one")
    assert len(one) == sum(asdict(SMALL).values()) + len(SPLITS)
    assert one == contents(tmp_path / "two")
    assert one.keys() == contents(tmp_path / "other").keys()
    other = contents(tmp_path / "other")
    assert not [name for name in one if name.endswith(".png") and one[name] == other[name]]


def test_a_finished_world_is_left_alone_and_a_broken_off_one_is_made_again(tmp_path: Path) -> None:
    make_world(tmp_path, seed=5, sizes=SMALL)
    before = contents(tmp_path)
    (tmp_path / "rl.jsonl").unlink()
    make_world(tmp_path, seed=5, sizes=SMALL)
    assert not (tmp_path / "rl.jsonl").exists()  # the marker says that it is finished
    (tmp_path / "world.json").unlink()  # so it was killed before it was finished
    make_world(tmp_path, seed=5, sizes=SMALL)
    assert contents(tmp_path) == before
    make_world(tmp_path, seed=6, sizes=SMALL)
    assert contents(tmp_path) != before
    marker = json.loads((tmp_path / "world.json").read_text())
    assert marker["seed"] == 6
    after = contents(tmp_path)
    (tmp_path / "world.json").write_text(json.dumps({**marker, "version": 1}))
    (tmp_path / "rl.jsonl").unlink()
    make_world(tmp_path, seed=6, sizes=SMALL)  # an older world is not taken for today's
    assert contents(tmp_path) == after
    del marker["options"]  # of a time when there were none: it is today's default
    (tmp_path / "world.json").write_text(json.dumps(marker))
    (tmp_path / "rl.jsonl").unlink()
    make_world(tmp_path, seed=6, sizes=SMALL)
    assert not (tmp_path / "rl.jsonl").exists()
    make_world(tmp_path, seed=6, sizes=SMALL, options=WorldOptions(operands=3))
    assert contents(tmp_path) != after


def test_every_word_and_number_of_the_world_is_one_token() -> None:
    tokenizer = make_tokenizer(example_texts())
    assert 300 < len(tokenizer) < 400
    for index in range(200):
        chart, _, _ = make_chart(1, "rl", index)
        for text in (careful_text(chart), careless_text(chart.result - CARELESS_ERROR)):
            ids = tokenizer(text)["input_ids"]
            pieces = [tokenizer.decode([token]) for token in ids]
            words = [piece for piece in pieces if piece not in (".", ":")]
            assert words[1:] == [
                f" {word}" for word in text.replace(".", "").replace(":", "").split()[1:]
            ]
            assert tokenizer.decode(ids) == text
    assert len(tokenizer(careful_text(chart))["input_ids"]) == 18


@pytest.mark.parametrize(
    "text", ["3.5 - -12 = 15.5?\n\n  \t{x_1}", "\u56fe\u4e2d na\u00efve", " a"]
)
def test_any_text_comes_back_unchanged(text: str) -> None:
    tokenizer = make_tokenizer(example_texts())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def picture(width: int) -> Image.Image:
    """The first chart of this width."""
    charts = (make_chart(0, "rl", index)[1] for index in range(20))
    return next(image for image in charts if image.width == width)


@pytest.mark.parametrize(("width", "tiles"), [(56, 1), (112, 3)])
@pytest.mark.parametrize("max_tiles", [2, 4, 12])
def test_a_wide_chart_is_two_tiles_and_a_thumbnail_for_the_trainer(
    tiny_model: Path, width: int, tiles: int, max_tiles: int
) -> None:
    """Four image tokens a tile; the recipe's budget of 2 allows all that a larger one would."""
    processor = load_processor(str(tiny_model))
    image = picture(width)
    prompt = encode_prompt(processor, "<image>\nHow many?", [image], max_tiles)
    assert prompt.tiles.shape == (tiles, 3, SIDE, SIDE)
    assert prompt.ids.count(processor.image_token_id) == 4 * tiles
    pixels = np.asarray(image).transpose(2, 0, 1)
    for index in range(tiles - 1 or 1):  # nothing is resized but the thumbnail
        cut = pixels[:, :, index * SIDE : (index + 1) * SIDE]
        assert np.array_equal(prompt.tiles[index].numpy(), cut)
    if max_tiles == 2:
        assert len(encode_prompt(processor, "<image>\nHow many?", [image], 1).tiles) == 1


@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize(("width", "tokens"), [(56, 4), (112, 12)])
def test_a_wide_chart_is_the_same_tokens_and_pixels_for_the_engine(
    vllm_sampler: Any, tiny_model: Path, width: int, tokens: int
) -> None:
    import torch

    processor = load_processor(str(tiny_model))
    request = SampleRequest("<image>\nHow many?", (picture(width),), seed=0)
    ids, pixels = vllm_sampler.engine_inputs(request, 2)
    prompt = encode_prompt(processor, request.question, request.images, 2)
    assert ids == prompt.ids and ids.count(processor.image_token_id) == tokens
    assert torch.equal(pixels, normalize_tiles(processor, prompt.tiles))


def test_tiny_model_is_loaded_by_the_auto_classes_and_answers_a_chat(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    processor = load_processor(str(tiny_model))
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    image = picture(56)
    asked = question_text("sum", "green", "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": asked}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert processor.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 4}</img>\n{asked}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert inputs["input_ids"].shape == (1, 26)
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert 26 < out.shape[1] <= 30
    assert model.generation_config.eos_token_id == eos_token_id(processor)
    assert len(forbidden_token_ids(processor, len(processor.tokenizer))) == 4

    assert 600_000 < sum(weight.numel() for weight in model.parameters()) < 700_000
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    spread = model.model.vision_tower.embeddings.position_embeddings.std().item()
    assert spread == pytest.approx(0.3, abs=0.03)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.05, abs=0.003), name


def test_tiny_model_is_the_same_per_seed(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    state = torch.get_rng_state()
    make_tiny_model(tmp_path / "same", seed=0)
    make_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert contents(tmp_path / "same") == contents(tiny_model)
    weights = "model.safetensors"
    assert contents(tmp_path / "other")[weights] != contents(tiny_model)[weights]


def test_an_image_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 28, not 60"):
        make_tiny_model(tmp_path, seed=0, image_size=60)
