"""The cached reference: what its keys hold, what its files survive, and who shares them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain import noise_image
from trainer_cases import Recorded, make_trainer, pairs, train, write_images

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from mpo.config import MPOConfig
from mpo.reference import CachedReference, Reference
from mpo.reference_cache import ReferenceCache
from mpo.reference_keys import TEXTS, reference_settings, sample_digest, sample_digests
from mpo.trainer import MPOTrainer

ROWS = 7


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, ROWS)
    return pairs(folder, ROWS)


@pytest.fixture
def encoder(tiny_model: Path) -> Encoder:
    return Encoder(load_processor(str(tiny_model)), max_tiles=4)


# ---------------------------------------------------------------- keys


class Noted(dict[str, Any]):
    """A record that notes which fields are read."""

    def __init__(self, data: dict[str, Any]):
        super().__init__(data)
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def test_the_key_of_a_reference(rows: list[Row], encoder: Encoder, tmp_path: Path) -> None:
    """Every part of a sample is in its hash; its file, place and name are not."""
    row = rows[6]  # three tiles
    digest = sample_digest(row, encoder)
    for name in TEXTS:
        data = {**row.data, name: [{"from": "human", "value": "other"}]}
        assert sample_digest(replace(row, data=data), encoder) != digest, name
    assert sample_digest(replace(row, max_tiles=3), encoder) != digest
    assert sample_digest(row, replace(encoder, max_tiles=3)) != digest
    assert sample_digest(replace(row, max_tiles=4), encoder) == digest  # the default, named
    draws = [
        sample_digest(row, replace(encoder, position_steps=steps, seed=seed))
        for steps, seed in [((0.5,), 0), ((0.25,), 0), ((0.5, 0.25), 0), ((0.5, 0.25), 1)]
    ]
    assert len({digest, *draws}) == 5
    assert sample_digest(row, replace(encoder, seed=1)) == digest  # nothing is drawn
    without = rows[4]  # no image: no tiles, no draw
    other = replace(encoder, max_tiles=3, position_steps=(0.5, 0.25))
    assert sample_digest(without, other) == sample_digest(without, encoder)

    noise_image(112, 56, 60).save(tmp_path / "moved.png")  # the same bytes
    moved = replace(row, data={**row.data, "image": ["moved.png"]}, image_root=tmp_path)
    moved = replace(moved, file=tmp_path / "other.jsonl", line=99)
    assert sample_digest(moved, encoder) == digest
    in_memory = {**row.data, "image": [(tmp_path / "moved.png").read_bytes()], "id": "other"}
    assert sample_digest(replace(row, data=in_memory), encoder) == digest
    noise_image(112, 56, 999).save(tmp_path / "moved.png")
    assert sample_digest(moved, encoder) != digest

    noted = Noted({**row.data, "history": [], "system": "Be brief."})
    encoder.pair(replace(row, data=noted))
    read = noted.read - {"image", "images", "video", "num_frames", "max_tiles"}
    assert read <= set(TEXTS), "the encoding reads a field that is not in the key"


def test_two_images_are_told_in_their_order(rows: list[Row], encoder: Encoder) -> None:
    row = rows[3]
    other = replace(row, data={**row.data, "image": row.data["image"][::-1]})
    assert sample_digest(row, encoder) != sample_digest(other, encoder)


def test_ranks_share_the_hashing(
    rows: list[Row], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.reference_keys._ROWS_AT_ONCE", 2)
    wanted = b"".join(sample_digest(row, encoder) for row in rows)
    for number in (1, 2, 3, 5):
        shares = [
            sample_digests(rows, encoder, rank=rank, world_size=number, quiet=True)
            for rank in range(number)
        ]
        assert (
            sum(share.view(np.uint8).astype(int) for share in shares).astype(np.uint8).tobytes()
            == wanted
        )


def test_the_models_side_of_the_key(tiny_model: Path, encoder: Encoder) -> None:
    def settings(model: Any, **options: Any) -> str:
        options = {"mixed_precision": "no", "tf32": False, **options}
        return json.dumps(reference_settings(model, options.pop("encoder", encoder), **options))

    def processor(change: Callable[[Any], None]) -> Encoder:
        own = load_processor(str(tiny_model))
        change(own)
        return replace(encoder, processor=own)

    def longer(own: Any) -> None:
        own.image_seq_length = 8

    def white(own: Any) -> None:
        own.image_processor.image_mean = [1.0, 1.0, 1.0]

    def template(own: Any) -> None:
        own.chat_template += " "

    def tokens(own: Any) -> None:
        own.tokenizer.add_tokens(["another"])

    model = load_model(tiny_model)
    known = {settings(model)}
    encoder.processor.tokenizer(["a", "b c"], padding=True)  # type: ignore[operator]
    assert known == {settings(load_model(tiny_model))}
    found = [
        settings(model, mixed_precision="bf16"),
        settings(model, tf32=True),
        settings(load_model(tiny_model, dtype="bfloat16")),
        *(settings(model, encoder=processor(c)) for c in (longer, white, template, tokens)),
    ]
    adapted = get_peft_model(
        load_model(tiny_model),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]),
    )
    assert settings(adapted) in known  # a new adapter adds nothing
    layer: Any = adapted.get_base_model().model.language_model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(0.5)
    found.append(settings(adapted))
    layer.scaling["default"] *= 2
    found.append(settings(adapted))
    layer.lora_B["default"].weight.data.zero_()
    whole: Any = adapted.get_base_model().model.multi_modal_projector
    whole.modules_to_save["default"].linear_1.bias.data += 1
    found.append(settings(adapted))
    model.config.text_config.rms_norm_eps = 1e-5
    found.append(settings(model))
    model.config.text_config.rms_norm_eps = 1e-6
    assert settings(model) in known
    model.lm_head.weight.data[0, 0] += 1
    found.append(settings(model))
    assert len({*known, *found}) == len(found) + 1


# ---------------------------------------------------------------- files


def digests(*names: str) -> Any:
    return np.array([name.encode().ljust(32, b"x") for name in names], "S32")


def test_what_was_written_is_found(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, {"weights": "a"})
    assert np.isnan(cache.find(digests("1"))).all()
    cache.add(digests("2", "1"), np.array([[-2.0, -2.5], [-1 / 3, -1e300]]))
    later = ReferenceCache(tmp_path, {"weights": "a"})
    later.add(digests("3", "1"), np.array([[-3.0, 0.0], [-7.0, -7.0]]))  # 1 was there before
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "settings.json").read_text()) == {"weights": "a"}
    found = cache.find(digests("1", "3", "9", "2"))
    assert found[[0, 1, 3]].tolist() == [[-1 / 3, -1e300], [-3.0, 0.0], [-2.0, -2.5]]
    assert np.isnan(found[2]).all()
    assert ReferenceCache(tmp_path, {"weights": "a"}).differences() is None
    other = ReferenceCache(tmp_path, {"weights": "b"})
    assert other.differences() == f"{folder.name}: another weights"
    assert np.isnan(other.find(digests("1"))).all()


def test_a_torn_end_is_passed_over_and_damage_is_told(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, {})
    cache.add(digests("1"), np.array([[-1.0, -1.0]]))
    (file,) = cache.folder.glob("*.logps")
    one = file.stat().st_size
    cache.add(digests("2"), np.array([[-2.0, -2.0]]))
    whole = file.read_bytes()
    for end in range(one, len(whole)):
        file.write_bytes(whole[:end])
        assert np.isnan(cache.find(digests("1", "2"))).tolist() == [[False] * 2, [True] * 2]
    for place in range(0, len(whole), 7):
        byte = bytes([whole[place] ^ 1])
        file.write_bytes(whole[:place] + byte + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{file}: damaged at byte (0|{one}), .*delete it"):
            cache.find(digests("1"))
    # a file of another reference, put here by hand
    file.write_bytes(whole)
    other = ReferenceCache(tmp_path, {"weights": "other"})
    other.folder.mkdir()
    file.rename(other.folder / file.name)
    with pytest.raises(UserError, match=r"damaged at byte 0, or of another reference"):
        other.find(digests("1"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ReferenceCache(tmp_path / "file", {})
    with pytest.raises(UserError, match=r"/file.*: Not a directory \(see reference_cache_dir\)"):
        cache.add(digests("1"), np.zeros((1, 2)))


# ---------------------------------------------------------------- the pass


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of every micro-batch that a reference scores."""
    sizes: list[int] = []
    score = CachedReference._score

    def noted(self: Any, model: Any, batch: Any) -> torch.Tensor:
        sizes.append(len(batch.example_index))
        return score(self, model, batch)

    monkeypatch.setattr(CachedReference, "_score", noted)
    return sizes


