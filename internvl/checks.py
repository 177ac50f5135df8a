"""Which rows can be used: every image decoded and every length counted before the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from internvl.errors import DataError
from internvl.quarantine import Quarantine
from internvl.records import Kind, RecordFault
from internvl.rows import Row, image_fault

if TYPE_CHECKING:
    from internvl.encoding import Encoder


def check_images(
    rows: Sequence[Row], *, quarantine: Quarantine, record_fault: RecordFault | None = None
) -> list[Row]:
    """The rows whose images all decode; the others go to the quarantine.

    record_fault: what the caller itself finds wrong with a record, or None.
    Raises `DataError` when the quarantine holds more than it allows, or no row is left.
    """
    from tqdm import tqdm

    def fault_of(row: Row) -> str | None:
        return (record_fault(row.data) if record_fault else None) or image_fault(row)

    good = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        faults = pool.map(fault_of, rows, chunksize=64)
        for row, fault in zip(tqdm(rows, desc="checking images", delay=2), faults, strict=False):
            if fault is None:
                good.append(row)
            else:
                quarantine.add(row.file, row.line, fault, row.data)
    quarantine.check(len(rows))
    if not good and rows:
        raise DataError(f"{rows[0].file}: no row with usable images is left")
    return good


def usable_rows(
    rows: Sequence[Row],
    encoder: Encoder,
    kind: Kind,
    quarantine: Quarantine,
    *,
    quiet: bool,
    room: int = 0,
    record_fault: RecordFault | None = None,
) -> list[Row]:
    """The rows that can be trained on; the others go to the quarantine with their reason.

    Every image is decoded and every length counted, before the first step is run. room: see
    `Encoder.fault`. record_fault: what the stage itself finds wrong with a record, or None.
    Raises `DataError` when more are bad than the quarantine allows, or none is left.
    """
    from tqdm import tqdm

    good = []
    for row in tqdm(rows, desc="checking rows", unit="row", disable=quiet, delay=1):
        fault = record_fault(row.data) if record_fault else None
        if fault := fault or encoder.fault(row, kind, room):
            quarantine.add(row.file, row.line, fault, row.data)
        else:
            good.append(row)
    quarantine.check(len(rows))
    if not good:
        raise DataError(f"{rows[0].file}: no usable row is left of {len(rows)}")
    return good
