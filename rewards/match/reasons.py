"""What every matcher shares: its arguments' types, and the exception for "cannot be judged"."""

from __future__ import annotations

from collections.abc import Sequence

Options = Sequence[str] | None  # the texts of a multiple-choice question, in order


class CannotJudge(Exception):
    """Neither right nor wrong can be said; the message is the reason."""
