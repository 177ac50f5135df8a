"""Over-long samples in pieces: every response token scored once, and with what context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.losses import EXPONENTS, total_weight
from sft.splitting import split_long


def sample(*lengths: int) -> tuple[list[int], list[bool]]:
    """Ids 0, 1, ... and the mask of a question, an answer, a question, ... of these lengths."""
    mask = [bool(turn % 2) for turn, length in enumerate(lengths) for _ in range(length)]
    return list(range(len(mask))), mask


def spans(*lengths: int, max_tokens: int, overlap: int) -> list[tuple[int, int, int]]:
    """Where each piece begins, begins to score, and ends."""
    split = split_long(*sample(*lengths), max_tokens, overlap)
    return [(p.start, p.start + p.prompt_length, p.stop) for p in split.pieces]


TURNS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def test_a_sample_that_fits_is_one_piece() -> None:
    ids, mask = sample(3, 4, 2, 1, 2)
    split = split_long(ids, mask, 12)
    assert [(p.ids, p.mask, p.sample_length) for p in split.pieces] == [(ids, mask, 5)]
    assert (split.dropped, split.repeated) == (0, 0)


def test_the_docstrings_sample() -> None:
    split = split_long(*sample(4, 4, 2, 9), 8, 2)
    assert [p.ids for p in split.pieces] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(14, 19)),
    ]
    assert [p.mask for p in split.pieces] == [
        [False] * 4 + [True] * 4,
        [False] * 2 + [True] * 6,
        [False] * 2 + [True] * 3,
    ]
    assert [p.sample_length for p in split.pieces] == [13, 13, 13]
    assert (split.dropped, split.repeated) == (0, 2)


def test_an_answer_that_fits_the_next_piece_is_not_cut() -> None:
    assert spans(2, 3, 1, 5, max_tokens=10, overlap=2) == [(0, 2, 5), (5, 6, 11)]
    # this one ends exactly where the piece does
    assert spans(2, 3, 1, 4, 1, 2, max_tokens=10, overlap=2) == [(0, 2, 10), (10, 11, 13)]


def test_earlier_turns_are_context_as_far_as_the_overlap_reaches() -> None:
    # the overlap of 5 reaches back into the first answer; the piece begins where the turn does
    assert spans(2, 3, 1, 3, 1, 3, max_tokens=10, overlap=3) == [(0, 2, 9), (9, 10, 13)]
    assert spans(2, 3, 1, 3, 1, 3, max_tokens=10, overlap=5) == [(0, 2, 9), (5, 10, 13)]


def test_a_long_answer_is_cut_with_context() -> None:
    assert spans(2, 20, max_tokens=10, overlap=3) == [(0, 2, 10), (7, 10, 17), (14, 17, 22)]


def test_a_long_question_loses_its_beginning_only() -> None:
    split = split_long(*sample(30, 3), 10, 4)
    assert [(p.start, p.prompt_length, p.stop) for p in split.pieces] == [(23, 7, 33)]
    assert (split.dropped, split.repeated) == (23, 0)
    # an answer that does not fit: there are `overlap` places for it
    assert spans(30, 7, max_tokens=10, overlap=4) == [(24, 30, 34), (30, 34, 37)]


def test_a_stretch_without_an_answer_makes_no_piece() -> None:
    ids, mask = sample(2, 3, 40, 2, 30)
    split = split_long(ids, mask, 10, 2)
    assert [(p.start, p.stop) for p in split.pieces] == [(0, 5), (37, 47)]
    assert split.dropped == 32 + 30
    none = split_long(list(range(50)), [False] * 50, 10)
    assert none.pieces == () and none.dropped == 50


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    ids, mask = sample(2, 20)
    for overlap in (0, 6):
        with pytest.raises(ValueError, match=f"overlap is {overlap}, of 1 to 5"):
            split_long(ids, mask, 10, overlap)
    with pytest.raises(ValueError, match="22 ids, but a mask of 21"):
        split_long(ids, mask[1:], 10)
    with pytest.raises(ValueError, match="the first token is scored"):
        split_long(ids[2:], mask[2:], 10)


@given(TURNS, st.integers(4, 40), st.data())
def test_every_response_token_is_scored_once_and_every_other_token_accounted_for(
    turns: list[int], max_tokens: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, max_tokens // 2))
    ids, mask = sample(*turns)
    split = split_long(ids, mask, max_tokens, overlap)
    scored, held = [], []
    for piece in split.pieces:
        assert len(piece.ids) == len(piece.mask) == piece.stop - piece.start <= max_tokens
        assert piece.ids == ids[piece.start : piece.stop]
        assert any(piece.mask) and not piece.mask[0]
        scored += [token for token, keep in zip(piece.ids, piece.mask, strict=True) if keep]
        held += piece.ids
    assert scored == [token for token, keep in zip(ids, mask, strict=True) if keep]
    assert split.dropped == len(ids) - len(set(held))
    assert split.repeated == len(held) - len(set(held))
    assert {piece.sample_length for piece in split.pieces} <= {sum(mask)}


@given(TURNS, st.integers(8, 40), st.data())
def test_what_a_piece_sees_before_its_first_scored_token(
    turns: list[int], max_tokens: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, max_tokens // 2))
    ids, mask = sample(*turns)
    begins = [i for i in range(len(mask)) if not mask[i] and (i == 0 or mask[i - 1])]
    seen = 0
    for piece in split_long(ids, mask, max_tokens, overlap).pieces:
        first = piece.start + piece.prompt_length
        full = len(piece.ids) == max_tokens
        fits = len(ids) <= max_tokens
        # what no piece had, unless this one is full
        assert piece.start <= seen or full
        # the overlap, or all there is, or from the beginning of a turn
        assert piece.prompt_length >= min(overlap, first) or piece.start in begins or full or fits
        # an answer goes on behind a piece only where it is longer than the overlap
        if piece.stop < len(mask) and mask[piece.stop - 1] and mask[piece.stop]:
            begin = max(i for i in range(piece.stop) if not mask[i]) + 1
            assert piece.stop - begin >= overlap
        seen = piece.stop


@pytest.mark.parametrize("average", EXPONENTS)
def test_the_weight_of_a_sample_does_not_depend_on_the_cuts(average: str) -> None:
    ids, mask = sample(5, 40, 3, 24)
    whole = total_weight([64], average)
    for max_tokens in (12, 20, 41, 100):
        pieces = split_long(ids, mask, max_tokens).pieces
        weights = [sum(p.mask) * p.sample_length ** -EXPONENTS[average] for p in pieces]
        assert sum(weights) == pytest.approx(whole, rel=1e-12)