Open = Callable[..., dict[str, tuple[float, float]]]


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> Open:
    """Open a run on pairs; the reference's log-probabilities by the rows' ids."""

    def get(rows: list[Row], name: str = "run", **options: Any) -> dict[str, tuple[float, float]]:
        options = {"precompute_ref_batch_size": 2, "eval_rows": 0, **options}
        options.setdefault("reference_cache_dir", str(tmp_path / "shared"))
        trainer = make_trainer("mpo", tiny_model, tmp_path / name, rows, Recorded(), **options)
        return {
            pair.row.data["id"]: (pair.ref_chosen_logps, pair.ref_rejected_logps)
            for pair in trainer.train_dataset
        }

    return get


def test_runs_share_what_is_known(
    rows: list[Row], values: Open, scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Other rates, orders, repeats and more rows: a sample is scored once."""
    first = values(rows[:5])
    assert sum(scored) == 5
    scored.clear()
    assert values(rows[4::-1], "sweep", learning_rate=0.5, beta=0.5, seed=9) == first
    assert values([*rows[:5], *rows[:3]], "repeated") == first
    assert not scored
    assert "reference" not in capsys.readouterr().out
    grown = values(rows, "grown")
    assert sum(scored) == 2
    assert {name: grown[name] for name in first} == first
    assert "reference: 2 of 7 train samples are not in " in capsys.readouterr().out
    values(rows[:2], "other", bf16=True)  # another arithmetic: nothing of it is taken
    assert sum(scored) == 4
    assert "another mixed_precision" in capsys.readouterr().out


def test_a_pass_that_was_killed_goes_on(
    rows: list[Row],
    values: Open,
    scored: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most the chunk in hand is lost, and the numbers are the unbroken pass's to the bit."""
    whole = values(rows, "whole", reference_cache_dir=str(tmp_path / "whole-cache"))
    scored.clear()
    add = ReferenceCache.add

    def killed(self: ReferenceCache, *args: Any) -> None:
        if sum(scored) > 4:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReferenceCache, "add", killed)
        values(rows)
    scored.clear()
    assert values(rows) == whole
    assert sum(scored) == ROWS - 4


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_score_every_pair_once(
    workers: int, rows: list[Row], values: Open, scored: list[int]
) -> None:
    found = values(rows, dataloader_num_workers=workers, max_tokens_per_microbatch=120)
    assert list(found) == [str(number) for number in range(ROWS)]
    assert sum(scored) == ROWS
    assert len({value for both in found.values() for value in both}) == 2 * ROWS


