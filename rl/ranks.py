"""What ranks tell each other, so that none waits for one that has stopped.

A rank samples and judges alone. What fails there is heard of by all of them at the end of it; all
then stop at the same place, and can save a checkpoint together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist

from internvl.errors import UserError


def gather(mine: list[Any]) -> list[list[Any]]:
    """Every rank's list, by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    found: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return found


def raise_everywhere(fault: UserError | None) -> None:
    """Raise a rank's fault on every rank; every rank must call it."""
    told = [text for part in gather([] if fault is None else [str(fault)]) for text in part]
    if fault is None and told:
        fault = UserError(told[0])
    if fault is not None:
        raise fault


@contextmanager
def everywhere() -> Iterator[None]:
    """What each rank does inside alone; a `UserError` of one is raised on all, at the end of it."""
    fault = None
    try:
        yield
    except UserError as error:
        fault = error
    raise_everywhere(fault)
