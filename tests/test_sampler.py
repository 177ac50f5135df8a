"""Samplers against the trainer's view: the same prompt, pixels, mask and log-probabilities.

The judge is `teacher_forced`: transformers' own forward over prompt and completion, on the inputs
of internvl.chat, sharing no code with either sampler's decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.world import make_chart
from internvl.chat import (
    encode_prompt,
    eos_token_id,
    forbidden_token_ids,
    load_processor,
    normalize_tiles,
)
from internvl.control_tokens import decode_completion
from internvl.errors import DataError, UserError
from internvl.hf_sampler import TransformersSampler
from internvl.sampler import (
    Completion,
    Sampler,
    SampleRequest,
    SamplingConfig,
    open_sampler,
)

vllm = pytest.mark.xdist_group("vllm")
TOLERANCE = 1e-4  # the project's bar in float32; about 2e-6 is seen


@pytest.fixture(scope="module")
def requests() -> list[SampleRequest]:
    """Charts, an image of seven tiles, two images, no image, and a long prompt."""
    made = []
    for index in range(13):
        _, image, record = make_chart(0, "rl", index)
        made.append(SampleRequest(record["question"], (image,), seed=index))
    one, other = made[0].images[0], made[1].images[0]
    made.append(SampleRequest("<image>\nHow many?", (one.resize((100, 160)),), seed=100))
    both = (one, other.resize((112, 56)))
    made.append(SampleRequest("<image> and <image>\nWhich is taller?", both, seed=101))
    made.append(SampleRequest("What is 2 + 7?", (), seed=102))
    # Longer than a block of vLLM's key-value cache, so that its prefix cache has work to do.
    made.append(SampleRequest("<image>\n" + "The red bar is 7. " * 40, (other,), seed=103))
    return made


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load(tiny_model)


@pytest.fixture
def hf_sampler(tiny_model: Path) -> Iterator[TransformersSampler]:
    sampler = open_sampler(tiny_model, backend="transformers", max_model_len=512)
    assert isinstance(sampler, TransformersSampler)
    yield sampler
    sampler.close()


@pytest.fixture
def borrowed(vllm_sampler: Sampler, model: Any) -> Iterator[Sampler]:
    """vLLM for a test that changes its weights: they are put back afterwards."""
    yield vllm_sampler
    vllm_sampler.update_weights(model.named_parameters())


def perturbed(folder: Path, names: str = "") -> Any:
    """The model with noise on every parameter whose name contains `names`."""
    model = load(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if names in name:
                weight.add_(0.03 * torch.randn(weight.shape, generator=generator))
    return model


@torch.no_grad()
def teacher_forced(
    model: Any,
    processor: Any,
    request: SampleRequest,
    completion: Completion,
    temperature: float,
) -> Tensor:
    """Log-probabilities of a completion's tokens [T], from one forward over the whole."""
    prompt = encode_prompt(processor, request.question, request.images, request.budget(12))
    ids = torch.tensor([[*prompt.ids, *completion.token_ids]])
    pixels = normalize_tiles(processor, prompt.tiles) if len(prompt.tiles) else None
    logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(prompt.ids) - 1 : -1]
    logits[:, forbidden_token_ids(processor, logits.shape[1])] = -torch.inf
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, len(prompt.ids) :, None])[:, 0]


def largest_gap(
    model: Any,
    processor: Any,
    requests: Sequence[SampleRequest],
    sampled: list[list[Completion]],
    temperature: float,
) -> float:
    """The largest difference between a sampler's log-probabilities and the trainer's."""
    gaps = [
        (teacher_forced(model, processor, request, one, temperature) - torch.tensor(one.logprobs))
        .abs()
        .max()
        .item()
        for request, completions in zip(requests, sampled, strict=True)
        for one in completions
    ]
    return max(gaps)


# ------------------------------------------------------------------- vLLM against the trainer


@vllm
def test_engine_and_trainer_see_the_same_tokens_and_bit_equal_pixels(
    vllm_sampler: Any, processor: Any, requests: list[SampleRequest]
) -> None:
    for request, max_tiles in itertools.product(requests, (12, 4, 1)):
        ids, pixels = vllm_sampler.engine_inputs(request, max_tiles)
        prompt = encode_prompt(processor, request.question, request.images, max_tiles)
        assert ids == prompt.ids
        assert torch.equal(pixels, normalize_tiles(processor, prompt.tiles))
    assert len(encode_prompt(processor, "<image>", requests[13].images, 12).tiles) == 7


@vllm
def test_each_request_may_have_its_own_tile_budget(
    vllm_sampler: Any,
    hf_sampler: TransformersSampler,
    model: Any,
    processor: Any,
    requests: list[SampleRequest],
) -> None:
    """In one batch; the same image with two budgets is two prompts, in the engine's cache too."""
    mixed = [replace(requests[13], max_tiles=budget, seed=1) for budget in (None, 1, 4, 12)]
    lengths = [len(vllm_sampler.engine_inputs(one, one.budget(12))[0]) for one in mixed]
    assert [length - lengths[1] for length in lengths] == [4 * more for more in (6, 0, 2, 6)]
    for sampler in (vllm_sampler, hf_sampler):
        sampled = sampler.sample(mixed, SamplingConfig(n=2, max_tokens=12))
        assert largest_gap(model, processor, mixed, sampled, 1.0) < TOLERANCE
        assert sampled[0] == sampled[3] or sampler is hf_sampler


@vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_vllm_logprobs_are_the_trainers(
    vllm_sampler: Sampler,
    hf_sampler: TransformersSampler,
    model: Any,
    processor: Any,
    requests: list[SampleRequest],
    temperature: float,
) -> None:
    config = SamplingConfig(n=3 if temperature else 1, temperature=temperature, max_tokens=24)
    sampled = vllm_sampler.sample(requests, config)
    assert [len(completions) for completions in sampled] == [config.n] * len(requests)
    assert largest_gap(model, processor, requests, sampled, temperature or 1.0) < TOLERANCE
    # The same seeds, the same noise: transformers draws the same tokens (a tie could differ).
    other = hf_sampler.sample(requests, config)
    assert largest_gap(model, processor, requests, other, temperature or 1.0) < TOLERANCE
    pairs = [pair for a, b in zip(sampled, other, strict=True) for pair in zip(a, b, strict=True)]
    same = [a.token_ids == b.token_ids and a.text == b.text for a, b in pairs]
    assert sum(same) >= len(same) - 1


@vllm
@pytest.mark.parametrize("names", ["", "vision_tower", "multi_modal_projector", "lm_head"])
def test_vllm_follows_new_weights(
    borrowed: Sampler,
    tiny_model: Path,
    model: Any,
    processor: Any,
    requests: list[SampleRequest],
    names: str,
) -> None:
    config = SamplingConfig(n=2, max_tokens=12)
    before = borrowed.sample(requests, config)  # fills the caches that the update must empty
    new = perturbed(tiny_model, names)
    borrowed.update_weights(new.named_parameters())
    after = borrowed.sample(requests, config)
    assert largest_gap(new, processor, requests, after, 1.0) < TOLERANCE
    assert largest_gap(model, processor, requests, after, 1.0) > 100 * TOLERANCE
    borrowed.update_weights(model.named_parameters())
    assert_same(borrowed.sample(requests, config), before)


@vllm
def test_vllm_seeds_do_not_depend_on_the_batch(
    vllm_sampler: Sampler, requests: list[SampleRequest]
) -> None:
    config = SamplingConfig(n=4, max_tokens=16)
    whole = vllm_sampler.sample(requests, config)
    halves = [vllm_sampler.sample(half, config) for half in (requests[:7], requests[7:])]
    assert_same(halves[0] + halves[1], whole)
    assert_same(vllm_sampler.sample(requests[::-1], config)[::-1], whole)
    fewer = vllm_sampler.sample(requests, SamplingConfig(n=2, max_tokens=16))
    assert_same(fewer, [completions[:2] for completions in whole])
    again = [SampleRequest(r.question, r.images, r.seed + 1) for r in requests]
    assert not any(a == b for a, b in zip(vllm_sampler.sample(again, config), whole, strict=True))


def assert_same(some: list[list[Completion]], others: list[list[Completion]]) -> None:
    """Bit-equal with one thread; with more, sums may be split differently for another batch."""
    if torch.get_num_threads() == 1:
        assert some == others
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a, b, strict=True)]
    same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    assert len(same) >= len(pairs) - 1
    for a, b in same:
        assert a.logprobs == pytest.approx(b.logprobs, abs=TOLERANCE)


@vllm
def test_neighbouring_seeds_share_no_stream(
    vllm_sampler: Sampler, requests: list[SampleRequest]
) -> None:
    question, images = requests[0].question, requests[0].images
    same_question = [SampleRequest(question, images, seed) for seed in range(4)]
    sampled = vllm_sampler.sample(same_question, SamplingConfig(n=4, max_tokens=16))
    assert len({one.token_ids for completions in sampled for one in completions}) == 16


@vllm
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_forbidden_token_is_never_sampled(
    borrowed: Sampler,
    hf_sampler: TransformersSampler,
    tiny_model: Path,
    processor: Any,
    requests: list[SampleRequest],
    temperature: float,
) -> None:
    model = load(tiny_model)
    forbidden = forbidden_token_ids(processor, model.config.text_config.vocab_size)
    eos = eos_token_id(processor)
    with torch.no_grad():  # without the mask, these would be nearly all that is sampled
        model.lm_head.weight[forbidden] *= 40
        model.lm_head.weight[eos] *= 8
    config = SamplingConfig(n=8 if temperature else 1, temperature=temperature, max_tokens=16)
    for sampler in (borrowed, hf_sampler):
        sampler.update_weights(model.named_parameters())
        sampled = sampler.sample(requests, config)
        completions = [one for several in sampled for one in several]
        tokens = {token for one in completions for token in one.token_ids}
        assert not tokens & set(forbidden)
        assert largest_gap(model, processor, requests, sampled, 1.0) < TOLERANCE
        check_endings(completions, processor, config)
        if temperature:
            assert {one.finish_reason for one in completions} == {"stop", "length"}


