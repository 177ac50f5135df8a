"""Shared-prefix attention, each backend against a dense mask over the whole row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    EXAMPLES,
    HEADS,
    KEY_HEADS,
    PlainKernel,
    dense,
    plain_varlen,
    random_states,
    row_of,
    seen_by_layout,
)
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from internvl.attention import BACKENDS, Segment, build_layout, shared_prefix_attention
from internvl.attention.flex import attend_flex, block_mask
from internvl.attention.layout import AttentionLayout, split_indices, varlen_indices
from internvl.attention.segments import attend_segments, segment_calls
from internvl.attention.split import KERNELS, attend_split
from internvl.attention.varlen import attend_varlen, gather
from internvl.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor, AttentionLayout, float | None, float], Tensor]


def attend_by_contract(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None, _: float
) -> Tensor:
    """The varlen and flash backends over a kernel that does what theirs document."""
    return attend_varlen(q, k, v, layout, scale, plain_varlen)


def attend_split_by_contract(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None, dropout: float
) -> Tensor:
    """The split backend over the CUDA kernels' contract."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "cpu", PlainKernel())
        return attend_split(q, k, v, layout, scale, dropout)


@pytest.mark.parametrize(
    "attend", [attend_segments, attend_split, attend_by_contract, attend_split_by_contract]
)
@given(EXAMPLES)
@settings(max_examples=8)
def test_equals_a_dense_mask(attend: Attend, examples: list[tuple[int, list[int]]]) -> None:
    """Output and the gradients of q, k, v, in float64; heads grouped two to a key."""
    segments, sees = row_of(examples)
    layout = build_layout(segments, len(sees))
    q, k, v, weight = random_states(len(sees))
    expected = dense(q, k, v, sees, 0.3)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    out = attend(q, k, v, layout, 0.3, 0.0)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(found, gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@given(EXAMPLES)
@settings(max_examples=3)
def test_flex_forward_equals_a_dense_mask(examples: list[tuple[int, list[int]]]) -> None:
    """All that torch has on a CPU."""
    segments, sees = row_of(examples)
    q, k, v = (state.detach().float() for state in random_states(len(sees))[:3])
    out = attend_flex(q, k, v, build_layout(segments, len(sees)), 0.3, 0.0)
    assert torch.allclose(out, dense(q, k, v, sees, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 9])
@given(EXAMPLES)
@settings(max_examples=4)
def test_block_mask_is_torchs_own(scale: int, examples: list[tuple[int, list[int]]]) -> None:
    """The blocks that create_block_mask finds by looking at every pair, empty and full ones too."""
    examples = [(prompt * scale, [size * scale for size in sizes]) for prompt, sizes in examples]
    segments, sees = row_of(examples)
    length = len(sees)
    ours = block_mask(build_layout(segments, length))
    assert ours.mask_mod is not None
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    assert torch.equal(ours.mask_mod(torch.tensor(0), torch.tensor(0), query, key), sees)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(mask, f"{kind}_num_blocks")[0, 0] for mask in (ours, theirs))
        assert torch.equal(counts, others)
        for row, count in enumerate(counts.tolist()):
            one, other = (getattr(m, f"{kind}_indices")[0, 0, row, :count] for m in (ours, theirs))
            assert one.sort().values.tolist() == other.sort().values.tolist()


@given(EXAMPLES)
@settings(max_examples=15)
def test_every_position_is_computed_once(examples: list[tuple[int, list[int]]]) -> None:
    """Padding of a call is never read: the positions that are gathered are a permutation."""
    segments, sees = row_of(examples)
    prepared = segment_calls(build_layout(segments, len(sees)))
    queries = torch.cat([call.queries.flatten() for call in prepared.calls])
    assert queries[prepared.gather].tolist() == list(range(len(sees)))
    computed = sum(call.queries.numel() * call.keys.shape[1] for call in prepared.calls)
    needed = sum(segment.queries * segment.keys for segment in segments)
    assert computed <= 1.5 * needed  # the bound on padding


@given(EXAMPLES)
@settings(max_examples=15)
def test_indices_say_who_sees_whom(examples: list[tuple[int, list[int]]]) -> None:
    """Both index-building functions give the layout's mask, each pair once."""
    segments, sees = row_of(examples)
    layout = build_layout(segments, len(sees))
    varlen = varlen_indices(layout)
    every = torch.arange(len(sees))
    assert torch.equal(seen_by_layout(varlen, every, True, len(sees)), sees.int())
    split = split_indices(layout)
    own = seen_by_layout(split.own, every, True, len(sees))
    if split.prefix is not None:
        own += seen_by_layout(split.prefix, split.queries, False, len(sees))
    assert torch.equal(own, sees.int())
    assert layout.scores == int(sees.sum())


