"""A few of the latest rollouts with their pictures, to the trackers that report_to names.

W&B gets a table, TensorBoard one picture and one text a row; both by way of transformers' own
callbacks, which hold the run. Other trackers get the numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback, WandbCallback

from internvl.data import Row
from rl.rollouts import Group

ROWS = 8
SIDE = 256  # pixels of a picture
COLUMNS = ("step", "question", "prompt", "completion", "reward", "advantage", "outcome")


def table_rows(step: int, rows: Sequence[Row], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The best and the worst completion of each group, at most `ROWS` of them."""
    out = []
    for group in groups[: ROWS // 2]:
        order = sorted(range(len(group.texts)), key=lambda i: (group.advantages[i], -i))
        data = rows[group.question].data
        for place in dict.fromkeys((order[-1], order[0])):
            out.append(
                {
                    "step": step,
                    "question": data["id"],
                    "prompt": data["question"],
                    "completion": group.texts[place],
                    "reward": group.rewards[place],
                    "advantage": group.advantages[place],
                    "outcome": group.outcomes[place],
                    "row": rows[group.question],
                }
            )
    return out


def picture(row: Row) -> Any:
    """The first image of a row, small, or None."""
    images = list(row.load_images())
    if not images:
        return None
    small = images[0].convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small


def log_table(
    callbacks: Sequence[Any], step: int, table: Sequence[dict[str, Any]], *, images: bool
) -> None:
    """Hand `table_rows` to the trackers among transformers' callbacks."""
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            _to_wandb(callback._wandb, table, images)
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            _to_tensorboard(callback.tb_writer, step, table, images)


def _to_wandb(wandb: Any, table: Sequence[dict[str, Any]], images: bool) -> None:
    if wandb.run is None:
        return
    data = []
    for entry in table:
        values = [entry[name] for name in COLUMNS]
        if images:
            small = picture(entry["row"])
            values.append(None if small is None else wandb.Image(small))
        data.append(values)
    columns = [*COLUMNS, *(["image"] if images else [])]
    # without a step of its own: W&B takes it with the next log, which carries train/global_step
    wandb.log({"completions": wandb.Table(columns=columns, data=data)}, commit=False)


def _to_tensorboard(writer: Any, step: int, table: Sequence[dict[str, Any]], images: bool) -> None:
    for number, entry in enumerate(table):
        lines = [f"**{name}**: {entry[name]}" for name in COLUMNS]
        writer.add_text(f"completions/{number}", "\n\n".join(lines), step)
        small = picture(entry["row"]) if images else None
        if small is not None:
            pixels = np.asarray(small)
            writer.add_image(f"completions/{number}", pixels, step, dataformats="HWC")
