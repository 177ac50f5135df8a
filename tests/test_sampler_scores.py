"""Given completions scored by the engines, and weights that arrive by half."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import load_plain

from cascade.world import make_chart
from internvl.chat import encode_prompt, encode_text, forbidden_token_ids, normalize_tiles
from internvl.errors import UserError
from internvl.sampler import SampleRequest, SamplingConfig, open_sampler

vllm = pytest.mark.xdist_group("vllm")


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> tuple[Any, Any]:
    return load_plain(tiny_model)


@pytest.fixture(scope="module")
def begun(plain: tuple[Any, Any]) -> list[SampleRequest]:
    """A chart, an image of seven tiles and no image, each with an answer of its own length."""
    made = []
    for index, size in enumerate((None, (100, 160), ())):
        _, image, record = make_chart(0, "rl", index)
        images = () if size == () else (image if size is None else image.resize(size),)
        question = "What is 2 + 7?" if size == () else record["question"]
        ids = encode_text(plain[1], "The answer is 5 and 7."[: 12 + 4 * index])
        made.append(SampleRequest(question, images, seed=index, started=tuple(ids)))
    return made


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=vllm)])
def sampler(request: Any, tiny_model: Path, plain: tuple[Any, Any]) -> Iterator[Any]:
    if request.param == "transformers":
        yield open_sampler(tiny_model, backend="transformers", max_model_len=512)
        return
    shared = request.getfixturevalue("vllm_sampler")
    yield shared
    shared.update_weights(plain[0].named_parameters())


@torch.no_grad()
def expected(plain: tuple[Any, Any], request: SampleRequest, temperature: float) -> torch.Tensor:
    """The started tokens' log-probabilities by one forward of transformers' own model."""
    model, processor = plain
    prompt = encode_prompt(processor, request.question, request.images, 12)
    ids = torch.tensor([[*prompt.ids, *request.started]])
    pixels = normalize_tiles(processor, prompt.tiles) if len(prompt.tiles) else None
    logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(prompt.ids) - 1 : -1]
    logits[:, forbidden_token_ids(processor, logits.shape[1])] = -torch.inf
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, len(prompt.ids) :, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_given_completion_has_the_trainers_logprobs(
    sampler: Any, begun: list[SampleRequest], plain: tuple[Any, Any], temperature: float
) -> None:
    """Also where n and max_tokens say otherwise, which are of sampling."""
    config = SamplingConfig(n=3, temperature=temperature, max_tokens=5)
    ((engine, scores),) = sampler.score(begun, config).items()
    assert engine == sampler.name
    for request, score in zip(begun, scores, strict=True):
        prompt = encode_prompt(plain[1], request.question, request.images, 12)
        assert score.prompt_tokens == len(prompt.ids)
        assert score.logprobs == pytest.approx(
            expected(plain, request, temperature).tolist(), abs=1e-5
        )


def test_weights_that_arrived_by_half_are_not_sampled_from(
    sampler: Any, begun: list[SampleRequest], plain: tuple[Any, Any]
) -> None:
    """An error in the middle of the walk, or a weight that is left out; a whole update mends it."""
    named = [(name, weight.detach()) for name, weight in plain[0].named_parameters()]
    config = SamplingConfig(max_tokens=2)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from named[:20]
        raise RuntimeError("the connection is gone")

    fresh = [replace(request, started=()) for request in begun]
    before = sampler.sample(fresh, config)
    with pytest.raises(RuntimeError, match="the connection is gone"):
        sampler.update_weights(breaks_off())
    with pytest.raises(UserError, match="update"):
        sampler.sample(fresh, config)
    with pytest.raises(UserError, match="1 weights were not handed to the sampler: "):
        sampler.update_weights(iter(named[:-1]))
    with pytest.raises(UserError, match="update"):
        sampler.sample(fresh, config)
    sampler.update_weights(iter(named))
    assert sampler.sample(fresh, config) == before
