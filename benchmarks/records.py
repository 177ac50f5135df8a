"""How fast a large annotation file opens: offsets found, opened again, rows read by number.

    python benchmarks/records.py --gib 1.5 [--json]

A file of conversations of about 1 KB is made in a temporary folder and deleted afterwards, with its
cache. What is read comes from the page cache, so a first opening is bounded by the disk as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl.data import Quarantine, read_rows

GIB = 2**30
RANDOM_ROWS = 20_000


def make_file(path: Path, size: int) -> None:
    """Write conversations of 0.5 to 1.5 KB until the file has `size` bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(1000)]
    lines = []
    for number in range(1000):
        ask = "<image>\n" + " ".join(rng.choices(words, k=20))
        answer = " ".join(rng.choices(words, k=rng.randint(60, 220)))
        turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"image": f"charts/{number}.png", "conversations": turns}) + "\n")
    block = "".join(lines).encode()
    with path.open("wb") as out:
        while out.tell() < size:
            out.write(block)


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action returns and the seconds it took."""
    start = time.perf_counter()
    found = action()
    return found, time.perf_counter() - start


def measure(folder: Path, gib: float) -> dict[str, float]:
    """All numbers for a file of this size."""
    path = folder / "rows.jsonl"
    make_file(path, int(gib * GIB))
    size = path.stat().st_size / GIB

    def open_rows(checked: bool) -> Any:
        quarantine = Quarantine(None)
        return read_rows(
            *(path,), kind="conversation", quarantine=quarantine, checked=checked, quiet=True
        )

    rows, first = timed(lambda: open_rows(False))
    _, again = timed(lambda: open_rows(False))
    rng = random.Random(1)
    numbers = [rng.randrange(len(rows)) for _ in range(RANDOM_ROWS)]
    _, reading = timed(lambda: [rows[number] for number in numbers])
    _, checked = timed(lambda: open_rows(True))
    _, checked_again = timed(lambda: open_rows(True))
    return {
        "gib": size,
        "rows": len(rows),
        "first_seconds": first,
        "again_seconds": again,
        "first_gib_per_second": size / first,
        "first_seconds_at_50_gb": 50e9 / GIB / size * first,
        "random_rows_per_second": RANDOM_ROWS / reading,
        "every_row_checked_seconds": checked,
        "every_row_checked_again_seconds": checked_again,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time the opening of a large annotation file.")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the file (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        found = measure(Path(folder), args.gib)
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>34}  {value:,.4g}")


if __name__ == "__main__":
    main()
