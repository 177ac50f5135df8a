"""The reference of MPO: its key says what it depends on, and ranks and workers change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import noise_image
from trainer_cases import pairs, write_images

from internvl.data import Row
from internvl.data.checks import Ranks
from internvl.packing import Example, PackedBatch
from mpo import reference
from mpo.reference import compute_reference, reference_key
from training.batches import StepCollator


def key(rows: Sequence[Row], number: int = 1) -> str:
    """The key as each of `number` ranks finds it; they agree."""
    together: dict[int, str] = {}

    def note(mine: dict[int, str]) -> dict[int, str]:
        assert not mine.keys() & together.keys()  # no row is read twice
        together.update(mine)
        return dict.fromkeys(range(100), "")

    for rank in range(number):
        reference_key("w", rows, {}, Ranks(rank, number, note))
    (one,) = {
        reference_key("w", rows, {}, Ranks(rank, number, lambda _: together))
        for rank in range(number)
    }
    return one


def test_the_key_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_ROWS_A_HASH", 2)
    write_images(tmp_path, 7)
    rows = pairs(tmp_path, 7)
    wanted = key(rows)
    assert [key(rows, number) for number in (2, 3, 5)] == [wanted] * 3
    assert key(rows[::-1]) != wanted
    assert key(rows[:6]) != wanted
    for name in ("question", "system", "chosen", "rejected"):
        changed = replace(rows[6], data={**rows[6].data, name: "other"})
        assert key([*rows[:6], changed]) != wanted
    assert key([*rows[:6], replace(rows[6], max_tiles=3)]) != wanted
    assert key([*rows[:6], replace(rows[6], line=99)]) == wanted
    noise_image(112, 56, 999).save(tmp_path / "6-0.png")
    assert key(rows) != wanted


def test_images_as_bytes_and_paths_are_told_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    row = pairs(tmp_path, 1)[0]
    one, other = (
        replace(row, data={**row.data, "image": images})
        for images in ([b"b", "a.png"], ["a.png", b"b"])
    )
    assert [*one.encoded_media()] == [b"b", b"a"]
    assert key([one]) != key([other])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_score_every_pair_once(workers: int) -> None:
    def encode(row: int) -> Example:
        tiles = torch.zeros((0, 3, 2, 2), dtype=torch.uint8)
        return Example([1, 2], tiles, [[3] * (row + 1), [4] * (20 - row)], [])

    def score(batch: PackedBatch) -> torch.Tensor:
        return batch.lengths.float()

    rows: Any = range(11)
    state = torch.get_rng_state()
    found = compute_reference(
        rows,
        StepCollator(encode, lambda examples: {}, 40, None),
        score,
        batch_size=3,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        quiet=True,
        workers=workers,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert found.tolist() == [[row + 1, 20 - row] for row in rows]
