"""Samplers that go on with a reply that has begun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cascade.world import make_chart
from internvl.chat import eos_token_id, load_processor
from internvl.control_tokens import decode_completion
from internvl.errors import DataError, UserError
from internvl.sampler import Sampler, SampleRequest, SamplingConfig, check_request, open_sampler


@pytest.mark.xdist_group("vllm")
def test_both_samplers_go_on_with_a_started_reply(vllm_sampler: Sampler, tiny_model: Path) -> None:
    """The likeliest reply goes on as it did from any place in it, with an image and without."""
    processor = load_processor(str(tiny_model))
    _, image, record = make_chart(0, "rl", 0)
    asked = [
        SampleRequest(record["question"], (image,), seed=0),
        SampleRequest("<image> and <image>\nWhich?", (image, image.resize((112, 56))), seed=1),
        SampleRequest("What is 2 + 7?", (), seed=2),
    ]
    greedy = SamplingConfig(temperature=0, max_tokens=20)
    plain = open_sampler(tiny_model, backend="transformers", max_model_len=512)
    for sampler in (vllm_sampler, plain):
        whole = [one for (one,) in sampler.sample(asked, greedy)]
        for at in (1, 7):
            begun = [
                replace(r, started=one.token_ids[:at]) for r, one in zip(asked, whole, strict=True)
            ]
            rest = sampler.sample(begun, replace(greedy, max_tokens=20 - at))
            for one, (more,) in zip(whole, rest, strict=True):
                assert (*one.token_ids[:at], *more.token_ids) == one.token_ids
                assert more.logprobs == pytest.approx(one.logprobs[at:], abs=1e-4)
                assert more.text == decode_completion(processor, more.token_ids)
        ended = replace(asked[0], started=[5, eos_token_id(processor)])
        with pytest.raises(DataError, match="the started reply holds the control token"):
            sampler.sample([ended], greedy)
    # the same seeds, the same noise, from the same place
    begun = [replace(r, started=(99, 98, 97)) for r in asked]
    config = SamplingConfig(n=3, max_tokens=12)
    drawn = [sampler.sample(begun, config) for sampler in (vllm_sampler, plain)]
    pairs = [pair for a, b in zip(*drawn, strict=True) for pair in zip(a, b, strict=True)]
    assert sum(a.token_ids == b.token_ids for a, b in pairs) >= len(pairs) - 1
    plain.close()


def test_a_sampler_that_cannot_go_on_says_so() -> None:
    check_request(SampleRequest("?", (), seed=0))
    with pytest.raises(UserError, match="this sampler cannot go on with a started reply"):
        check_request(SampleRequest("?", (), seed=0, started=(5,)))
