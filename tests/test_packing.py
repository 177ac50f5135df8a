"""Packed rows against transformers' own InternVL, one sequence at a time (see plain.py).

Invariant 1 of the design: packing changes neither log-probabilities nor loss nor gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_cases import CONVERSATION, QUESTIONS, Cases, mean_nll, packed_loss
from plain import gradient_error, gradients, noise_image, plain_logprobs

from internvl.chat import normalize_tiles
from internvl.data import Row
from internvl.packing import Example, filler, pack, plan_microbatches


@pytest.fixture(scope="module")
def cases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tiny_model, tmp_path_factory.mktemp("images"))


def check_equal(cases: Cases, chosen: list[int], **options: Any) -> None:
    """Log-probs to 1e-5, the loss to 1e-6, every parameter's gradient to 1e-5, relative."""
    batch = pack(cases.examples, chosen)
    plain = [cases.plain[index] for index in chosen]
    model: Any = cases.plain_model
    theirs = [part for p in plain for part in plain_logprobs(model, p)]
    ours = cases.score(batch, **options).logprobs
    assert batch.lengths.tolist() == [len(part) for part in theirs]
    assert ours.dtype == torch.float32
    assert (ours - torch.cat(theirs)).abs().max() < 1e-5
    loss = packed_loss(cases, batch, len(theirs), **options)
    expected = mean_nll(theirs, len(theirs))
    assert abs(loss.item() - expected.item()) < 1e-6 * expected.item()
    loss.backward()
    expected.backward()
    error = gradient_error(gradients(cases.model), gradients(model, all_reached=False))
    print(f"{chosen}: gradients differ by {error:.1e}")
    assert error < 1e-5


NAMES = [*QUESTIONS, "conversation"]


@pytest.mark.parametrize("name", NAMES)
def test_one_example_is_plain(cases: Cases, name: str) -> None:
    check_equal(cases, [NAMES.index(name)])


@pytest.mark.parametrize("chosen", [[0, 2], [5, 1, 4], [0, 1, 2, 3, 4, 5]])
def test_several_examples_in_a_row_are_plain(cases: Cases, chosen: list[int]) -> None:
    check_equal(cases, chosen)


def test_encoding_is_the_processors_own(cases: Cases) -> None:
    """Ids equal InternVLProcessor.__call__'s, pixels are bit-equal to its own."""
    for example, plain in zip(cases.examples[:-1], cases.plain[:-1], strict=True):
        assert example.prompt_ids == plain.ids
        assert example.completions == plain.completions
    conversation, plain = cases.examples[-1], cases.plain[-1]
    ids, mask = plain.ids + plain.completions[0], [False, *plain.masks[0]]
    first = len(conversation.prompt_ids)
    assert conversation.prompt_ids + conversation.completions[0] == ids
    assert conversation.loss_masks == [mask[first:]] and not any(mask[:first])
    scored = [token for token, keep in zip(ids, mask, strict=True) if keep]
    answers = cases.processor.tokenizer.decode(scored)
    assert answers == "".join(f"{answer}<|im_end|>" for _, answer in CONVERSATION)
    for example, plain in zip(cases.examples, cases.plain, strict=True):
        if plain.pixels is None:
            assert example.tiles.shape == (0, 3, 56, 56)
        else:
            assert example.tiles.dtype == torch.uint8
            assert torch.equal(normalize_tiles(cases.processor, example.tiles), plain.pixels)
    # two images share the budget of 4 tiles: one tile, and two (alone: three) with a thumbnail
    assert [example.num_tiles for example in cases.examples] == [1, 1, 0, 1 + 3, 5, 3]


def test_lengths_are_known_before_encoding(cases: Cases, tmp_path: Path) -> None:
    """Encoder.length, from image sizes alone, is what encoding then gives."""
    noise_image(112, 56, seed=0).save(tmp_path / "a.png")
    pair = {"question": "<image>\nWhat is it?", "chosen": "The red bar is 3.", "rejected": "It"}
    row = Row({**pair, "image": "a.png"}, tmp_path / "rows.jsonl", 1, tmp_path)
    example = cases.encoder.pair(row)
    longest = max(map(len, example.completions))
    assert cases.encoder.length(row, "pair") == len(example.prompt_ids) + longest
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "The bar."}]
    row = Row({"conversations": turns, "image": "a.png"}, tmp_path / "rows.jsonl", 1, tmp_path)
    assert cases.encoder.length(row, "conversation") == cases.encoder.conversation(row).num_tokens


# ---------------------------------------------------------------- micro-batches


