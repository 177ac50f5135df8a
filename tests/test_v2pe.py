"""V2PE: fractional positions of visual tokens, from the options to the sampler.

The judge is transformers' own forward, given positions that a loop here counts by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import load_plain, noise_image
from torch import Tensor
from trainer_cases import (
    MAX_TILES,
    conversations,
    pairs,
    questions,
    write_images,
)

from internvl.chat import encode_prompt, forbidden_token_ids, load_processor, normalize_tiles
from internvl.checkpoint import load_model
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.packing import Example, pack
from internvl.positions import POSITION_STEPS, draw_steps, token_positions
from internvl.sampler import SampleRequest, SamplingConfig, open_sampler

STEPS = [1.0, 0.5, 0.25, 1 / 256]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 8)
    return folder


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model)


def score(model: Any, processor: Any, examples: Sequence[Example], **options: Any) -> Tensor:
    batch = pack(examples)
    tiles = batch.tiles if len(batch.tiles) else batch.tiles.new_zeros(1, 3, 56, 56)
    with torch.no_grad():
        scores = model(packed=batch, pixel_values=normalize_tiles(processor, tiles), **options)
    return scores.logprobs


# ---------------------------------------------------------------- positions


def test_positions_of_a_prompt_with_two_images(processor: Any) -> None:
    """delta 1/4 and 1/2: the position after an image of one tile (four tokens) is 1 or 2 on."""
    image = noise_image(56, 56, 0)
    prompt = encode_prompt(processor, "<image>\nA <image>", [image, image], 12)
    assert prompt.image_slots == [4, 5, 6, 7, 13, 14, 15, 16]
    steps = [0.25] * 4 + [0.5] * 4
    example = Example(prompt.ids, prompt.tiles, [[9, 9], [9]], prompt.image_slots, slot_steps=steps)
    # <|im_start|> user \n <img> | image | </img> \n A " " <img> | image | </img>
    by_hand = [0, 1, 2, 3, 3.25, 3.5, 3.75, 4, 5, 6, 7, 8, 9, 9.5, 10, 10.5, 11, 12]
    assert example.positions()[:18] == by_hand
    last = example.positions()[len(prompt.ids) - 1]
    assert last == len(prompt.ids) - 1 - 4 * 0.75 - 4 * 0.5
    assert example.positions()[len(prompt.ids) :] == [last + 1, last + 2, last + 1]
    batch = pack([example, Example([1, 2], prompt.tiles[:0], [[3]], [])])
    assert batch.position_ids.dtype == torch.float32
    assert batch.position_ids.tolist() == [*example.positions(), 0, 1, 2]


def test_fractions_are_exact_to_the_end_of_a_long_context() -> None:
    finest = POSITION_STEPS[-1]
    positions = token_positions(65_000 * 2, dict.fromkeys(range(65_000, 130_000), finest))
    assert torch.tensor(positions, dtype=torch.float32).tolist() == positions
    assert positions[-1] == 64_999 + 65_000 / 256


def test_draws_are_fixed_by_text_and_seed() -> None:
    def draw(key: str, seed: int = 0) -> list[float]:
        return draw_steps(POSITION_STEPS, 4, key=key, seed=seed)

    # a change here would change the input of every run that is gone on with
    assert draw("a") == [1.0, 0.25, 0.0625, 0.015625]
    assert draw("a", seed=1) != draw("a") != draw("b")
    counts = Counter(step for key in range(1000) for step in draw(str(key)))
    assert set(counts) == set(POSITION_STEPS)
    assert all(abs(count - 4000 / 9) < 4 * (4000 / 9) ** 0.5 for count in counts.values())
    assert draw_steps([0.5], 3, key="a", seed=0) == [0.5] * 3


# ---------------------------------------------------------------- the forward


def test_step_one_is_off_to_the_bit(model: Any, processor: Any, images: Path) -> None:
    rows = conversations(images, 4)
    off = [Encoder(processor, MAX_TILES).conversation(row) for row in rows]
    on = [Encoder(processor, MAX_TILES).conversation(row) for row in rows]
    for example in on:
        example.slot_steps = [1.0] * len(example.image_slots)
    assert torch.equal(pack(on).position_ids, pack(off).position_ids)
    assert pack(on).position_ids.dtype == torch.int64
    plain = score(model, processor, off)
    assert torch.equal(score(model, processor, on), plain)
    # and as floats, in one row with a fractional example
    assert on[3].slot_steps is not None
    on[3].slot_steps = [0.5] * len(on[3].slot_steps)
    mixed = score(model, processor, on)
    others = pack(on).example_of_completion[pack(on).completion_of_token] != 3
    assert torch.equal(mixed[others], plain[others])
    assert (mixed[~others] - plain[~others]).abs().max() > 1e-3


def count_positions(processor: Any, ids: list[int], steps: Sequence[float]) -> list[float]:
    """Positions token by token; the k-th <img> opens an image of step k."""
    here, image, out = -1.0, -1, []
    for token in ids:
        image += token == processor.tokenizer.convert_tokens_to_ids("<img>")
        here += steps[image] if token == processor.image_token_id else 1.0
        out.append(here)
    return out


@torch.no_grad()
def plain_scores(
    model: Any, processor: Any, example: Example, completion: list[int], steps: Sequence[float]
) -> Tensor:
    """Log-probabilities of a completion's tokens by transformers, at float positions."""
    ids = [*example.prompt_ids, *completion]
    positions = torch.tensor([count_positions(processor, ids, steps)], dtype=torch.float32)
    logits = model(
        input_ids=torch.tensor([ids]),
        # without a mask, transformers takes fractional positions for several packed sequences
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        position_ids=positions,
        pixel_values=normalize_tiles(processor, example.tiles) if len(example.tiles) else None,
    ).logits[0, len(example.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_packed_scores_are_the_plain_ones(
    model: Any, tiny_model: Path, processor: Any, images: Path
) -> None:
    """Pairs and conversations in one row, several images, images of later turns, drawn steps."""
    plain_model, _ = load_plain(tiny_model)
    encoder = Encoder(processor, MAX_TILES, position_steps=tuple(STEPS), seed=5)
    examples = [encoder.pair(row) for row in pairs(images, 4)]
    examples += [encoder.conversation(row) for row in conversations(images, 4)]
    expected, drawn = [], set[float]()
    for example in examples:
        # the step of each image is that of its first slot, the one after an <img>
        ids = example.prompt_ids + example.completions[0]
        opening = processor.tokenizer.convert_tokens_to_ids("<img>")
        slots = dict(zip(example.image_slots, example.slot_steps or [], strict=True))
        steps = [step for slot, step in slots.items() if ids[slot - 1] == opening]
        drawn.update(steps)
        for number, completion in enumerate(example.completions):
            mask = (example.loss_masks or [[True] * len(ids)] * 2)[number][: len(completion)]
            scores = plain_scores(plain_model, processor, example, completion, steps)
            expected.append(scores[torch.tensor(mask)])
    assert len(drawn) >= 3
    ours = score(model, processor, examples)
    assert (ours - torch.cat(expected)).abs().max() < 1e-5
    whole = score(model, processor, [Encoder(processor, MAX_TILES).pair(pairs(images, 4)[1])])
    assert (ours[: len(whole)] - whole).abs().max() > 1e-3  # the steps do something


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("rope", ["default", "dynamic", "yarn"])
def test_rotary_code_takes_fractions_unrounded(kind: str, rope: str) -> None:
    """cos(p / base^(2i/d)) of the exact p, under autocast too, of every language model."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config, module = {
        "qwen2": (Qwen2Config, Qwen2RotaryEmbedding),
        "qwen3": (Qwen3Config, Qwen3RotaryEmbedding),
        "llama": (LlamaConfig, LlamaRotaryEmbedding),
    }[kind]
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 1e4}
    if rope != "default":
        parameters |= {"factor": 2.0, "original_max_position_embeddings": 4096}
    made = config(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    rotary = module(made)
    # the last one is beyond the context, where a dynamic base goes by the position
    positions = torch.tensor([[0.25, 1000 + 1 / 256, 5000.5]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, _ = rotary(torch.zeros(1, 3, 64), positions)
    angles = positions[0].double()[:, None] * rotary.inv_freq.double()
    if rope == "dynamic":
        base = 1e4 * (2.0 * 5001.5 / 4096 - 1.0) ** (16 / 14)
        assert float(rotary.inv_freq[1]) == pytest.approx(base ** (-2 / 16), rel=1e-6)
    expected = angles.cos() * rotary.attention_scaling
    assert (cos[0, :, :8].double() - expected).abs().max() < 3e-4  # float32 at an angle of 4,000
    step = (rotary(torch.zeros(1, 3, 64), positions + 1 / 256)[0] - cos).abs().max()
    assert float(step) > 1e-3


def test_positions_that_were_rounded_on_their_way_are_refused(
    model: Any, processor: Any, images: Path
) -> None:
    """FSDP1 casts every float that a module is given."""
    encoder = Encoder(processor, MAX_TILES, position_steps=(0.25,))
    batch = pack([encoder.pair(pairs(images, 2)[1])])
    batch.position_ids = batch.position_ids.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"positions came as torch\.bfloat16, which rounds"):
        model(packed=batch, pixel_values=normalize_tiles(processor, batch.tiles))


# ---------------------------------------------------------------- sampling


def test_the_sampler_goes_by_the_checkpoint(
    stepped_model: Path, processor: Any, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log-probabilities are the trainer's; "auto" leaves vLLM, which has no fractions."""
    sampler = open_sampler(stepped_model, max_model_len=256)
    assert sampler.name == "transformers"
    assert "position_step is 0.25, which vLLM does not have" in capsys.readouterr().err
    rows = questions(images, ["one", "two", "three", "four"])
    requests = [
        SampleRequest(row.data["question"], tuple(row.load_images()), seed=number)
        for number, row in enumerate(rows)
    ]
    config = SamplingConfig(n=3, max_tokens=12, max_tiles=MAX_TILES)
    sampled = sampler.sample(requests, config)
    model: Any = load_model(stepped_model)
    forbidden = forbidden_token_ids(processor, model.config.text_config.vocab_size)

    def largest_gap(step: float) -> float:
        encoder = Encoder(processor, MAX_TILES, position_steps=(step,))
        examples = [
            encoder.completions(row, [list(one.token_ids) for one in several])
            for row, several in zip(rows, sampled, strict=True)
        ]
        ours = score(model, processor, examples, forbidden=forbidden)
        theirs = [p for several in sampled for one in several for p in one.logprobs]
        return float((ours - torch.tensor(theirs)).abs().max())

    assert largest_gap(0.25) < 1e-5
    assert largest_gap(1.0) > 1e-3


def test_generate_goes_on_from_given_positions(
    stepped_model: Path, processor: Any, images: Path
) -> None:
    """transformers' generate counts on from position_ids that it is handed: our greedy tokens."""
    (row,) = questions(images, ["one", "two", "three"])[2:]
    request = SampleRequest(row.data["question"], tuple(row.load_images()), seed=0)
    config = SamplingConfig(temperature=0, max_tokens=12, max_tiles=MAX_TILES)
    ((ours,),) = open_sampler(stepped_model, backend="transformers").sample([request], config)
    example = Encoder(processor, MAX_TILES).completions(row, [[]])
    ids = torch.tensor([example.prompt_ids])
    plain: Any = load_plain(stepped_model)[0].eval()
    out = plain.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.tensor([count_positions(processor, example.prompt_ids, [0.25])]),
        pixel_values=normalize_tiles(processor, example.tiles),
        suppress_tokens=forbidden_token_ids(processor, plain.config.text_config.vocab_size),
        max_new_tokens=12,
        do_sample=False,
    )
    assert tuple(out[0, ids.shape[1] :].tolist()) == ours.token_ids
