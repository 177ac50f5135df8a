"""Shared-prefix attention against a dense mask over the whole row, for layouts of any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvl.attention import Segment, build_layout, shared_prefix_attention
from internvl.errors import UserError

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# examples of a row: (tokens of the prompt, tokens of each completion)
EXAMPLES = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


def row_of(examples: list[tuple[int, list[int]]]) -> tuple[list[Segment], Tensor]:
    """The row's segments, and who sees whom: bool [T, T], from the definition."""
    length = sum(prompt + sum(completions) for prompt, completions in examples)
    sees = torch.zeros(length, length, dtype=torch.bool)
    segments, here = [], 0
    for prompt, completions in examples:
        start, here = here, here + prompt
        sees[start:here, start:here] = torch.ones(prompt, prompt).tril().bool()
        for branch, size in enumerate(completions):
            first, here = here, here + size
            sees[first:here, start : start + prompt] = True
            sees[first:here, first:here] = torch.ones(size, size).tril().bool()
            if branch == 0:
                segments.append(Segment(0, 0, start, here))
            else:
                segments.append(Segment(start, start + prompt, first, here))
    return segments, sees


@given(EXAMPLES)
@settings(max_examples=40)
def test_equals_a_dense_mask(examples: list[tuple[int, list[int]]]) -> None:
    """Output and the gradients of q, k, v, in float64; heads grouped two to a key."""
    segments, sees = row_of(examples)
    length = len(sees)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, heads, length, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    weight = torch.randn(1, length, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    states = [state.requires_grad_() for state in (q, k, v)]
    dense = scaled_dot_product_attention(
        *(q, k, v), attn_mask=sees[None, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    expected = torch.autograd.grad((dense * weight).sum(), states)
    out, _ = shared_prefix_attention(
        *(torch.nn.Identity(), q, k, v, None), scaling=0.3, layout=build_layout(segments, length)
    )
    found = torch.autograd.grad((out * weight).sum(), states)
    assert torch.allclose(out, dense, rtol=0, atol=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@given(EXAMPLES)
def test_every_position_is_computed_once(examples: list[tuple[int, list[int]]]) -> None:
    """Padding of a call is never read: the positions that are gathered are a permutation."""
    segments, sees = row_of(examples)
    layout = build_layout(segments, len(sees))
    queries = torch.cat([call.queries.flatten() for call in layout.calls])
    assert queries[layout.gather].tolist() == list(range(len(sees)))
    computed = sum(call.queries.numel() * call.keys.shape[1] for call in layout.calls)
    needed = sum(segment.queries * segment.keys for segment in segments)
    assert computed <= 1.5 * needed  # the bound on padding


def test_what_it_cannot_do_is_an_error() -> None:
    state = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UserError, match="needs a layout"):
        shared_prefix_attention(torch.nn.Identity(), state, state, state, None)
    layout = build_layout([Segment(0, 0, 0, 1)], 1)
    with pytest.raises(UserError, match="sliding-window"):
        shared_prefix_attention(
            *(torch.nn.Identity(), state, state, state, None), layout=layout, sliding_window=4
        )