@given(places=st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(max_examples=8, suppress_health_check=[HealthCheck.differing_executors])
def test_any_split_gives_the_same_gradients(cases: Cases, places: list[int]) -> None:
    whole = packed_loss(cases, pack(cases.examples), 12)
    whole.backward()
    expected = gradients(cases.model)
    total = 0.0
    for place in set(places):
        indices = [index for index, p in enumerate(places) if p == place]
        loss = packed_loss(cases, pack(cases.examples, indices), 12)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    assert gradient_error(gradients(cases.model), expected) < 1e-5


def test_filler_reaches_every_parameter_with_zero(cases: Cases) -> None:
    """A rank without micro-batches: loss 0, and a gradient of exact zeros for every parameter."""
    batch = filler(("ref_logps",), ("old_logprobs",), torch.Size([3, 56, 56]))
    assert batch.num_completions == 0 and not batch.real
    loss = cases.score(batch).logprobs.sum()
    assert loss.item() == 0.0
    loss.backward()
    assert all(not g.any() for g in gradients(cases.model).values())


SIZES = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 7)), max_size=12)


@given(SIZES, st.integers(1, 120), st.none() | st.integers(1, 12))
def test_plan_takes_each_example_once_within_the_budgets(
    sizes: list[tuple[int, int]], max_tokens: int, max_tiles: int | None
) -> None:
    examples = [
        Example([0] * tokens, torch.zeros(tiles, 3, 2, 2, dtype=torch.uint8), [[]], [])
        for tokens, tiles in sizes
    ]
    plan = plan_microbatches(examples, max_tokens, max_tiles)
    assert sorted(index for members in plan for index in members) == list(range(len(sizes)))
    assert plan == plan_microbatches(examples, max_tokens, max_tiles)
    for members in plan:
        tokens = sum(sizes[index][0] for index in members)
        tiles = sum(sizes[index][1] for index in members)
        fits = tokens <= max_tokens and (max_tiles is None or tiles <= max_tiles)
        assert fits or len(members) == 1


# ---------------------------------------------------------------- nothing leaks


def changed(example: Example, image_token: int) -> Example:
    """The same lengths and slots with every text token and every pixel another one."""

    def other(ids: list[int]) -> list[int]:
        return [token if token == image_token else (token + 7) % 256 for token in ids]

    return Example(
        other(example.prompt_ids),
        255 - example.tiles,
        [other(ids) for ids in example.completions],
        example.image_slots,
        loss_masks=example.loss_masks,
    )


@pytest.mark.parametrize("index", range(6))
def test_no_example_sees_another(cases: Cases, index: int) -> None:
    """All of an example changed: every other example's log-probs are bit-equal."""
    examples = list(cases.examples)
    before = pack(examples)
    examples[index] = changed(examples[index], cases.processor.image_token_id)
    after = pack(examples)
    with torch.no_grad():
        one, other = cases.score(before).logprobs, cases.score(after).logprobs
    mine = before.example_of_completion[before.completion_of_token] == index
    assert torch.equal(one[~mine], other[~mine])
    assert not torch.isclose(one[mine], other[mine]).any()


def test_no_completion_sees_another(cases: Cases) -> None:
    example = cases.examples[1]
    other = Example(example.prompt_ids, example.tiles, list(example.completions), [])
    other.image_slots = example.image_slots
    other.completions[1] = [(token + 7) % 256 for token in other.completions[1]]
    with torch.no_grad():
        one, two = cases.score(pack([example])).logprobs, cases.score(pack([other])).logprobs
    mine = pack([example]).completion_of_token == 1
    assert torch.equal(one[~mine], two[~mine])
    assert not torch.isclose(one[mine], two[mine]).any()


def test_image_token_in_a_completion_is_a_word(cases: Cases) -> None:
    """A sampled <IMG_CONTEXT> is scored by its own embedding and receives no image feature."""
    image_token = cases.processor.image_token_id
    plain = cases.plain[0]
    completion = [*plain.completions[0][:3], image_token, *plain.completions[0][3:]]
    row = Row(
        {"question": QUESTIONS["one completion"][0], "image": "0-0.png"},
        *(cases.images / "rows.jsonl", 1, cases.images),
    )
    example = cases.encoder.completions(row, [completion, completion])
    assert max(example.image_slots) < len(example.prompt_ids)
    scores = cases.score(pack([example])).logprobs
    # transformers' forward takes every image token for an image: embeddings are made by hand
    model: Any = cases.plain_model
    assert plain.pixels is not None
    embeds = model.get_input_embeddings()(torch.tensor(plain.ids + completion)).clone()
    slots = [place for place, token in enumerate(plain.ids) if token == image_token]
    features = model.model.get_image_features(pixel_values=plain.pixels).pooler_output
    embeds[torch.tensor(slots)] = features.flatten(0, 1)
    hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False)
    logits = model.lm_head(hidden.last_hidden_state[0, len(plain.ids) - 1 : -1])
    expected = logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]
    assert (scores[: len(completion)] - expected).abs().max() < 1e-5
    assert (scores[len(completion) :] - expected).abs().max() < 1e-5