def test_a_loss_that_needs_no_reference_makes_no_pass(
    rows: list[Row], tiny_model: Path, scored: list[int], tmp_path: Path
) -> None:
    run = train("mpo", tiny_model, tmp_path, rows, loss_type=["orpo", "sft"], max_steps=1)
    assert type(run.trainer.reference) is Reference
    assert not scored and not (tmp_path / "reference").exists()
    with pytest.raises(UserError, match=r"is False, but loss_type .* reads no reference"):
        options = {"loss_type": ["orpo"], "precompute_ref_log_probs": False}
        make_trainer("mpo", tiny_model, tmp_path, rows, Recorded(), **options)


def test_another_reference_is_refused(rows: list[Row], tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    config = MPOConfig(output_dir=str(tmp_path), train_file="x", use_cpu=True, report_to="none")
    with pytest.raises(UserError, match="the reference is the model that training starts from"):
        MPOTrainer(model, config, rows, load_processor(str(tiny_model)), ref_model=model)


def test_a_reference_that_gives_no_number_is_refused(
    rows: list[Row], values: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = torch.full((4,), torch.nan)
    monkeypatch.setattr(CachedReference, "_score", lambda *args: nan)
    with pytest.raises(UserError, match=r"rows.jsonl:0: the reference gives \[nan, nan\]"):
        values(rows[:2])
