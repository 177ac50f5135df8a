"""Which rows can be used: every image decoded and every length counted before the first step.

    rows -> each rank its share -> known to be good? -> images in threads -> length -> faults
         -> all ranks' faults together -> quarantine -> the rows that are left, the same everywhere

What was found good is kept as a hash of the record, its image files' states and the settings, so
that a restart decodes nothing twice; what was found bad is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internvl.data.quarantine import Quarantine, json_value
from internvl.data.records import Kind, RecordFault
from internvl.data.rows import Row, Sizes, look_at_images
from internvl.data.rowsets import Selection
from internvl.errors import DataError

if TYPE_CHECKING:
    from internvl.encoding import Encoder

Faults = dict[int, str]  # of rows, by their number
_AT_ONCE = 256  # rows that are in memory together
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Ranks:
    """How processes share the work. gather: one rank's faults to those of all."""

    rank: int = 0
    number: int = 1
    gather: Callable[[Faults], Faults] = dict


class KnownRows:
    """The rows that were found good before, as hashes in files that are only appended to.

    folder: of the files, one a rank; all are read (None: nothing is kept). settings: all that the
    judgement depends on besides the row itself.
    """

    def __init__(self, folder: Path | None, settings: str, rank: int = 0):
        self._path = None if folder is None else folder / f"{rank}.bin"
        self._settings = settings.encode()
        self._known: set[bytes] = set()
        for path in sorted(folder.glob("*.bin")) if folder else []:
            found = path.read_bytes()
            whole = len(found) // _DIGEST_BYTES * _DIGEST_BYTES
            if whole < len(found) and path == self._path:  # a kill while it was written
                os.truncate(path, whole)
            self._known.update(
                found[start : start + _DIGEST_BYTES] for start in range(0, whole, _DIGEST_BYTES)
            )

    def digest(self, row: Row) -> bytes | None:
        """What identifies a row and its image files; None where a file is not there."""
        if self._path is None or row.fault is not None:
            return None
        try:
            states = [
                (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
                for found in map(os.stat, row.media_files())
            ]
        except (OSError, ValueError):
            return None
        facts = [row.data, str(row.image_root), row.max_tiles, states]
        text = json.dumps(facts, default=json_value, sort_keys=True)
        return hashlib.sha256(self._settings + text.encode()).digest()[:_DIGEST_BYTES]

    def __contains__(self, digest: bytes | None) -> bool:
        return digest in self._known

    def add(self, digests: Sequence[bytes]) -> None:
        """Remember rows that are good."""
        if self._path is None or not digests:
            return
        self._known.update(digests)  # with repeat_time a row comes again
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as out:
            out.write(b"".join(digests))


def find_faults(
    rows: Sequence[Row],
    *,
    desc: str,
    quiet: bool = False,
    record_fault: RecordFault | None = None,
    length_fault: Callable[[Row, Sizes], str | None] | None = None,
    known: KnownRows | None = None,
    ranks: Ranks = Ranks(),
) -> Faults:
    """What is wrong with which row, by its number; the same on every rank.

    record_fault: what the caller itself finds wrong with a record. Images are decoded in threads,
    `length_fault` is called in this one, with their sizes (tokenizers are not safe in threads).
    """
    from tqdm import tqdm

    known = known or KnownRows(None, "")

    def look(number: int) -> tuple[Row, Sizes, bytes | None, str | None, bool]:
        row = rows[number]
        if row.fault is None and record_fault and (fault := record_fault(row.data)):
            return row, [], None, fault, False
        digest = known.digest(row)
        if digest in known:
            return row, [], digest, None, True
        fault, sizes = look_at_images(row)
        return row, sizes, digest, fault, False

    faults: Faults = {}
    mine = range(ranks.rank, len(rows), ranks.number)
    bar = tqdm(total=len(mine), desc=desc, unit="row", delay=2, disable=quiet)
    with bar, ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(mine), _AT_ONCE):
            numbers = mine[start : start + _AT_ONCE]
            good = []
            for number, (row, sizes, digest, fault, seen) in zip(
                numbers, pool.map(look, numbers), strict=True
            ):
                if fault is None and not seen and length_fault:
                    fault = length_fault(row, sizes)
                if fault is not None:
                    faults[number] = fault
                elif digest is not None and not seen:
                    good.append(digest)
                bar.update()
            known.add(good)
    return ranks.gather(faults)


def put_aside(rows: Sequence[Row], faults: Faults, quarantine: Quarantine) -> Sequence[Row]:
    """The rows without a fault; the others go to the quarantine.

    Raises `DataError` when that holds more than it allows, or no row is left.
    """
    read = len(rows) + quarantine.count  # a share is taken of all, bad records included
    for number in sorted(faults):
        row = rows[number]
        quarantine.add(row.file, row.line, faults[number], row.data)
    quarantine.check(read)
    if not faults:
        return rows
    if len(faults) == len(rows):
        raise DataError(f"{rows[0].file}: no usable row is left of {len(rows)}")
    return Selection(rows, array("q", (n for n in range(len(rows)) if n not in faults)))


def check_images(
    rows: Sequence[Row], *, quarantine: Quarantine, record_fault: RecordFault | None = None
) -> Sequence[Row]:
    """The rows whose images all decode; the others go to the quarantine.

    record_fault: what the caller itself finds wrong with a record, or None.
    Raises `DataError` when the quarantine holds more than it allows, or no row is left.
    """
    faults = find_faults(rows, desc="checking images", record_fault=record_fault)
    return put_aside(rows, faults, quarantine)


def usable_rows(
    rows: Sequence[Row],
    encoder: Encoder,
    kind: Kind,
    quarantine: Quarantine,
    *,
    quiet: bool,
    room: int = 0,
    record_fault: RecordFault | None = None,
    known_folder: Path | None = None,
    ranks: Ranks = Ranks(),
) -> Sequence[Row]:
    """The rows that can be trained on; the others go to the quarantine with their reason.

    Every image is decoded and every length counted, before the first step is run. room: see
    `Encoder.fault`. record_fault: what the stage itself finds wrong with a record, or None.
    known_folder: where rows that were found good are remembered. ranks: who checks what.
    Raises `DataError` when more are bad than the quarantine allows, or none is left.
    """
    faults = find_faults(
        rows,
        desc="checking rows",
        quiet=quiet,
        record_fault=record_fault,
        length_fault=lambda row, sizes: encoder.length_fault(row, kind, room, sizes),
        known=KnownRows(known_folder, settings_digest(encoder, kind, room), ranks.rank),
        ranks=ranks,
    )
    return put_aside(rows, faults, quarantine)


def settings_digest(encoder: Encoder, kind: Kind, room: int) -> str:
    """What decides, besides the row, whether it can be trained on."""
    processor = encoder.processor
    parts = [
        *(processor.tokenizer.backend_tokenizer.to_str(), str(processor.chat_template)),
        *(processor.image_processor.to_json_string(), processor.image_seq_length),
        *(*encoder.limits(), kind, room),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