def check_endings(completions: list[Completion], processor: Any, config: SamplingConfig) -> None:
    """The end-of-turn token is the last one where it was sampled, and only there."""
    eos = eos_token_id(processor)
    for one in completions:
        stopped = one.finish_reason == "stop"
        assert (one.token_ids[-1] == eos) == stopped
        assert one.token_ids.count(eos) == stopped
        assert stopped or len(one.token_ids) == config.max_tokens
        assert len(one.logprobs) == len(one.token_ids)
        assert "<|im_end|>" not in one.text
        assert one.text == decode_completion(processor, one.token_ids)


@vllm
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.7}])
def test_both_samplers_mean_the_same_by_top_k_and_top_p(
    vllm_sampler: Sampler,
    hf_sampler: TransformersSampler,
    requests: list[SampleRequest],
    options: dict[str, Any],
) -> None:
    config = SamplingConfig(n=3, temperature=0.9, max_tokens=12, **options)
    engine, plain = (s.sample(requests, config) for s in (vllm_sampler, hf_sampler))
    pairs = [pair for a, b in zip(engine, plain, strict=True) for pair in zip(a, b, strict=True)]
    same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    assert len(same) >= len(pairs) - 1
    gap = max(abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True))
    assert gap < TOLERANCE


@vllm
def test_vllm_leaves_the_process_as_it_was(
    vllm_sampler: Sampler, requests: list[SampleRequest]
) -> None:
    import random

    import numpy as np

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002

    before = states()
    vllm_sampler.sample(requests[:3], SamplingConfig(max_tokens=4))
    assert states() == before
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # vLLM replaces this function by one that does nothing
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


@vllm
def test_vllm_says_what_it_cannot_do_and_goes_on(
    vllm_sampler: Any,
    hf_sampler: TransformersSampler,
    requests: list[SampleRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nearly = SampleRequest("7" * 495, (), seed=0)  # the template makes it 503 of 512 tokens
    for sampler in (vllm_sampler, hf_sampler):
        (cut,) = sampler.sample([nearly], SamplingConfig())[0]
        assert (len(cut.token_ids), cut.finish_reason) == (9, "length")
    config = SamplingConfig(max_tokens=4)
    expected = vllm_sampler.sample(requests[:2], config)
    long = SampleRequest("why? " * 600, (), seed=0)
    with pytest.raises(DataError, match="max_model_len is 512: no room"):
        vllm_sampler.sample([*requests[:2], long], config)
    assert_same(vllm_sampler.sample(requests[:2], config), expected)
    monkeypatch.setattr(vllm_sampler, "_tied", True)
    with pytest.raises(UserError, match="tied lm_head"):
        vllm_sampler.update_weights([])


# ------------------------------------------------------------------------ transformers alone


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_transformers_logprobs_are_the_trainers(
    hf_sampler: TransformersSampler,
    model: Any,
    processor: Any,
    requests: list[SampleRequest],
    temperature: float,
) -> None:
    config = SamplingConfig(n=3, temperature=temperature, max_tokens=24)
    state = torch.get_rng_state()
    sampled = hf_sampler.sample(requests, config)
    assert torch.equal(state, torch.get_rng_state())
    assert largest_gap(model, processor, requests, sampled, temperature) < TOLERANCE
    halves = hf_sampler.sample(requests[:7], config) + hf_sampler.sample(requests[7:], config)
    flat, parts = ([one.token_ids for c in s for one in c] for s in (sampled, halves))
    assert sum(a == b for a, b in zip(flat, parts, strict=True)) >= len(flat) - 1


def test_transformers_follows_new_weights(
    hf_sampler: TransformersSampler,
    tiny_model: Path,
    processor: Any,
    requests: list[SampleRequest],
) -> None:
    new = perturbed(tiny_model)
    hf_sampler.update_weights(new.named_parameters())
    sampled = hf_sampler.sample(requests, SamplingConfig(n=2, max_tokens=12))
    assert largest_gap(new, processor, requests, sampled, 1.0) < TOLERANCE


def test_a_context_limit_cuts_completions_and_refuses_prompts(
    tiny_model: Path, requests: list[SampleRequest]
) -> None:
    sampler = open_sampler(tiny_model, backend="transformers", max_model_len=30)
    (only,) = sampler.sample(requests[:1], SamplingConfig(max_tokens=24))[0]
    assert (len(only.token_ids), only.finish_reason) == (30 - 25, "length")
    with pytest.raises(DataError, match=r"has \d+ tokens, and max_model_len is 30: no room"):
        sampler.sample(requests[13:14], SamplingConfig())


def test_images_and_placeholders_must_agree(
    hf_sampler: TransformersSampler, requests: list[SampleRequest]
) -> None:
    wrong = SampleRequest("<image> and <image>?", requests[0].images, seed=0)
    with pytest.raises(DataError, match=r"1 image\(s\) but 2 <image> placeholder\(s\)"):
        hf_sampler.sample([wrong], SamplingConfig())
