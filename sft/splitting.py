"""An over-long text-only sample as several pieces: every response token scored once.

    ids     q q q q a a a a q q a a a a a a a a a    q question, a answer (scored)
    pieces  q q q q a a a a                          ends after an answer where one ends in it
                            q q a a a a a a          positions begin at 0 in each piece
                                        . . a a a    . context once more, not scored

Why not the plain cut at every `max_tokens` that the published code makes: the first token of a
piece has nothing before it that predicts it, so its loss is lost; an answer is cut even where the
next piece could hold it whole; and what follows a cut is answered without the question.

What a piece sees before its first scored token: what no piece before it has seen (the question),
and at least `overlap` tokens of what came before (all, where there are fewer), from the beginning
of a turn where one lies in them. A question that is itself too long loses its beginning, so that
there are always `overlap` places for the answer; what is in no piece is counted in `dropped`.

The averaging's x (sft/losses.py) is the number of response tokens of the WHOLE sample, for each of
its pieces: a token then weighs 1 / x^a as if the sample had not been cut, and the sample's total
weight does not depend on `max_tokens`. With each piece's own x a sample in K equal pieces would
weigh sqrt(K) times as much under square averaging, K times under sample averaging.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample that is trained on by itself.

    start, stop: its place in the sample. ids: its tokens. mask: True for the tokens that this piece
    scores. sample_length: response tokens of the whole sample, the averaging's x. dropped: tokens
    in front of it, and behind the last piece, that no piece holds.
    """

    start: int
    stop: int
    ids: list[int]
    mask: list[bool]
    sample_length: int
    dropped: int = 0

    @property
    def prompt_length(self) -> int:
        """Tokens before the first scored one; at least 1."""
        return self.mask.index(True)


@dataclass(frozen=True)
class Split:
    """The pieces of a sample and the account of its other tokens.

    dropped: tokens in no piece; none of them is scored. repeated: tokens that a piece holds once
    more as context.
    """

    pieces: tuple[Piece, ...]
    dropped: int
    repeated: int


def split_long(
    ids: Sequence[int], mask: Sequence[bool], max_tokens: int, overlap: int | None = None
) -> Split:
    """Cut a sample without images into pieces of at most `max_tokens`.

    ids: prompt and completion. mask: True where a token is a response's. overlap: tokens of context
    that a later piece sees at least, where there are as many; 1 to half of max_tokens (default: an
    eighth). A sample that fits is one piece; one without a response token is none. Raises
    ValueError for sizes that do not fit together and for a scored first token, which nothing
    predicts.

    >>> ids, answer = list(range(10)), [False] * 2 + [True] * 8
    >>> [(p.start, p.stop, p.prompt_length) for p in split_long(ids, answer, 6, overlap=2).pieces]
    [(0, 6, 2), (4, 10, 2)]
    """
    overlap = max(1, max_tokens // 8) if overlap is None else overlap
    if not 1 <= overlap <= max_tokens // 2:
        raise ValueError(f"overlap is {overlap}, of 1 to {max_tokens // 2} (half of max_tokens)")
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} ids, but a mask of {len(mask)}")
    scored = [place for place, keep in enumerate(mask) if keep]
    if not scored:
        return Split((), len(ids), 0)
    if scored[0] == 0:
        raise ValueError("the first token is scored, but nothing stands before it to predict it")
    if len(ids) <= max_tokens:
        return Split((Piece(0, len(ids), list(ids), list(mask), len(scored)),), 0, 0)
    # where an answer is over and the next turn begins
    turns = [place + 1 for place in scored if place + 1 == len(mask) or not mask[place + 1]]
    pieces: list[Piece] = []
    repeated = seen = 0  # seen: where the last piece ended
    done = 0  # how many of the scored tokens are in a piece
    while done < len(scored):
        start, stop = _span(scored[done], seen, turns, len(ids), max_tokens, overlap)
        context = scored[done] - start
        piece_mask = [False] * context + list(mask[scored[done] : stop])
        done = bisect_left(scored, stop)
        dropped = max(0, start - seen) + (len(ids) - stop if done == len(scored) else 0)
        pieces.append(Piece(start, stop, list(ids[start:stop]), piece_mask, len(scored), dropped))
        repeated += max(0, seen - start)
        seen = stop
    return Split(tuple(pieces), sum(piece.dropped for piece in pieces), repeated)


def _span(
    first: int, seen: int, turns: Sequence[int], length: int, max_tokens: int, overlap: int
) -> tuple[int, int]:
    """Where the piece that scores the token at `first` and what follows begins and ends."""
    wanted = max(0, min(seen, first - overlap))
    start = max(wanted, first - (max_tokens - overlap))
    reach = min(length, start + max_tokens)
    last_turn = bisect_right(turns, reach) - 1
    stop = turns[last_turn] if last_turn >= 0 and turns[last_turn] > first else reach
    start = max(wanted, stop - max_tokens)  # room that the answers left is the question's
    if start > 0:
        turn = bisect_left(turns, start)
        start = turns[turn] if turn < len(turns) and turns[turn] < first else start
    return start, stop