def test_indices_of_a_row() -> None:
    """Prompt of 4 with completions of 2 and 3, then a prompt of 2 with one of 1."""
    segments, sees = row_of([(4, [2, 3]), (2, [1])])
    layout = build_layout(segments, len(sees))
    at = varlen_indices(layout)
    assert at.cu_seqlens_q.tolist() == [0, 6, 9, 12]
    assert at.cu_seqlens_k.tolist() == [0, 6, 13, 16]
    assert at.cu_seqlens_q.dtype == at.cu_seqlens_k.dtype == torch.int32
    assert (at.max_seqlen_q, at.max_seqlen_k) == (6, 7)
    assert at.key_index is not None
    assert at.key_index.tolist() == [*range(6), *range(4), *range(6, 9), *range(9, 12)]
    split = split_indices(layout)
    assert split.own.cu_seqlens_q.tolist() == [0, 4, 6, 9, 12]
    assert split.own.key_index is None and split.prefix is not None
    assert split.queries.tolist() == [4, 5, 6, 7, 8]
    assert split.prefix.key_index is not None
    assert split.prefix.key_index.tolist() == [0, 1, 2, 3]
    assert split.prefix.cu_seqlens_q.tolist() == [0, 5]
    # nothing is shared: no key is copied
    alone = build_layout([Segment(0, 0, 0, 5), Segment(0, 0, 5, 7)], 7)
    assert varlen_indices(alone).key_index is None
    assert split_indices(alone).prefix is None


def test_a_prompts_gradient_adds_up_in_float32() -> None:
    """512 times 1 (a CPU adds so by itself; CUDA, one by one in bfloat16, would stay at 256)."""
    prompt = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    taken = gather(prompt, torch.zeros(512, dtype=torch.long))
    (found,) = torch.autograd.grad(taken.sum(), prompt)
    assert found.item() == 512.0 and found.dtype == torch.bfloat16


def as_transformers(states: list[Tensor]) -> list[Tensor]:
    return [state.detach().transpose(0, 1)[None] for state in states]


@pytest.mark.parametrize("name", ["segments", "split", "flex"])
def test_a_forced_backend_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In transformers' calling convention; the others are not asked."""
    used = []
    for other, backend in list(BACKENDS.items()):

        def attend(*args: object, other: str = other, real: Attend = backend.attend) -> Tensor:
            used.append(other)
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setitem(BACKENDS, other, type(backend)(other, attend, backend.lack))
    segments, sees = row_of([(5, [3, 2])])
    q, k, v = (state.float() for state in as_transformers(random_states(10)[:3]))
    with torch.no_grad():
        out, _ = shared_prefix_attention(
            *(torch.nn.Identity(), q, k, v, None),
            scaling=0.3,
            layout=build_layout(segments, 10),
            attention_backend=name,
        )
    assert used == [name]
    expected = dense(*(states[0].transpose(0, 1) for states in (q, k, v)), sees, 0.3)
    assert out.shape == (1, 10, HEADS, 8)
    assert torch.allclose(out[0], expected, rtol=0, atol=1e-5)


def test_autocast_makes_one_dtype() -> None:
    """Qwen3's norms hand on float32 beside values in bfloat16; SDPA casts, and so do all others."""
    q, k, v = as_transformers(random_states(10)[:3])
    segments, _ = row_of([(5, [3, 2])])
    for name in ("segments", "split"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = shared_prefix_attention(
                *(torch.nn.Identity(), q.float(), k.float(), v.bfloat16(), None),
                layout=build_layout(segments, 10),
                attention_backend=name,
            )
        assert out.dtype == torch.bfloat16


def test_what_it_cannot_do_is_an_error() -> None:
    state = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UserError, match="needs a layout"):
        shared_prefix_attention(torch.nn.Identity(), state, state, state, None)
    layout = build_layout([Segment(0, 0, 0, 1)], 1)
    for name, value in (("sliding_window", 4), ("s_aux", state), ("softcap", 5.0)):
        with pytest.raises(UserError, match="cannot share prefixes"):
            shared_prefix_attention(
                *(torch.nn.Identity(), state, state, state, None), layout=layout, **{name: value}
            )
    assert KEY_HEADS < HEADS
    with pytest.raises(AssertionError, match="cover"):
        build_layout([Segment(0, 0, 0, 1), Segment(0, 0, 2, 3)], 3)
