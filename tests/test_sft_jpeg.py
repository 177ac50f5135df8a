"""Random JPEG compression of training images: whose, how strong, and the same for all who look."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import Recorded, conversations, make_trainer, pairs, train, write_images

from internvl.augmentation import JpegAugmentation, recompress
from internvl.chat import cut_tiles, load_processor
from internvl.data import Quarantine, Row, read_rows
from internvl.encoding import Encoder
from internvl.errors import DataError, UserError
from mpo.reference_keys import sample_digest
from training.stage import refuse_unaugmented

STRONG = JpegAugmentation((5, 20), unless_said=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 4)
    return folder


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


def test_a_picture_is_what_its_jpeg_shows(images: Path) -> None:
    picture = Image.open(images / "2-0.png").convert("RGB")
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=30)
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue())))
    again = recompress(picture, 30)
    assert np.array_equal(np.asarray(again), expected) and again.mode == "RGB"
    assert not np.array_equal(expected, np.asarray(picture))


def test_qualities_are_drawn_by_text_image_seed_and_epoch() -> None:
    augmentation = JpegAugmentation()

    def draw(key: str, seed: int = 0, epoch: int = 0) -> list[int]:
        return JpegAugmentation(epoch=epoch).draw(4, key=key, seed=seed)

    # a change here would change the input of every run that is gone on with
    assert draw("a") == [76, 90, 88, 82] == augmentation.draw(4, key="a", seed=0)
    assert len({tuple(d) for d in (draw("a"), draw("b"), draw("a", 1), draw("a", 0, 1))}) == 4
    counts = Counter(quality for key in range(2000) for quality in draw(str(key)))
    assert set(counts) == set(range(75, 101))
    assert all(abs(n - 8000 / 26) < 5 * (8000 / 26) ** 0.5 for n in counts.values())


def test_images_are_compressed_whole_and_ids_stay(processor: Any, images: Path) -> None:
    plain = Encoder(processor, 4, seed=3)
    encoder = Encoder(processor, 4, seed=3, augmentation=STRONG)
    row = conversations(images, 4)[3]  # two images
    before, after = plain.conversation(row), encoder.conversation(row)
    texts = json.dumps([None] * 4 + [row.data["conversations"]])
    drawn = STRONG.draw(2, key=texts, seed=3)
    compressed = [recompress(i, q) for i, q in zip(row.load_images(), drawn, strict=True)]
    assert torch.equal(after.tiles, cut_tiles(processor, compressed, 4)[0])
    assert not torch.equal(after.tiles, before.tiles)
    assert after.prompt_ids == before.prompt_ids and after.completions == before.completions
    pair = pairs(images, 4)[3]
    assert not torch.equal(encoder.pair(pair).tiles, plain.pair(pair).tiles)
    # a question, which an engine answers, is shown as it is
    asked = encoder.completions(pair, [[1]])
    assert torch.equal(asked.tiles, plain.completions(pair, [[1]]).tiles)


def test_frames_of_a_video_are_left_alone(processor: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "film").mkdir()
    for number in range(2):
        Image.open(images / f"{1 + number}-0.png").save(tmp_path / "film" / f"{number}.png")
    said = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "5"}]
    data = {"id": "0", "video": "film", "num_frames": 2, "conversations": said}
    row = Row(data, tmp_path / "rows.jsonl", 1, tmp_path, augment=True)
    encoder = Encoder(processor, 4, augmentation=STRONG)
    assert not encoder.augments(row)
    assert torch.equal(
        encoder.conversation(row).tiles, Encoder(processor, 4).conversation(row).tiles
    )


def meta(folder: Path, images: Path, said: dict[str, Any], kind: str = "conversation") -> Path:
    """A meta.json of one data set an entry of `said`; None leaves data_augment out."""
    entries = {}
    for name, value in said.items():
        row = (conversations if kind == "conversation" else pairs)(images, 2)[1]
        (folder / f"{name}.jsonl").write_text(json.dumps(row.data) + "\n")
        entry = {"root": str(images), "annotation": f"{name}.jsonl"}
        entries[name] = entry if value is None else {**entry, "data_augment": value}
    path = folder / "meta.json"
    path.write_text(json.dumps(entries))
    return path


def rows_of(path: Path, kind: Any = "conversation") -> Any:
    return read_rows(path, kind=kind, quarantine=Quarantine(None, 0.5), quiet=True)


def test_a_data_set_says_so_for_itself(processor: Any, images: Path, tmp_path: Path) -> None:
    rows = rows_of(meta(tmp_path, images, {"on": True, "off": False, "silent": None}))
    assert [row.augment for row in rows] == [True, False, None]
    published = Encoder(processor, augmentation=JpegAugmentation())
    asked = Encoder(processor, augmentation=JpegAugmentation((80, 90), unless_said=True))
    assert [published.augments(row) for row in rows] == [True, False, False]
    assert [asked.augments(row) for row in rows] == [True, False, True]
    assert not any(Encoder(processor).augments(row) for row in rows)  # evaluation, sampling
    other = rows_of(meta(tmp_path, images, {"on": False, "off": False, "silent": None}))
    assert other.fingerprint() != rows.fingerprint()


def test_what_meta_json_cannot_say(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data_augment is 'yes'; give true or false"):
        rows_of(meta(tmp_path, images, {"a": "yes"}))
    with pytest.raises(DataError, match="data_augment is true, but what is sampled"):
        rows_of(meta(tmp_path, images, {"a": True}), "question")


def test_an_option_that_would_touch_no_row_is_refused(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(
        *("sft", tiny_model, tmp_path, conversations(images, 2), Recorded()),
        jpeg_quality=[75, 100],
    )
    off = rows_of(meta(tmp_path, images, {"a": False, "b": False}))
    with pytest.raises(UserError, match="says data_augment: false of all its data sets"):
        refuse_unaugmented(trainer.args, "meta.json", off)
    refuse_unaugmented(
        trainer.args, "meta.json", rows_of(meta(tmp_path, images, {"a": False, "b": None}))
    )


def test_the_reference_cache_knows_the_draw(processor: Any, images: Path) -> None:
    row = pairs(images, 4)[3]
    text_only = pairs(images, 4)[0]

    def digest(row: Row, quality: tuple[int, int] | None, seed: int = 0) -> bytes:
        augmentation = None if quality is None else JpegAugmentation(quality, unless_said=True)
        return sample_digest(row, Encoder(processor, seed=seed, augmentation=augmentation))

    different = [digest(row, None), digest(row, (75, 100)), digest(row, (75, 99))]
    assert len({*different, digest(row, (75, 100), seed=1)}) == 4
    assert digest(row, None, seed=1) == digest(row, None)
    assert digest(text_only, (75, 100)) == digest(text_only, None)


def test_policy_and_reference_see_one_picture(
    tiny_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first loss is that of policy = reference; evaluation is of the pictures as they are."""
    rows = pairs(images, 4)
    options: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4}
    run, plain = (
        train("mpo", tiny_model, tmp_path / str(name), rows, jpeg_quality=name, **options)
        for name in ([5, 20], None)
    )
    nll = run.logs[0]["loss/sft"]
    assert run.losses[0] == pytest.approx(1.2 * 0.6931471805599453 + nll, rel=1e-6)
    assert nll != plain.logs[0]["loss/sft"]
    assert "WARNING" not in capsys.readouterr().out
    ref = [[pair.ref_chosen_logps for pair in r.trainer.eval_dataset] for r in (run, plain)]
    assert ref[0] == ref[1]


def test_sft_draws_anew_in_each_epoch_and_evaluates_as_it_is(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    rows = conversations(images, 2)[1:]
    options: dict[str, Any] = {"learning_rate": 0.0, "num_train_epochs": 3}
    run, plain = (
        train("sft", tiny_model, tmp_path / str(name), rows, jpeg_quality=name, **options)
        for name in ([5, 60], None)
    )
    assert len(set(run.losses)) == 3  # nothing was learned: the pictures differ
    assert len(set(plain.losses)) == 1 and plain.losses[0] not in run.losses
    assert run.evaluation["eval_loss"] == plain.evaluation["eval_loss"]
