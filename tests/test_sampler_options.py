"""What samplers share: options that are refused, the distribution by hand, seeds, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internvl.checkpoint import matching
from internvl.errors import UserError
from internvl.hf_sampler import distribution
from internvl.sampler import MAX_SAMPLES, SamplingConfig, first_seed, open_sampler


def test_distribution_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]]).log()  # weights 0, 1, 2, 3; the last masked
    logits[0, 0] = -torch.inf

    def probabilities(**options: Any) -> list[float]:
        config = SamplingConfig(**options)
        return distribution(logits, config, [4]).exp()[0].tolist()

    assert probabilities() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 0])
    assert probabilities(temperature=0.5) == pytest.approx([0, 1 / 14, 4 / 14, 9 / 14, 0])
    assert probabilities(temperature=0) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 0])
    assert probabilities(top_k=2) == pytest.approx([0, 0, 2 / 5, 3 / 5, 0])
    assert probabilities(top_p=0.5) == pytest.approx([0, 0, 0, 1, 0])
    assert probabilities(top_p=0.6) == pytest.approx([0, 0, 2 / 5, 3 / 5, 0])
    assert probabilities(top_p=0.01) == pytest.approx([0, 0, 0, 1, 0])
    assert probabilities(top_k=2, top_p=0.5) == pytest.approx([0, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": MAX_SAMPLES + 1}, "n is 65537"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 0, "n": 2}, "temperature 0 with n = 2"),
        ({"temperature": 1e-6}, "give 0 .greedy. or at least 0.01"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tiles": 0}, "max_tiles is 0"),
    ],
)
def test_impossible_sampling_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)


def test_impossible_openings(tiny_model: Path, tmp_path: Path) -> None:
    for folder, options, message in [
        (tmp_path, {}, "no config.json there"),
        (tiny_model, {"backend": "sglang"}, "'sglang' is not one of"),
        (tiny_model, {"dtype": "int8"}, "'int8' is not one of"),
        (tiny_model, {"max_num_seqs": 0}, "max_num_seqs is 0"),
        (tiny_model, {"gpu_memory_utilization": 0.5}, "is an option of vLLM"),
    ]:
        chosen: dict[str, Any] = {"backend": "transformers", **options}
        with pytest.raises(UserError, match=message):
            open_sampler(folder, **chosen)


def test_without_vllm_the_fallback_is_announced(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_sampler(tiny_model).name == "transformers"
    assert "vLLM is not installed: sampling with transformers" in capsys.readouterr().err


def test_weights_must_match_exactly() -> None:
    shapes = {"a": (2,), "b": (3, 1)}
    good = [("a", torch.ones(2)), ("b", torch.ones(3, 1))]
    assert list(matching(good, shapes)) == good
    for named, message in [
        (good[:1], "1 weights were not handed to the sampler: b"),
        ([*good, ("c", torch.ones(1))], "no weight 'c'"),
        ([good[0], ("b", torch.ones(1, 3))], r"'b' is \(1, 3\), the sampler's model has \(3, 1\)"),
    ]:
        with pytest.raises(UserError, match=message):
            list(matching(named, shapes))


def test_first_seeds_are_spaced() -> None:
    seeds = [first_seed(sampler, request) for sampler in range(3) for request in range(100)]
    assert len(set(seeds)) == 300
    assert all(seed % MAX_SAMPLES == 0 and 0 <= seed < 2**64 for seed in seeds)
