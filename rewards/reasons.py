"""The one exception of `rewards`: a gold answer or an expression that cannot be judged."""

from __future__ import annotations


class CannotJudge(Exception):
    """Neither right nor wrong can be said; the message is the reason."""
